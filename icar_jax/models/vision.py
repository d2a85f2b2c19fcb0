"""Vision transformer with early exits.

`exits` counts executed blocks: exit 6 reads the residual stream after six blocks, pools one token and projects it into
the space that the full tower and the text tower share. Full depth is always an exit and uses `ln_post` and `proj`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models.layers import DType, LayerNorm, Linear, PatchConv, normal
from icar_jax.models.transformer import Block

Array = jax.Array
POOLS = ("cls", "mean", "first_patch")


@dataclass(frozen=True)
class VisionArch:
    """Shape of a vision tower; sizes in pixels, widths in channels."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    embed_dim: int
    activation: str = "gelu"  # gelu | gelu_tanh | quick_gelu
    exits: tuple[int, ...] = ()  # executed blocks, ascending, below depth
    pool: str = "cls"  # token pooled at the exits: cls | mean (of the patches) | first_patch

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if list(self.exits) != sorted(set(self.exits)) or any(not 1 <= e < self.depth for e in self.exits):
            raise ValueError(f"exits {self.exits} must be ascending block counts from 1 to {self.depth - 1}")
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} must be one of {POOLS}")

    @property
    def tokens(self) -> int:
        """Sequence length: patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def all_exits(self) -> tuple[int, ...]:
        """Every depth an embedding can be taken at, full depth last."""
        return (*self.exits, self.depth)

    def check_exit(self, exit: int | None) -> int:
        """The executed blocks of `exit`, None meaning full depth. Raises ValueError for a depth without a head."""
        if exit is None:
            return self.depth
        if exit not in self.all_exits:
            raise ValueError(f"exit={exit} has no head; this model has exits after {self.all_exits} blocks")
        return exit


class ExitHead(nnx.Module):
    """LayerNorm and projection without bias; [B, W] -> [B, D]."""

    def __init__(self, width: int, embed_dim: int, *, rngs: nnx.Rngs):
        self.ln = LayerNorm(width, 1e-5)
        self.proj = Linear(width, embed_dim, std=width**-0.5, bias=False, rngs=rngs)

    def __call__(self, x: Array, dtype: DType) -> Array:
        return self.proj(self.ln(x), dtype)


class Vision(nnx.Module):
    """images [B, S, S, 3], normalised -> {executed blocks: [B, D] before normalisation, float32}."""

    def __init__(self, arch: VisionArch, *, rngs: nnx.Rngs):
        a, std = arch, arch.width**-0.5
        self.arch = arch
        patch_std = (3 * a.patch_size**2) ** -0.5
        self.patch = PatchConv(a.patch_size, 3, a.width, std=patch_std, bias=False, rngs=rngs)
        self.cls = normal(rngs, (a.width,), std)
        self.pos = normal(rngs, (a.tokens, a.width), std)
        self.ln_pre = LayerNorm(a.width, 1e-5)
        self.blocks = nnx.List(
            [Block(a.width, a.heads, a.mlp_width, a.depth, a.activation, 1e-5, rngs=rngs) for _ in range(a.depth)]
        )
        self.ln_post = LayerNorm(a.width, 1e-5)
        self.proj = Linear(a.width, a.embed_dim, std=std, bias=False, rngs=rngs)
        self.exits = nnx.Dict({str(e): ExitHead(a.width, a.embed_dim, rngs=rngs) for e in a.exits})

    def __call__(self, images: Array, exits: tuple[int, ...], dtype: DType) -> dict[int, Array]:
        """Runs max(exits) blocks and no more, so later blocks are absent from the compiled program."""
        x = self.patch(images.astype(dtype), dtype)
        b, _, _, width = x.shape
        cls = jnp.broadcast_to(self.cls[...].astype(dtype), (b, 1, width))
        x = jnp.concatenate([cls, x.reshape(b, -1, width)], axis=1) + self.pos[...].astype(dtype)
        x = self.ln_pre(x)
        out = {}
        for blocks_run in range(1, max(exits) + 1):
            x = self.blocks[blocks_run - 1](x, causal=False, dtype=dtype)
            if blocks_run in exits:
                out[blocks_run] = self._embed(x, blocks_run, dtype).astype(jnp.float32)
        return out

    def _embed(self, x: Array, blocks_run: int, dtype: DType) -> Array:
        if blocks_run == self.arch.depth:
            return self.proj(self.ln_post(x[:, 0]), dtype)
        return self.exits[str(blocks_run)](_pool(x, self.arch.pool), dtype)


def _pool(x: Array, pool: str) -> Array:
    """x [B, 1 + N, W] -> [B, W]: the class token, the mean of the patches, or the first patch."""
    if pool == "cls":
        return x[:, 0]
    if pool == "first_patch":
        return x[:, 1]
    return x[:, 1:].astype(jnp.float32).mean(axis=1).astype(x.dtype)
