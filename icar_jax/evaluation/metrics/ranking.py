"""Exact ranking in a gallery sharded over devices; the score matrix exists for one chunk of queries at a time.

Items are ordered by descending score; ties are ordered by ascending position. Scores are float32 dot products for any embedding
dtype. The target's score is read from the same matrix product as all other scores, so rounding cannot separate equal vectors.

A position is an index into the concatenated parts of the gallery. With distractors in the first part, every tie with a
distractor counts against the item, so an encoder that maps all inputs to one point gains nothing. A group of n tied items
takes the ranks 1 to n, whose mean is the average rank if all of them are queried.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from icar_jax.errors import ModelError

SCORE_BYTES = 512 << 20  # bytes of scores per device at a time
_MOST_QUERIES = 1024  # queries per chunk; larger chunks do not improve utilisation
_BAR_DELAY_S = 3.0  # seconds before a progress bar is shown
_CHECK_ROWS = 4096  # embeddings checked at a time


def one_device() -> Mesh:
    """Returns a mesh of this process's first device."""
    return _mesh_of(tuple(jax.local_devices()[:1]))


def local_mesh() -> Mesh:
    """Returns a mesh of all devices of this process."""
    return _mesh_of(tuple(jax.local_devices()))


class Ranker:
    """A gallery [G, D] whose rows are sharded over all axes of a mesh.

    parts: floating-point embeddings [G_i, D], concatenated. If all parts are bfloat16 they stay bfloat16 on the devices; with
        bfloat16 queries, products are then exact and accumulated in float32. Any other dtype is stored as float32.
    mesh: None uses one device. Peak memory per device is its shard of the gallery plus `SCORE_BYTES`.
    query_chunk: queries scored at a time; None uses as many as `SCORE_BYTES` allow.

    Raises ValueError for query_chunk < 1.
    """

    def __init__(self, parts: Sequence[np.ndarray], *, mesh: Mesh | None = None, query_chunk: int | None = None):
        if query_chunk is not None and query_chunk < 1:
            raise ValueError(f"query_chunk must be at least 1, found {query_chunk}")
        self.mesh = one_device() if mesh is None else mesh
        parts = [np.asarray(part) for part in parts]
        self.size = sum(map(len, parts))
        half = all(part.dtype == jnp.bfloat16 for part in parts)
        rows = _bucket(-(-self.size // self.mesh.size))
        shape = (rows * self.mesh.size, parts[0].shape[1])
        place = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        dtype = np.dtype(jnp.bfloat16 if half else np.float32)
        self._gallery = jax.make_array_from_callback(shape, place, lambda index: _block(parts, index[0], shape, dtype))
        fitting = max(1, SCORE_BYTES // (4 * rows))
        self._chunk = query_chunk or min(_MOST_QUERIES, 1 << (fitting.bit_length() - 1))

    def ranks(self, queries: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Returns int64 [Q]: for each query, the 1-based rank of its best-scoring target.

        queries: [Q, D]; own: [Q, C] positions of the targets, at least one per row, padded with -1.
        """
        own = _padded_columns(np.asarray(own, np.int32))
        return self._run(_ranks_program(self.mesh), queries, (own, -1)) + 1

    def ranks_of_scores(self, queries: np.ndarray, scores: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Returns int64 [Q]: the 1-based rank of each query's target if it had the given score instead of its own.

        scores: [Q] float32; position: [Q] of the target, whose gallery entry is excluded.
        """
        arguments = (np.asarray(scores, np.float32), 0), (np.asarray(position, np.int32), 0)
        return self._run(_given_program(self.mesh), queries, *arguments) + 1

    def best(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Returns int64 [Q, min(k, G)]: positions of the top k items of each query, in order."""
        return self._run(_best_program(self.mesh, min(k, self.size)), queries)

    def _run(self, program, queries: np.ndarray, *arguments: tuple[np.ndarray, int]) -> np.ndarray:
        return _in_chunks(program, self._gallery, self.size, self._chunk, queries, *arguments)


def mixed_ranks(rankers: Sequence[Ranker], queries: np.ndarray, own: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Returns int64 [Q, S]: the 1-based rank of each query's target in S mixed galleries.

    rankers: E galleries of one size on one mesh, one per exit; own: [Q] position of the query's target.
    choice: [S, G] integers in [0, E): the gallery (exit) that each item's embedding is taken from.

    The scores of the E galleries are computed once for all mixtures. For each pair of exits, a 0/1 matrix marks the items at
    exit e that rank before the target at exit f; its product with the one-hot choices counts them for all S mixtures at once.
    S mixtures cost about E + E * E * S / D rankings of width D: 2.5 for 100 mixtures of two exits at D = 768.
    Raises ValueError for galleries or choices that do not match.
    """
    first = rankers[0]
    if any((r.size, r.mesh, r._gallery.shape) != (first.size, first.mesh, first._gallery.shape) for r in rankers):
        raise ValueError("mixed galleries must have the same images on the same mesh")
    if choice.shape[1:] != (first.size,) or choice.min() < 0 or choice.max() >= len(rankers):
        raise ValueError(f"choice must be [mixtures, {first.size}] integers in [0, {len(rankers)}), found shape {choice.shape}")
    columns = np.ascontiguousarray(choice.T, np.int8)
    shape = (first._gallery.shape[0], len(choice))
    place = first._gallery.sharding
    chosen = jax.make_array_from_callback(shape, place, lambda index: _block([columns], index[0], shape, np.dtype(np.int8)))
    galleries = tuple(ranker._gallery for ranker in rankers)
    chunk = max(1, first._chunk // len(rankers))
    program = _mixed_program(first.mesh, len(rankers))
    return _in_chunks(program, (galleries, chosen), first.size, chunk, queries, (np.asarray(own, np.int32), 0)) + 1


def _in_chunks(program, gallery, size: int, chunk: int, queries: np.ndarray, *arguments: tuple[np.ndarray, int]) -> np.ndarray:
    """Runs the program on query chunks of one size; each argument is paired with the value that pads its rows."""
    queries = np.asarray(queries)
    if queries.dtype != jnp.bfloat16 or any(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gallery)):
        queries = queries.astype(np.float32, copy=False)
    rows = min(chunk, _bucket(len(queries)))
    parts = []
    for start in tqdm(range(0, len(queries), rows), desc="rank", unit="chunk", delay=_BAR_DELAY_S, leave=False):
        cut = slice(start, start + rows)
        filled = [_padded_rows(a[cut], rows, fill) for a, fill in ((queries, 0), *arguments)]
        found = program(filled[0], gallery, np.int32(size), *filled[1:])
        parts.append(np.asarray(found, np.int64)[: len(queries[cut])])
    return np.concatenate(parts)


def require_finite(name: str, array: np.ndarray) -> None:
    """Raises ModelError if a row of array [N, D] is not finite, or so large that a dot product could overflow float32."""
    bad: list[int] = []
    for start in range(0, len(array), _CHECK_ROWS):
        # A finite squared norm implies no NaN, no inf, and no overflow in dot products.
        with np.errstate(over="ignore", invalid="ignore"):
            block = array[start : start + _CHECK_ROWS].astype(np.float32)
            finite = np.isfinite(np.einsum("nd,nd->n", block, block))
        bad += (start + np.flatnonzero(~finite)).tolist()
    if bad:
        raise ModelError(
            f"{name}: {len(bad)} of {len(array)} rows hold NaN, inf or values too large for float32 (first: row "
            f"{bad[0]}), so they cannot be ranked; check the checkpoint and the inputs of these rows"
        )


@functools.lru_cache
def _mesh_of(devices: tuple) -> Mesh:
    return jax.make_mesh((len(devices),), ("gallery",), axis_types=(AxisType.Auto,), devices=list(devices))


def _bucket(rows: int) -> int:
    """Rounds a size up to a power of two, or to a multiple of 4096 above that, so that few programs are compiled."""
    return 1 << max(6, (rows - 1).bit_length()) if rows < 4096 else -(-rows // 4096) * 4096


def _block(parts: Sequence[np.ndarray], rows: slice, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Returns rows [start:stop] of the concatenated parts, zero-padded."""
    start, stop, _ = rows.indices(shape[0])
    block = np.zeros((stop - start, shape[1]), dtype)
    begin = 0
    for part in parts:
        low, high = max(start, begin), min(stop, begin + len(part))
        if low < high:
            block[low - start : high - start] = part[low - begin : high - begin]
        begin += len(part)
    return block


def _padded_rows(array: np.ndarray, rows: int, fill: int) -> np.ndarray:
    if len(array) == rows:
        return array
    padded = np.full((rows, *array.shape[1:]), fill, array.dtype)
    padded[: len(array)] = array
    return padded


def _padded_columns(own: np.ndarray) -> np.ndarray:
    """Pads [Q, C] to a power of two, so that galleries with 5 and with 7 captions per image share a program."""
    columns = 1 << (own.shape[1] - 1).bit_length()
    return np.pad(own, ((0, 0), (0, columns - own.shape[1])), constant_values=-1)


def _scores(queries: jax.Array, gallery: jax.Array) -> jax.Array:
    """[Q, D] x [g, D] -> [Q, g] float32; 'highest' stops accelerators from reducing the precision of float32 operands."""
    contract = (((1,), (1,)), ((), ()))
    if queries.dtype != gallery.dtype:
        gallery = gallery.astype(queries.dtype)  # float32 queries
    return jax.lax.dot_general(queries, gallery, contract, precision="highest", preferred_element_type=jnp.float32)


def _columns(gallery: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns int32 [g]: positions of the rows of this device's shard."""
    return jax.lax.axis_index(axes) * gallery.shape[0] + jnp.arange(gallery.shape[0], dtype=jnp.int32)


def _places(own: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Converts positions `own` to rows of this device's shard (clipped), and whether they are in this shard."""
    place = own - columns[0]
    return jnp.clip(place, 0, len(columns) - 1), (own >= 0) & (place >= 0) & (place < len(columns))


def _count(scores: jax.Array, columns: jax.Array, score: jax.Array, target: jax.Array, counted: jax.Array) -> jax.Array:
    """Returns int32 [Q]: items of this device's shard that rank before an item with `score` [Q] at position `target` [Q]."""
    score, target = score[:, None], target[:, None]
    before = (scores > score) | ((scores == score) & (columns < target))
    return jnp.sum(before & counted, axis=1, dtype=jnp.int32)


def _sharded(mesh: Mesh, local, replicated: int, out: PartitionSpec):
    """Maps `local(queries, gallery, size, ...)` over gallery shards; all other arguments are replicated."""
    whole = PartitionSpec()
    specs = (whole, PartitionSpec(mesh.axis_names), *(whole,) * replicated)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)


@functools.lru_cache
def _ranks_program(mesh: Mesh):
    axes = mesh.axis_names

    def local(queries, gallery, size, own):
        scores, columns = _scores(queries, gallery), _columns(gallery, axes)
        place, here = _places(own, columns)
        own_scores = jnp.where(here, jnp.take_along_axis(scores, place, axis=1), -jnp.inf)
        best = jax.lax.pmax(own_scores.max(axis=1), axes)
        # Among equally good targets, the one at the lowest position counts.
        first = jnp.where(here & (own_scores == best[:, None]), own, jnp.iinfo(jnp.int32).max)
        target = jax.lax.pmin(first.min(axis=1), axes)
        return jax.lax.psum(_count(scores, columns, best, target, columns < size), axes)

    return jax.jit(_sharded(mesh, local, 2, PartitionSpec()))


@functools.lru_cache
def _given_program(mesh: Mesh):
    axes = mesh.axis_names

    def local(queries, gallery, size, score, position):
        scores, columns = _scores(queries, gallery), _columns(gallery, axes)
        counted = (columns < size) & (columns != position[:, None])
        return jax.lax.psum(_count(scores, columns, score, position, counted), axes)

    return jax.jit(_sharded(mesh, local, 3, PartitionSpec()))


@functools.lru_cache
def _mixed_program(mesh: Mesh, exits: int):
    axes = mesh.axis_names

    def local(queries, shares, size, own):
        galleries, choice = shares  # [g, D] each, [g, S]
        columns = _columns(choice, axes)
        place, here = _places(own, columns)
        scores = [_scores(queries, gallery) for gallery in galleries]
        own_choice = jax.lax.psum(jnp.where(here[:, None], choice[place], 0), axes)  # [Q, S]
        earlier = columns < own[:, None]
        counts = jnp.zeros(own_choice.shape, jnp.float32)
        for mine in range(exits):
            score = jnp.where(here, jnp.take_along_axis(scores[mine], place[:, None], axis=1)[:, 0], -jnp.inf)
            score = jax.lax.pmax(score, axes)[:, None]
            found = jnp.zeros(own_choice.shape, jnp.float32)
            for other in range(exits):
                before = (scores[other] > score) | ((scores[other] == score) & earlier)
                taken = (choice == other) & (columns < size)[:, None]
                # Zeros and ones are exact in bfloat16; their float32 sums are exact up to 16 million items.
                found += jnp.dot(before.astype(jnp.bfloat16), taken.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
            counts = jnp.where(own_choice == mine, jax.lax.psum(found, axes), counts)
        return counts.astype(jnp.int32)

    return jax.jit(_sharded(mesh, local, 2, PartitionSpec()))


@functools.lru_cache
def _best_program(mesh: Mesh, k: int):
    axes = mesh.axis_names

    def local(queries, gallery, size):
        columns = _columns(gallery, axes)
        scores = _scores(queries, gallery)
        scores = jnp.where(scores == 0, 0.0, scores)  # top_k would put 0.0 before -0.0
        scores = jnp.where(columns < size, scores, -jnp.inf)
        values, places = jax.lax.top_k(scores, min(k, len(columns)))  # ties: lower position first
        return values, columns[places]

    share = _sharded(mesh, local, 1, (PartitionSpec(None, axes),) * 2)

    def program(queries, gallery, size):
        # The devices' lists are in shard order, so ties still go to the lower position.
        values, positions = share(queries, gallery, size)
        return jnp.take_along_axis(positions, jax.lax.top_k(values, k)[1], axis=1)

    return jax.jit(program)
