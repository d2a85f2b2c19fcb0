"""Runs the blocks of a vision tower with token reduction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from icar_jax.models.reduction.dropping import class_attention, drop
from icar_jax.models.reduction.matching import complete_graph, mean_over_heads, pitome, tome
from icar_jax.models.reduction.merging import merge
from icar_jax.models.reduction.similar import merge_similar
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.transformer import placed, run_blocks, run_one
from icar_jax.models.vision_arch import VisionArch

Array = jax.Array


class _State(NamedTuple):
    """What one block changes, for remat."""

    tokens: Tokens
    scale: Array | None
    row: Array | None  # of the table of cross tokens


def append_cross(tokens: Tokens) -> Tokens:
    """Tokens of [B, L, W] -> Tokens of [B, L + 1, W]: the cross token starts as a copy of the class token."""
    x, sizes = tokens[:2]
    return Tokens(jnp.concatenate([x, x[:, :1]], axis=1), jnp.concatenate([sizes, sizes[:, :1]], axis=1))


def run_reduced(
    trunk: Any,
    tokens: Tokens,
    wanted: Iterable[int],
    start: int,
    scales: Array | None,
    arch: VisionArch,
    cross: list[Array] | None = None,
) -> dict[int, Tokens]:
    """Tokens of [B, L, W] after `start` blocks -> {executed blocks: Tokens} for each of `wanted`.

    Args:
        trunk: a module with `blocks`, `execution` and, for CrossGET, `cross`.
        scales: as of `transformer.run_blocks`.
        arch: the architecture, whose schedule is run.
        cross: receives the cross token [B, W] that goes into each block that runs (CrossGET).
    """
    wanted, taps = sorted(set(wanted)), dict[int, Tokens]()
    last, removed = wanted[-1], arch.removed
    count_in = lambda block: removed[block - 1] if 0 < block <= len(removed) else 0  # blocks count from 1 here
    alone = lambda block: arch.has_cross or (arch.merges_within and any(removed[:block]))
    done = start
    if done in wanted:
        taps[done] = tokens
    while done < last:
        if not arch.merges_within and (count := count_in(done)):
            tokens = merge_similar(tokens, count, arch.prefix) if arch.merge else drop(tokens, count, arch.prefix)
        scores = arch.reduce == "drop" and bool(count_in(done + 1))
        if alone(done + 1) or scores:
            tokens = _one_block(trunk, tokens, done, scales, arch, 0 if scores else count_in(done + 1), cross)
            done += 1
            if done in wanted:
                taps[done] = tokens
            continue
        stop = done + 1  # the blocks up to `stop` need nothing but x, and may run in a loop
        while stop < last and not alone(stop + 1) and (arch.merges_within or not count_in(stop)):
            if arch.reduce == "drop" and count_in(stop + 1):
                break
            stop += 1
        reads = [e for e in wanted if done < e <= stop]
        found = run_blocks(trunk.blocks, tokens.values, {*reads, stop}, execution=trunk.execution, start=done, scales=scales)
        taps |= {e: Tokens(found[e], tokens.sizes) for e in reads}
        tokens, done = Tokens(found[stop], tokens.sizes), stop
    return {e: taps[e] for e in wanted}


def log_sizes(tokens: Tokens, arch: VisionArch) -> Array | None:
    """float32 [B, L], the bias of keys in proportional attention; None where attention is not proportional."""
    return jnp.log(tokens.sizes) if arch.proportional and arch.merges_within else None


def _one_block(
    trunk: Any, tokens: Tokens, index: int, scales: Array | None, arch: VisionArch, count: int, cross: list[Array] | None
) -> Tokens:
    """Runs block `index`, counted from 0, and removes `count` tokens in it."""
    execution = trunk.execution
    merged = any(arch.removed[:index])

    def call(block: Any, state: _State) -> tuple[Tokens, Array | None]:
        x, sizes = state.tokens[:2]
        x, token = placed(x, execution), None
        if state.row is not None:
            token = jax.lax.stop_gradient(x[:, -1]) + state.row.astype(x.dtype)[None]
            x = jnp.concatenate([x[:, :-1], token[:, None]], axis=1)

        def reduce(x: Array, q: Array, k: Array) -> tuple[Array, tuple[Array, Array | None]]:
            if arch.reduce == "drop":
                return x, (sizes, class_attention(q, k, block.attn.heads))
            x, fewer = reduce_image(x, sizes, q, k, count, arch)
            return x, (fewer, None)

        bias = log_sizes(state.tokens, arch) if merged else None
        x, (sizes, scores) = block.reduced(x, reduce, state.scale, bias)
        return Tokens(placed(x, execution), sizes, scores), token

    row = trunk.cross[index] if arch.has_cross else None
    state = _State(Tokens(*tokens[:2]), None if scales is None else scales[:, index], row)
    made, token = run_one(trunk.blocks[index], index, call, state, execution)
    if cross is not None and token is not None:
        cross.append(token)
    return made


def reduce_image(x: Array, sizes: Array, q: Array, k: Array, count: int, arch: VisionArch) -> tuple[Array, Array]:
    """x, queries and keys [B, N, W], sizes float32 [B, N] -> x and sizes of N - count tokens, by the method of `arch`."""
    if not count:
        return x, sizes
    if arch.has_cross:
        place = jnp.arange(x.shape[1])
        never = ((place < arch.protected) | (place == x.shape[1] - 1))[None]
        matching, importance = complete_graph(k, q[:, -1], count, never)
        return merge(x, sizes, matching, count, importance)
    method = {"tome": tome, "pitome": pitome}[arch.reduce]
    return merge(x, sizes, method(mean_over_heads(k, arch.heads), count, arch.protected), count)
