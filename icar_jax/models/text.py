"""Text transformer: causal and pooled at the end token (CLIP), bidirectional and pooled at the last position (SigLIP), or
post-norm with masked padding, pooled at the first token or over the mean (BERT, RoBERTa, sentence-transformers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.errors import ModelError
from icar_jax.models import pooling
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType, LayerNorm, Linear, draw
from icar_jax.models.projection import add_projection, embed_cross, project, projection_error
from icar_jax.models.reduced_text import PROTECTED, TextTokens, is_text, run_reduced_text
from icar_jax.models.reduction.schedule import Schedule, schedule_error
from icar_jax.models.sizes import size_error
from icar_jax.models.transformer import AttentionFn, Block, Execution, PostNormBlock, require_blocks, run_blocks

Array = jax.Array
POOLS = ("end", "argmax", "last", "first", "mean")
REDUCTIONS = ("none", "crossget")
MASKED = -5000.0  # added to the scores of padding: exp gives 0, and float16 can hold it


@dataclass(frozen=True)
class TextArch:
    """Architecture of a text tower.

    `pool`: 'end' pools the first `end_id`; 'argmax' the highest id, which is the same if the end token has the highest id;
    'last' the last position; 'first' the first; 'mean' averages all tokens but the padding.
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
    pool: str = "end"  # end | argmax | last | first | mean
    causal: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-5
    post_norm: bool = False  # norms after the embeddings and after each residual, none at the end (BERT)
    pad_id: int = -1  # padding after the last other token is masked; -1: nothing is masked
    projection: str = "linear"  # linear | linear_mlp (sum of both) | mlp | none (a bare tower)
    projection_width: int = 0  # hidden channels of the MLP
    pooler: bool = False  # a linear layer and tanh between the pooled token and the projection (BERT's pooler)
    reduce: str = "none"  # token reduction: none | crossget (models/reduction)
    schedule: Schedule = ()  # entry i: number of tokens that block i + 1 merges
    pads_apart: bool = False  # whether padding only merges into padding; always so where it is masked
    head_blocks: int = 1  # the projection reads the pooled tokens of the last `head_blocks` blocks, concatenated

    def __post_init__(self) -> None:
        if wrong := size_error(self):
            raise ModelError(f"text tower: {wrong}")
        if self.pool not in POOLS:
            raise ModelError(f"text pool {self.pool!r} must be one of {POOLS}")
        if wrong := projection_error(self.projection, self.projection_width, self.pooled_width, self.embed_dim):
            raise ModelError(f"text tower: {wrong}")
        if self.head_blocks > self.depth:
            raise ModelError(f"text head_blocks={self.head_blocks} must lie in 1 to {self.depth}, the depth of the text tower")
        if self.head_blocks > 1 and (self.projection == "none" or self.pooler):
            other = "a pooler" if self.pooler else "projection 'none'"
            raise ModelError(f"text head_blocks={self.head_blocks} is not possible with {other}; use 1")
        if not -1 <= self.pad_id < self.vocabulary:
            raise ModelError(f"padding {self.pad_id} lies outside the vocabulary of {self.vocabulary}")
        if not 0 <= self.end_id < self.vocabulary:
            raise ModelError(f"end token {self.end_id} lies outside the vocabulary of {self.vocabulary}")
        if self.reduce not in REDUCTIONS:
            raise ModelError(f"reduce {self.reduce!r} of a text tower must be one of {REDUCTIONS}")
        if self.reduce == "none" and self.schedule:
            raise ModelError(f"text schedule={self.schedule} needs reduce 'crossget'; a text tower without it merges no tokens")
        if wrong := schedule_error("text schedule", self.schedule, self.depth, self.tokens, PROTECTED):
            raise ModelError(wrong)

    @property
    def pooled_width(self) -> int:
        """Channels that the projection reads: the pooled tokens of `head_blocks` blocks."""
        return self.width * self.head_blocks

    @property
    def has_cross(self) -> bool:
        """Whether a cross token follows the text (CrossGET)."""
        return self.reduce == "crossget"

    @property
    def tokens(self) -> int:
        """Sequence length before the first block: the context, and a cross token if there is one."""
        return self.context_length + self.has_cross

    def tokens_after(self, blocks_run: int) -> int:
        """Returns the sequence length after `blocks_run` blocks."""
        return self.tokens - sum(self.schedule[:blocks_run])


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
        norm = lambda wanted: nnx.data(LayerNorm(a.width, a.norm_eps, param_dtype=param_dtype) if wanted else None)
        self.ln_embed = norm(a.post_norm)
        block = PostNormBlock if a.post_norm else Block
        self.blocks = nnx.List([block(a.width, a.heads, a.mlp_width, **kind, **types) for _ in range(a.depth)])
        self.cross = nnx.Param(jnp.zeros((a.depth, a.width), param_dtype)) if a.has_cross else None
        self.ln_final = norm(not a.post_norm)
        self.pooler = nnx.data(Linear(a.width, a.width, std=0.02, **types) if a.pooler else None)
        add_projection(self, a.projection, a.projection_width, a.pooled_width, a.embed_dim, bias=a.proj_bias, **types)

    def __call__(self, tokens: Array) -> Array:
        """tokens int [B, L], L at most the context length -> [B, D] before normalisation, float32.

        Raises ValueError for other shapes, and TypeError for floats.
        """
        return self.of_pooled(self._run(tokens)[0])

    def with_cross_embeddings(self, tokens: Array) -> tuple[Array, Array]:
        """`__call__`, and the cross tokens in the embedding space, float32 [blocks, B, D], for CrossGET's cross loss.

        The cross tokens of all blocks, normalised by `ln_final` where there is one and projected. Norm and projection get no
        gradient from them.
        """
        pooled, cross = self._run(tokens)
        return self.of_pooled(pooled), embed_cross(self, self.ln_final, cross, self.arch.head_blocks)

    def _run(self, tokens: Array) -> tuple[Array, list[Array]]:
        """tokens int [B, L] -> (pooled token [B, W] or, of several blocks, [B, n, W]; cross token [B, W] of each block)."""
        self._require_tokens(tokens)
        length, depth, a = tokens.shape[1], self.arch.depth, self.arch
        x = (self.embed[...][tokens] + self.pos[...][None, :length]).astype(self.dtype)
        if self.ln_embed is not None:
            x = self.ln_embed(x)
        cross: list[Array] = []
        read = range(depth - a.head_blocks + 1, depth + 1)
        if a.has_cross:
            mask = None if a.pad_id < 0 else MASKED
            count = self._text_length(tokens)
            left, cross = run_reduced_text(
                self, x, read, self._place(tokens), count, a.schedule, mask, a.pads_apart or mask is not None
            )
            each = [self._pool_reduced(left[block]) for block in read]
        else:
            key_bias = None if a.pad_id < 0 else jnp.where(self._is_text(tokens), 0.0, MASKED)
            taps = run_blocks(self.blocks, x, read, execution=self.execution, key_bias=key_bias)
            each = [self._pool(taps[block], tokens) for block in read]
        return each[0] if len(each) == 1 else jnp.stack(each, axis=1), cross

    def pooled(self, tokens: Array) -> Array:
        """tokens int [B, L] -> [B, W] or, of several blocks, [B, n, W], what the head reads; see `of_pooled`."""
        return self._run(tokens)[0]

    def of_pooled(self, pooled: Array) -> Array:
        """Outputs of `pooled`, [B, W] or [B, n, W] -> [B, D] before normalisation, float32."""
        if self.ln_final is not None:
            pooled = self.ln_final(pooled)
        if self.pooler is not None:
            pooled = jnp.tanh(self.pooler(pooled))
        return project(self, pooling.flat(pooled)).astype(jnp.float32)

    def _require_tokens(self, tokens: Array) -> None:
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

    def _is_text(self, tokens: Array) -> Array:
        """bool [B, L]: False for the padding at the end. The padding's id within a text is a token like others."""
        last = jnp.max(jnp.where(tokens != self.arch.pad_id, jnp.arange(tokens.shape[1])[None], 0), axis=1)
        return jnp.arange(tokens.shape[1])[None] <= last[:, None]

    def _text_length(self, tokens: Array) -> Array:
        """int [B]: number of tokens before the padding, which begins after the end token where no id says so."""
        if self.arch.pad_id >= 0:
            return self._is_text(tokens).sum(1)
        return self._place(tokens) + 1 if self.arch.pool in ("end", "argmax") else jnp.full(tokens.shape[:1], tokens.shape[1])

    def _place(self, tokens: Array) -> Array:
        """int [B]: place of the token that is pooled; the first one for a mean."""
        if self.arch.pool in ("first", "mean"):
            return jnp.zeros(tokens.shape[:1], jnp.int32)
        if self.arch.pool == "last":
            return jnp.full(tokens.shape[:1], tokens.shape[1] - 1)
        # argmax returns the first match, so padding with the end token is harmless.
        return jnp.argmax(tokens == self.arch.end_id if self.arch.pool == "end" else tokens, axis=1)

    def _pool(self, x: Array, tokens: Array) -> Array:
        if self.arch.pool == "last":
            return x[:, -1]
        if self.arch.pool == "first":
            return x[:, 0]
        if self.arch.pool == "mean":
            weight = self._is_text(tokens).astype(jnp.float32)[:, :, None]
            return ((x.astype(jnp.float32) * weight).sum(1) / weight.sum(1)).astype(x.dtype)
        return jnp.take_along_axis(x, self._place(tokens)[:, None, None], axis=1)[:, 0]

    def _pool_reduced(self, tokens: TextTokens) -> Array:
        x = tokens.values
        if self.arch.pool == "mean":
            weight = (tokens.sizes * is_text(tokens))[:, :-1, None]
            return ((x[:, :-1].astype(jnp.float32) * weight).sum(1) / weight.sum(1)).astype(x.dtype)
        return jnp.take_along_axis(x, tokens.anchor[:, None, None], axis=1)[:, 0]
