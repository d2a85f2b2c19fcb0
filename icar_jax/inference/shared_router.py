"""Routing with shared blocks: the first blocks of the tower run once per image, and both the scorer and the tower use them.

Tokens stay on the device. Each exit has a device buffer of one full batch. The tokens of a batch are copied into the buffers
row by row, and a full buffer runs through the rest of the tower.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icar_jax.data.images import Preprocess
from icar_jax.inference.ahead import Programs
from icar_jax.inference.forward import PendingBatch, Placement, split_batch
from icar_jax.inference.router import SCORES_AHEAD, RoutingResult, RoutingRun, assign, check_thresholds
from icar_jax.models.clip import Clip
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.token_router import TokenRouter
from icar_jax.models.xla_options import jit_for_host

_HEADS = ("head", "pool", "head_blocks", "projection", "projection_width", "embed_dim")  # fields of a tower's heads


@dataclass
class SharedTower:
    """The jitted parts: `begin` maps pixels to (tokens, scores), `rest` maps tokens to embeddings; `put` fills buffers.

    Batches have the sizes `buckets`; the last one is a full batch.
    """

    clip: Graph[Clip]
    scorer: Graph[TokenRouter]
    clip_params: Any
    scorer_params: Any
    preprocess: Preprocess
    buckets: tuple[int, ...]
    dtype: Any  # of activations of both models
    placement: Placement = Placement()
    programs: Programs = Programs()
    _begin: Any = field(init=False, repr=False)
    _rest: dict[int, Any] = field(init=False, repr=False)
    _row: Tokens = field(init=False, repr=False)  # shapes and dtypes of an image's tokens

    def __post_init__(self):
        clip, p = self.clip, self.preprocess
        vision, own = clip.arch.vision, self.scorer.arch
        # What later heads read of these blocks is the CLIP's business: the scorer may come from a tower with other heads.
        heads = {name: getattr(vision, name) for name in _HEADS}
        arch = dataclasses.replace(own, vision=dataclasses.replace(own.vision, exits=(), **heads))
        scorer = TokenRouter.graph(arch, dtype=self.dtype)
        self.shape = (vision.tokens_after(scorer.arch.blocks), vision.width)

        def begin(params, pixels):
            tokens = scorer.tokens(params, normalise(pixels, p.mean, p.std))
            return tokens, scorer.score_of_tokens(params, tokens)

        vector = jax.ShapeDtypeStruct(self.shape[:1], jnp.float32)
        # Tokens that are dropped next come with scores.
        dropped = vision.reduce == "drop" and bool(sum(vision.schedule[scorer.arch.blocks - 1 : scorer.arch.blocks]))
        before = min(vision.head_blocks, scorer.arch.blocks) - 1
        pooled = jax.ShapeDtypeStruct((before, vision.parts, vision.width), self.dtype) if before else None
        tokens = jax.ShapeDtypeStruct(self.shape, self.dtype)
        row = self._row = Tokens(tokens, vector, vector if dropped else None, pooled)

        def rest(exit):
            run = lambda params, tokens: clip.encode_tokens(params, tokens, scorer.arch.blocks, exit)
            return jit_for_host(self.programs.use(f"from_{scorer.arch.blocks}_to_{exit}", run, self.clip_params, row))

        pixels = jax.ShapeDtypeStruct((p.image_size, p.image_size, 3), jnp.uint8)
        self._begin = jit_for_host(self.programs.use(f"to_{scorer.arch.blocks}", begin, self.scorer_params, pixels))
        self._rest = {exit: rest(exit) for exit in vision.all_exits}
        self._put = jax.jit(_put, donate_argnums=0, out_shardings=self.placement.rows)
        self._take = jax.jit(_take, static_argnums=2, out_shardings=self.placement.rows)

    def begin(self, pixels: np.ndarray) -> list[tuple[Tokens, jax.Array, int]]:
        """(tokens, scores, valid rows) of pixels uint8 [n, S, S, 3], for each piece of a static shape."""
        pieces = []
        for start, rows, bucket in split_batch(len(pixels), self.buckets):
            piece = pixels[start : start + rows]
            if rows < bucket:
                piece = np.concatenate([piece, np.zeros((bucket - rows, *piece.shape[1:]), piece.dtype)])
            pieces.append((*self._begin(self.scorer_params, self.placement.batch(piece)), rows))
        return pieces

    def buffer(self) -> Tokens:
        """An empty buffer for one full batch of tokens."""
        rows, place = self.buckets[-1], self.placement.rows
        return jax.tree.map(lambda row: jnp.ones((rows, *row.shape), row.dtype, device=place), self._row)

    def put(self, buffer: Tokens, tokens: Tokens, rows: Sequence[int], places: Sequence[int]) -> Tokens:
        """`buffer` with tokens[rows] written at `places`; the input buffer is donated."""
        source = np.full(self.buckets[-1], -1, np.int32)
        source[list(places)] = rows
        return self._put(buffer, tokens, source)

    def rest(self, exit: int, buffer: Tokens, rows: int) -> PendingBatch:
        """Dispatches the rest of the tower, up to `exit`, on the first `rows` rows of a buffer."""
        parts = []
        for start, n, bucket in split_batch(rows, self.buckets):
            parts.append((self._rest[exit](self.clip_params, self._piece(buffer, start, bucket)), n))
        return PendingBatch(parts)

    def warm_up(self) -> None:
        """Compiles every part at every batch shape."""
        side = self.preprocess.image_size
        for bucket in self.buckets:
            pixels = self.placement.batch(np.zeros((bucket, side, side, 3), np.uint8))
            tokens, _ = self._begin(self.scorer_params, pixels)
            buffer = self.put(self.buffer(), tokens, [0], [0])
            piece = self._piece(buffer, 0, bucket)
            jax.block_until_ready([rest(self.clip_params, piece) for rest in self._rest.values()])

    def _piece(self, buffer: Tokens, start: int, size: int) -> Tokens:
        return buffer if size == self.buckets[-1] else self._take(buffer, np.int32(start), size)


def _put(buffer: Tokens, tokens: Tokens, source: jax.Array) -> Tokens:
    # Gather and select: an XLA scatter is three times slower on a CPU.
    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        chosen = (source >= 0).reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(chosen, jnp.take(new, source, axis=0, mode="clip"), old)

    return jax.tree.map(put, buffer, tokens)


def _take(buffer: Tokens, start: jax.Array, size: int) -> Tokens:
    # Rows past the end repeat the last one as padding.
    return jax.tree.map(lambda rows: jnp.take(rows, start + jnp.arange(size), axis=0, mode="clip"), buffer)


@dataclass
class _Queue:
    """Images waiting for one exit: their tokens on the device and their positions in the input."""

    buffer: Tokens
    positions: list[int] = field(default_factory=list)


class SharedRouter:
    """Router for a complexity model that is a head on the tower's first blocks; the interface is that of `Router`.

    Args:
        tower: the jitted parts.
        thresholds: as for `assign`.
    """

    def __init__(self, tower: SharedTower, thresholds: Sequence[float]):
        self.exits = tower.clip.arch.vision.all_exits
        check_thresholds(self.exits, thresholds)
        self._tower = tower
        self.thresholds = tuple(float(t) for t in thresholds)

    def at(self, thresholds: Sequence[float]) -> SharedRouter:
        """The same router with other thresholds; shares all compiled programs."""
        return SharedRouter(self._tower, thresholds)

    def warm_up(self) -> None:
        """Compiles everything that routing runs."""
        self._tower.warm_up()

    def embed_batches(self, batches: Iterable[tuple[np.ndarray, Any]], embed_dim: int) -> RoutingResult:
        """RoutingResult of batches (tower pixels uint8 [n, S, S, 3], ignored), in input order."""
        tower, full = self._tower, self._tower.buckets[-1]
        queues: dict[int, _Queue] = {}
        seen = 0

        def send(exit: int) -> None:
            queue = queues[exit]
            run.submit_tower(exit, queue.positions, lambda: tower.rest(exit, queue.buffer, len(queue.positions)), tower.buckets)
            queue.positions = []

        def enqueue(tokens: Tokens, submitted: Future) -> None:
            nonlocal seen
            exits = assign(run.wait_scores(submitted), self.exits, self.thresholds)
            for exit in np.unique(exits).tolist():
                rows = np.flatnonzero(exits == exit).tolist()
                queue = queues.setdefault(exit, _Queue(tower.buffer()))
                while rows:
                    now, rows = rows[: full - len(queue.positions)], rows[full - len(queue.positions) :]
                    places = range(len(queue.positions), len(queue.positions) + len(now))
                    queue.buffer = tower.put(queue.buffer, tokens, now, places)
                    queue.positions += [seen + row for row in now]
                    if len(queue.positions) == full:
                        send(exit)
            seen += len(exits)

        with RoutingRun() as run:
            ahead: deque[tuple[Tokens, Future]] = deque()
            for pixels, _ in run.inputs(batches):
                for tokens, raw, rows in tower.begin(pixels) if len(pixels) else ():
                    ahead.append((tokens, run.add_scores(PendingBatch([(raw, rows)]), (len(raw),))))
                    if len(ahead) > SCORES_AHEAD:
                        enqueue(*ahead.popleft())
            while ahead:
                enqueue(*ahead.popleft())
            for exit, queue in queues.items():
                if queue.positions:
                    send(exit)
            return run.finish(embed_dim)
