"""Training order of the examples, as a pure function of (seed, global example position).

Position p is slot p % size of epoch p // size; each epoch is a pseudo-random permutation of the examples.
The permutation is a Feistel network over the smallest 4**k >= size, with cycle walking for values out of range,
so any position takes O(1) time and memory, and a run can resume anywhere on any number of processes.

Sources: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions" (1988); cycle
walking from Black and Rogaway, "Ciphers with arbitrary finite domains" (2002); the mixing function is the finaliser
of SplitMix64 (Steele, Lea and Flood, 2014). It is a shuffle, not a secure cipher.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection on uint64 whose output bits depend on all input bits."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _check(size: int, seed: int) -> None:
    if size < 1:
        raise ValueError(f"the data order needs at least one example, got size={size}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"the data order's seed must lie in [0, 2**63), got {seed}")


def permute(epochs: np.ndarray, slots: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Returns the example index at each (epoch, slot); for a fixed epoch, a permutation of range(size).

    Args:
        epochs: int64 [N], at least 0.
        slots: int64 [N], each in [0, size).

    Returns:
        int64 [N].
    """
    _check(size, seed)
    # At least 4 x 4 values, so that permutations of very few examples differ between epochs.
    half_bits = np.uint64(max(2, ((size - 1).bit_length() + 1) // 2))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    with np.errstate(over="ignore"):
        keys = _mix(_mix(np.full(1, seed, np.uint64)) ^ np.asarray(epochs).astype(np.uint64))
        out = np.asarray(slots).astype(np.uint64)
        pending = np.arange(out.size)
        while pending.size:
            left, right = out[pending] >> half_bits, out[pending] & half_mask
            for round_index in range(_ROUNDS):
                round_key = keys[pending] + np.uint64(round_index) * _GOLDEN
                left, right = right, left ^ (_mix(round_key ^ right) & half_mask)
            out[pending] = (left << half_bits) | right
            pending = pending[out[pending] >= np.uint64(size)]
    return out.astype(np.int64)


def examples_at(positions: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epoch and the example index at each global position.

    Args:
        positions: integers [N], at least 0.
        size: number of examples in the source.
        seed: run seed, in [0, 2**63).

    Returns:
        epochs int64 [N] and indices int64 [N] in [0, size).
    """
    positions = np.asarray(positions, np.int64)
    _check(size, seed)
    if positions.size and positions.min() < 0:
        raise ValueError(f"positions must not be negative, got {positions.min()}")
    epochs, slots = np.divmod(positions, size)
    return epochs, permute(epochs, slots, size, seed)


def example_at(position: int, size: int, seed: int) -> tuple[int, int]:
    """Returns (epoch, index) of one global position; see `examples_at`."""
    epochs, indices = examples_at(np.array([position]), size, seed)
    return int(epochs[0]), int(indices[0])


def substitute_position(position: int, attempt: int, attempts: int, size: int) -> int:
    """Returns the position whose example replaces the one at `position` on the given attempt (1 ... attempts).

    It is in the same epoch, a multiple of about size / (attempts + 1) away: a neighbour would probably be in the same batch
    already and become a false negative in the contrastive loss.
    """
    epoch, slot = divmod(position, size)
    stride = max(1, size // (attempts + 1))
    return epoch * size + (slot + attempt * stride) % size
