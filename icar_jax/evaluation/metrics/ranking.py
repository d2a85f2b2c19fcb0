"""Ranks and best items in a gallery that lies on the devices; scores exist for one chunk of queries at a time.

The order of a gallery is by falling score, equal scores by position, the lower one first. Scores are float32 dot products
whatever the embeddings are held in, and the target's score is read from the same product as its rivals', so that rounding
never separates equal vectors that the product treats alike.

Positions are those of the gallery's parts laid end to end. Who puts distractors into the first part therefore lets every
tie with a distractor count against the item: an encoder that maps all inputs to one point gains nothing from them, and
among the items themselves a group of n ties shares out the ranks 1 to n, which is the average rank if all are asked for.
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

SCORE_BYTES = 512 << 20  # of the scores that one device holds at a time
_MOST_QUERIES = 1024  # in a chunk: more fill no device better
_BAR_DELAY_S = 3.0  # seconds before a progress bar is shown
_CHECK_ROWS = 4096  # embeddings checked at a time


def one_device() -> Mesh:
    """A mesh of this process's first device."""
    return _mesh_of(tuple(jax.local_devices()[:1]))


def local_mesh() -> Mesh:
    """A mesh of all devices of this process."""
    return _mesh_of(tuple(jax.local_devices()))


class Ranker:
    """A gallery [G, D] on the devices of a mesh, its rows dealt out over all of the mesh's axes.

    parts: embeddings [G_i, D], floating point, laid end to end. Parts that are all bfloat16 stay so on the devices, and meet
        bfloat16 queries in bfloat16 products with float32 sums (the exact products); anything else is held in float32.
    mesh: None takes one device. Peak memory of a device is its share of the gallery and `SCORE_BYTES`.
    query_chunk: queries scored at a time; None takes as many as `SCORE_BYTES` allow.

    Raises ValueError for parts that are empty, not finite or of different widths.
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
        """int64 [Q]: the 1-based rank of the best of each query's own items.

        queries: [Q, D]; own: [Q, C] positions in the gallery, at least one a row, -1 where a query has fewer than C.
        """
        own = _padded_columns(np.asarray(own, np.int32))
        return self._run(_ranks_program(self.mesh), queries, (own, -1)) + 1

    def ranks_of_scores(self, queries: np.ndarray, scores: np.ndarray, position: np.ndarray) -> np.ndarray:
        """int64 [Q]: the rank a query's item would have with another score than it has in the gallery.

        scores: [Q] float32; position: [Q] of the item, whose own entry in the gallery does not count.
        """
        arguments = (np.asarray(scores, np.float32), 0), (np.asarray(position, np.int32), 0)
        return self._run(_given_program(self.mesh), queries, *arguments) + 1

    def best(self, queries: np.ndarray, k: int) -> np.ndarray:
        """int64 [Q, min(k, G)]: positions of the first k items of each query, in order."""
        return self._run(_best_program(self.mesh, min(k, self.size)), queries)

    def _run(self, program, queries: np.ndarray, *arguments: tuple[np.ndarray, int]) -> np.ndarray:
        return _in_chunks(program, self._gallery, self.size, self._chunk, queries, *arguments)


def mixed_ranks(rankers: Sequence[Ranker], queries: np.ndarray, own: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """int64 [Q, S]: the rank of each query's item in S galleries, each of which mixes the rows of several.

    rankers: E galleries of one size on one mesh; own: [Q] position of the query's item.
    choice: [S, G] integers in [0, E): which of the E embeddings an item has in the mixed gallery.

    The scores of the E galleries are formed once, not for each mixture: whether a rival in its embedding e comes before the
    item in its embedding f is a matrix of zeros and ones, and times the choices it counts for all S mixtures at a time. S
    mixtures so cost about E + E * E * S / D rankings, where D is the width: 2.5 for 100 mixtures of two exits at 768.
    """
    first = rankers[0]
    if any((r.size, r.mesh, r._gallery.shape) != (first.size, first.mesh, first._gallery.shape) for r in rankers):
        raise ValueError("galleries that are mixed must have the same images, on the same mesh")
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
    """The program over chunks of one size; each argument comes with what fills its rows up."""
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
    """Raises ModelError where a row is not finite, or so large that a dot product could overflow float32."""
    bad: list[int] = []
    for start in range(0, len(array), _CHECK_ROWS):
        # A finite squared norm proves at once: no NaN, no inf, and no dot product that can overflow.
        with np.errstate(over="ignore", invalid="ignore"):
            block = array[start : start + _CHECK_ROWS].astype(np.float32)
            finite = np.isfinite(np.einsum("nd,nd->n", block, block))
        bad += (start + np.flatnonzero(~finite)).tolist()
    if bad:
        raise ModelError(
            f"{name}: {len(bad)} of {len(array)} rows hold NaN, inf or values too large for float32 (first: row "
            f"{bad[0]}). Check the checkpoint and the inputs of these rows; a rank over them would mean nothing"
        )


@functools.lru_cache
def _mesh_of(devices: tuple) -> Mesh:
    return jax.make_mesh((len(devices),), ("gallery",), axis_types=(AxisType.Auto,), devices=list(devices))


def _bucket(rows: int) -> int:
    """A length that few galleries differ in, so that few programs are compiled: a power of two, from 4096 a multiple of it."""
    return 1 << max(6, (rows - 1).bit_length()) if rows < 4096 else -(-rows // 4096) * 4096


def _block(parts: Sequence[np.ndarray], rows: slice, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Rows [start:stop] of the parts laid end to end, zero beyond them."""
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
    """[Q, C] with C a power of two: one program for galleries of 5 and of 7 captions an image."""
    columns = 1 << (own.shape[1] - 1).bit_length()
    return np.pad(own, ((0, 0), (0, columns - own.shape[1])), constant_values=-1)


def _scores(queries: jax.Array, gallery: jax.Array) -> jax.Array:
    """[Q, D] x [g, D] -> [Q, g] float32; 'highest' keeps accelerators from rounding float32 operands to less."""
    contract = (((1,), (1,)), ((), ()))
    if queries.dtype != gallery.dtype:
        gallery = gallery.astype(queries.dtype)  # float32 queries
    return jax.lax.dot_general(queries, gallery, contract, precision="highest", preferred_element_type=jnp.float32)


def _columns(gallery: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Positions [g] int32 of the rows of this device's share."""
    return jax.lax.axis_index(axes) * gallery.shape[0] + jnp.arange(gallery.shape[0], dtype=jnp.int32)


def _places(own: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of this device's share that positions `own` are at, and whether they are in it at all."""
    place = own - columns[0]
    return jnp.clip(place, 0, len(columns) - 1), (own >= 0) & (place >= 0) & (place < len(columns))


def _count(scores: jax.Array, columns: jax.Array, score: jax.Array, target: jax.Array, counted: jax.Array) -> jax.Array:
    """[Q] items of this device's share that come before an item of this score [Q] at position `target` [Q]."""
    score, target = score[:, None], target[:, None]
    before = (scores > score) | ((scores == score) & (columns < target))
    return jnp.sum(before & counted, axis=1, dtype=jnp.int32)


def _sharded(mesh: Mesh, local, replicated: int, out: PartitionSpec):
    """`local(queries, gallery, size, ...)` on every device's share of the gallery (or galleries), all else whole."""
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
        # Of equally good own items the one at the lowest position is the target.
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
            for rival in range(exits):
                before = (scores[rival] > score) | ((scores[rival] == score) & earlier)
                taken = (choice == rival) & (columns < size)[:, None]
                # Zeros and ones are exact in bfloat16, and so are their sums in float32 up to 16 million items.
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
        values, places = jax.lax.top_k(scores, min(k, len(columns)))  # of equal scores the lower position comes first
        return values, columns[places]

    share = _sharded(mesh, local, 1, (PartitionSpec(None, axes),) * 2)

    def program(queries, gallery, size):
        # The devices' lists stand in the order of their shares, so that ties still fall to the lower position.
        values, positions = share(queries, gallery, size)
        return jnp.take_along_axis(positions, jax.lax.top_k(values, k)[1], axis=1)

    return jax.jit(program)
