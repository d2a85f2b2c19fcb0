"""Text transformer: causal and pooled at the end token (CLIP), or bidirectional and pooled at the last place (SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models.layers import DType, LayerNorm, Linear, normal
from icar_jax.models.transformer import Block, Execution, run_blocks

Array = jax.Array
POOLS = ("end", "argmax", "last")


@dataclass(frozen=True)
class TextArch:
    """Shape of a text tower, and which token it pools.

    `pool`: 'end' takes the first `end_id`; 'argmax' the highest id, which is the same where the end token has it; 'last' the
    last place, whatever stands there.
    """

    context_length: int
    vocabulary: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    embed_dim: int
    activation: str = "gelu"
    end_id: int = 49407
    pool: str = "end"  # end | argmax | last
    causal: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.pool not in POOLS:
            raise ValueError(f"text pool {self.pool!r} must be one of {POOLS}")
        if not 0 <= self.end_id < self.vocabulary:
            raise ValueError(f"end token {self.end_id} lies outside the vocabulary of {self.vocabulary}")


class Text(nnx.Module):
    """tokens int32 [B, L] -> [B, D] before normalisation, float32."""

    def __init__(self, arch: TextArch, *, rngs: nnx.Rngs):
        a = arch
        self.arch = arch
        self.embed = normal(rngs, (a.vocabulary, a.width), 0.02)
        self.pos = normal(rngs, (a.context_length, a.width), 0.01)
        self.blocks = nnx.List(
            [Block(a.width, a.heads, a.mlp_width, a.depth, a.activation, a.norm_eps, rngs=rngs) for _ in range(a.depth)]
        )
        self.ln_final = LayerNorm(a.width, a.norm_eps)
        self.proj = Linear(a.width, a.embed_dim, std=a.width**-0.5, bias=a.proj_bias, rngs=rngs)

    def __call__(self, tokens: Array, dtype: DType, execution: Execution = Execution()) -> Array:
        length = tokens.shape[1]
        x = (self.embed[...][tokens] + self.pos[...][:length]).astype(dtype)
        depth = self.arch.depth
        x = run_blocks(self.blocks, x, (depth,), causal=self.arch.causal, dtype=dtype, execution=execution)[depth]
        return self.proj(self.ln_final(self._pool(x, tokens)), dtype).astype(jnp.float32)

    def _pool(self, x: Array, tokens: Array) -> Array:
        if self.arch.pool == "last":
            return x[:, -1]
        # argmax returns the first match, so padding with the end token does no harm.
        place = jnp.argmax(tokens == self.arch.end_id if self.arch.pool == "end" else tokens, axis=1)
        return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
