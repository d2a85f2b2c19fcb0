"""The pre-norm transformer block of both towers, and the attention pool that SigLIP reads its images with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models import ops
from icar_jax.models.layers import ACTIVATIONS, DType, LayerNorm, Linear, normal

Array = jax.Array


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
        # split, not slices: its gradient is one concatenation, where slices give padded arrays to be added.
        heads = (b, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x, dtype), 3, axis=-1))
        y = ops.attention(q, k, v, causal=causal, dtype=dtype)
        return self.out(y.reshape(b, length, width), dtype)

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
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x, dtype)), dtype)


class Block(nnx.Module):
    """x + attn(ln1(x)), then x + mlp(ln2(x)); x [B, L, W] in the compute dtype."""

    def __init__(
        self, width: int, heads: int, hidden: int, depth: int, activation: str, eps: float, *, rngs: nnx.Rngs
    ):
        self.ln1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads, depth, rngs=rngs)
        self.ln2 = LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, depth, activation, rngs=rngs)

    def __call__(self, x: Array, *, causal: bool, dtype: DType) -> Array:
        x = x + self.attn(self.ln1(x), causal=causal, dtype=dtype)
        return x + self.mlp(self.ln2(x), dtype)


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
