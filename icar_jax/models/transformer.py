"""The pre-norm transformer block of both towers, how a row of them runs, and the attention pool of SigLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from icar_jax.models import ops
from icar_jax.models.layers import ACTIVATIONS, DType, LayerNorm, Linear, normal

Array = jax.Array
REMAT = ("none", "dots", "full")
# Outputs of a block's matrix products with weights, as they are named for remat. The last product is not among them: the
# backward pass of a block does not need its output.
_PRODUCTS = ("qkv", "attn_out", "mlp_hidden")


@dataclass(frozen=True)
class Execution:
    """How and where the blocks of a tower run, which changes no value.

    `remat` is what the backward pass computes again: 'none', 'full' (whole blocks: each stores its input alone), or 'dots' (all
    but the matrix products with weights; the attention weights are computed again). `scan` stacks the parameters of equal
    blocks, matrices in the compute dtype, and runs one compiled block in a loop. `sharding` lays out x [B, L, W] between
    blocks: where a mesh axis cuts the parameters and the batch, the compiler would else cut the width of x with it in a loop.
    """

    remat: str = "none"  # none | dots | full
    scan: bool = False
    sharding: jax.sharding.NamedSharding | None = None

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} must be one of {REMAT}")


class Attention(nnx.Module):
    """Multi-head self-attention; x [B, L, W] -> [B, L, W]. One projection holds q, k, v in that order."""

    def __init__(self, width: int, heads: int, depth: int, *, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.qkv = Linear(width, 3 * width, std=width**-0.5, rngs=rngs)
        self.out = Linear(width, width, std=(2 * depth * width) ** -0.5, rngs=rngs)

    def __call__(self, x: Array, *, causal: bool, dtype: DType) -> Array:
        b, length, width = x.shape
        qkv = checkpoint_name(self.qkv(x, dtype), "qkv")
        # split, not slices: its gradient is one concatenation, where slices give padded arrays to be added.
        heads = (b, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        y = ops.attention(q, k, v, causal=causal, dtype=dtype)
        return checkpoint_name(self.out(y.reshape(b, length, width), dtype), "attn_out")

    def read(self, query: Array, x: Array, *, dtype: DType) -> Array:
        """Cross-attention with the same parameters: query [B, M, W] over x [B, L, W] -> [B, M, W]."""
        b, asked, width = query.shape
        size = (self.heads, width // self.heads)
        kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
        q = ops.linear(query, kernel[:, :width], bias[:width], dtype=dtype).reshape(b, asked, *size)
        kv = ops.linear(x, kernel[:, width:], bias[width:], dtype=dtype)
        k, v = (part.reshape(b, -1, *size) for part in jnp.split(kv, 2, axis=-1))
        return self.out(ops.attention(q, k, v, dtype=dtype).reshape(b, asked, width), dtype)


class Mlp(nnx.Module):
    """Two linear maps with an activation between; x [B, L, W] -> [B, L, W]."""

    def __init__(self, width: int, hidden: int, depth: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = Linear(width, hidden, std=(2 * width) ** -0.5, rngs=rngs)
        self.fc2 = Linear(hidden, width, std=(2 * depth * width) ** -0.5, rngs=rngs)

    def __call__(self, x: Array, dtype: DType) -> Array:
        hidden = checkpoint_name(self.fc1(x, dtype), "mlp_hidden")
        return self.fc2(ACTIVATIONS[self.activation](hidden), dtype)


class Block(nnx.Module):
    """x + attn(ln1(x)), then x + mlp(ln2(x)); x [B, L, W] in the compute dtype."""

    def __init__(
        self, width: int, heads: int, hidden: int, depth: int, activation: str, eps: float, *, rngs: nnx.Rngs
    ):
        self.ln1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads, depth, rngs=rngs)
        self.ln2 = LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, depth, activation, rngs=rngs)

    def __call__(self, x: Array, scale: Array | None = None, *, causal: bool, dtype: DType) -> Array:
        """`scale` float32 [B] multiplies both residuals of each image; at 0 the image passes the block unchanged."""
        x = x + _scaled(self.attn(self.ln1(x), causal=causal, dtype=dtype), scale)
        return x + _scaled(self.mlp(self.ln2(x), dtype), scale)


def _scaled(residual: Array, scale: Array | None) -> Array:
    return residual if scale is None else (scale[:, None, None] * residual).astype(residual.dtype)


def block_scales(key: Array, batch: int, depth: int, dropout: float) -> Array:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382), one draw an image and block -> float32 [batch, depth].

    Block i of n skips an image with the chance p = dropout i / (n - 1), which grows with depth as LayerSkip's does (Elhoushi et
    al. 2024, arXiv:2404.16710): 0 for the first block, `dropout` for the last. What is kept is scaled by 1 / (1 - p), so that
    the mean of a residual over the draws is the residual of a tower that drops nothing, and inference needs no change.
    """
    chance = dropout * jnp.arange(depth) / max(depth - 1, 1)
    return jnp.where(jax.random.uniform(key, (batch, depth)) < chance, 0.0, 1 / (1 - chance))


def run_blocks(
    blocks: Sequence[Block],
    x: Array,
    wanted: Iterable[int],
    *,
    causal: bool,
    dtype: DType,
    execution: Execution,
    start: int = 0,
    scales: Array | None = None,
) -> dict[int, Array]:
    """x [B, L, W] through the first max(wanted) blocks -> {executed blocks: [B, L, W] after them} for each of `wanted`.

    `start` blocks have been executed already, and none of `wanted` lies before. `scales` float32 [B, blocks] multiplies the
    residuals of each image in each block; None leaves them as they are.
    """
    taps = {}
    for stop in sorted(set(wanted)):
        own = None if scales is None else scales[:, start:stop].T
        x = taps[stop] = _run(blocks[start:stop], x, own, causal=causal, dtype=dtype, execution=execution)
        start = stop
    return taps


def _run(
    blocks: Sequence[Block], x: Array, scales: Array | None, *, causal: bool, dtype: DType, execution: Execution
) -> Array:
    """x through all of these blocks; scales [blocks, B]."""
    if not blocks:
        return x
    split = [nnx.split(block) for block in blocks]
    graph = split[0][0]
    params = [nnx.to_pure_dict(state) for _, state in split]
    scan = execution.scan and len(blocks) > 1
    place = lambda x: x if execution.sharding is None else jax.lax.with_sharding_constraint(x, execution.sharding)
    block = lambda x, p, scale: place(nnx.merge(graph, p)(place(x), scale, causal=causal, dtype=dtype))
    one = _rematerialised(block, execution.remat, scan)
    if not scan:
        for i, p in enumerate(params):
            x = one(x, p, None if scales is None else scales[i])
        return x
    # Matrices are cast before they are stacked: the stack is a copy, and the blocks would cast them in any case.
    cast = lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf
    stacked = jax.tree.map(lambda *leaves: jnp.stack([cast(leaf) for leaf in leaves]), *params)
    return jax.lax.scan(lambda x, each: (one(x, *each), None), x, (stacked, scales))[0]


def _rematerialised(block: Callable, remat: str, in_loop: bool) -> Callable:
    if remat == "none":
        return block
    # By name, because policies that look for matrix products do not see into the custom_vjp of `ops.dot`; and what is named is
    # stored in the compute dtype, where the product itself is float32.
    policy = jax.checkpoint_policies.save_only_these_names(*_PRODUCTS) if remat == "dots" else None
    return jax.checkpoint(block, policy=policy, prevent_cse=not in_loop)


class AttentionPool(nnx.Module):
    """One learned query (the probe) attends to all tokens, then a residual MLP; x [B, L, W] -> [B, W]."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float, *, rngs: nnx.Rngs):
        self.probe = normal(rngs, (width,), width**-0.5)
        self.attn = Attention(width, heads, 1, rngs=rngs)
        self.ln = LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, 1, activation, rngs=rngs)

    def __call__(self, x: Array, dtype: DType) -> Array:
        y = self.attn.read(jnp.broadcast_to(self.probe[...], (x.shape[0], 1, x.shape[2])), x, dtype=dtype)
        return (y + self.mlp(self.ln(y), dtype))[:, 0]
