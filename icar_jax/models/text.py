"""Text transformer: causal and pooled at the end token (CLIP), or bidirectional and pooled at the last position (SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.errors import ModelError
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType, LayerNorm, Linear, draw
from icar_jax.models.transformer import AttentionFn, Block, Execution, require_blocks, run_blocks

Array = jax.Array
POOLS = ("end", "argmax", "last")


@dataclass(frozen=True)
class TextArch:
    """Architecture of a text tower.

    `pool`: 'end' pools the first `end_id`; 'argmax' the highest id, which is the same if the end token has the highest id;
    'last' the last position.
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

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ModelError(f"text pool {self.pool!r} must be one of {POOLS}")
        if not 0 <= self.end_id < self.vocabulary:
            raise ModelError(f"end token {self.end_id} lies outside the vocabulary of {self.vocabulary}")


class TextTower(Module):
    """Text transformer; token ids int [B, L] -> [B, D]. Arguments are those of `vision.VisionTower`."""

    def __init__(
        self, arch: TextArch, *, execution: Execution = Execution(), attention: AttentionFn | None = None,
        dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        a = arch
        self.arch, self.execution, self.dtype = arch, execution, jnp.dtype(dtype)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed = draw(rngs, (a.vocabulary, a.width), 0.02, param_dtype)
        self.pos = draw(rngs, (a.context_length, a.width), 0.01, param_dtype)
        kind: dict[str, Any] = {
            "depth": a.depth,
            "activation": a.activation,
            "eps": a.norm_eps,
            "causal": a.causal,
            "attention": attention,
        }
        self.blocks = nnx.List([Block(a.width, a.heads, a.mlp_width, **kind, **types) for _ in range(a.depth)])
        self.ln_final = LayerNorm(a.width, a.norm_eps, param_dtype=param_dtype)
        self.proj = Linear(a.width, a.embed_dim, std=a.width**-0.5, bias=a.proj_bias, **types)

    def __call__(self, tokens: Array) -> Array:
        """tokens int [B, L], L at most the context length -> [B, D] before normalisation, float32.

        Raises ValueError for other shapes, and TypeError for floats.
        """
        context = self.arch.context_length
        if not hasattr(tokens, "ndim"):
            raise TypeError(
                f"tokens must be an integer array [batch, length], got {type(tokens).__name__}; encode texts with a Tokenizer"
            )
        require_blocks(self.blocks, self.arch.depth)
        if tokens.ndim != 2 or tokens.shape[1] > context:
            raise ValueError(
                f"tokens must be [batch, length] with a length of at most {context}, the context of this text tower; got "
                f"{list(tokens.shape)}"
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integer ids, got {tokens.dtype}")
        length, depth = tokens.shape[1], self.arch.depth
        x = (self.embed[...][tokens] + self.pos[...][None, :length]).astype(self.dtype)
        x = run_blocks(self.blocks, x, (depth,), execution=self.execution)[depth]
        return self.proj(self.ln_final(self._pool(x, tokens))).astype(jnp.float32)

    def _pool(self, x: Array, tokens: Array) -> Array:
        if self.arch.pool == "last":
            return x[:, -1]
        # argmax returns the first match, so padding with the end token is harmless.
        place = jnp.argmax(tokens == self.arch.end_id if self.arch.pool == "end" else tokens, axis=1)
        return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
