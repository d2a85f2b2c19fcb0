"""Vision transformer with early exits.

Exits are numbered by executed blocks: exit 6 reads the residual stream after six blocks, pools one token and projects it into
the embedding space of the full tower and the text tower. Full depth is always an exit and uses `ln_post` and `proj`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.errors import ModelError
from icar_jax.models.exit_heads import EXIT_HEADS, Adapter, TokenAttention
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType, LayerNorm, Linear, PatchConv, draw
from icar_jax.models.ops import require_floats
from icar_jax.models.token_merging import Tokens, merge_similar, merging_error
from icar_jax.models.transformer import AttentionFn, AttentionPool, Block, Execution, require_blocks, run_blocks

Array = jax.Array
POOLS = ("cls", "mean", "first_patch", "map")
HEADS = ("cls", "map")
EXIT_FIELDS = ("exits", "pool", "exit_head", "exit_sum")  # of VisionArch: those that concern early exits alone


@dataclass(frozen=True)
class VisionArch:
    """Architecture of a vision tower; sizes in pixels, widths in channels. Raises ModelError for invalid combinations."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    embed_dim: int
    activation: str = "gelu"  # gelu | gelu_tanh | quick_gelu
    exits: tuple[int, ...] = ()  # executed blocks, ascending, below depth
    pool: str = "cls"  # pooling at the exits: cls | mean (of the patches) | first_patch | map (attention pool)
    head: str = "cls"  # pooling at full depth: cls, then proj (CLIP) | map, without projection (SigLIP)
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True
    norm_eps: float = 1e-5  # epsilon of the tower's LayerNorms; exit heads without attention pool always use 1e-5
    exit_head: str = "linear"  # residual module of exit heads: linear (none) | adapter | attention (exit_heads.py)
    exit_sum: bool = False  # whether an embedding is the sum of all heads up to its depth instead of its own head alone
    merge: tuple[int, ...] = ()  # entry i: number of patches merged after i + 1 blocks; shorter than the depth

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ModelError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if list(self.exits) != sorted(set(self.exits)) or any(not 1 <= e < self.depth for e in self.exits):
            raise ModelError(f"exits {self.exits} must be ascending block counts from 1 to {self.depth - 1}")
        if wrong := merging_error(self.merge, self.depth, self.grid**2):
            raise ModelError(wrong)
        if self.pool in ("mean", "first_patch") and (late := self.exits_after_merging):
            raise ModelError(f"pool {self.pool!r} does not work at exits {late} after token merging {self.merge}; use 'cls'")
        if self.pool not in POOLS or self.head not in HEADS:
            raise ModelError(f"pool {self.pool!r} must be one of {POOLS} and head {self.head!r} one of {HEADS}")
        if self.exit_head not in EXIT_HEADS:
            raise ModelError(f"exit head {self.exit_head!r} must be one of {EXIT_HEADS}")
        if not self.class_token and "cls" in (self.head, *((self.pool,) if self.exits else ())):
            raise ModelError("a tower without a class token cannot pool 'cls'")
        if self.head == "map" and (self.embed_dim != self.width or (self.exits and self.pool != "map")):
            raise ModelError(
                f"an attention-pool head has no projection: embed_dim {self.embed_dim} must be the width {self.width}, "
                f"and exits pool 'map', not {self.pool!r}"
            )
        if self.exit_sum and self.head == "map":
            raise ModelError("exit_sum sums projections, but a tower with an attention-pool head has no projection")
        if self.pool == "map" and self.exits and self.exit_head != "linear":
            raise ModelError(f"exits that pool 'map' need exit head 'linear', got {self.exit_head!r}")
        if self.head != "map" and self.pool == "map":
            raise ModelError("pool 'map' needs head 'map': exit heads are initialised from the full-depth head")

    @property
    def grid(self) -> int:
        """Number of patches per side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Sequence length before merging: patches, and the class token if there is one."""
        return self.grid**2 + self.class_token

    def tokens_after(self, blocks_run: int) -> int:
        """Returns the sequence length at a head after `blocks_run` blocks; heads read tokens before the merging there."""
        return self.tokens - sum(self.merge[: max(blocks_run - 1, 0)])

    @property
    def first_merging(self) -> int:
        """Number of blocks before the first merging; the depth if there is none."""
        return next((i for i, count in enumerate(self.merge, 1) if count), self.depth)

    def merge_before(self, blocks_run: int) -> tuple[int, ...]:
        """Returns the part of `merge` that affects tokens read after `blocks_run` blocks, without trailing zeros."""
        before = self.merge[: blocks_run - 1]
        return before[: max((i for i, count in enumerate(before, 1) if count), default=0)]

    @property
    def exits_after_merging(self) -> tuple[int, ...]:
        """Early exits after the first merging; their heads read merged patches."""
        return tuple(e for e in self.exits if e > self.first_merging)

    @property
    def all_exits(self) -> tuple[int, ...]:
        """All depths with a head, ascending; full depth is last."""
        return (*self.exits, self.depth)

    def heads_of(self, blocks_run: int) -> tuple[int, ...]:
        """Returns the depths of the heads that the embedding after `blocks_run` blocks uses, ascending; see `exit_sum`."""
        return tuple(e for e in self.all_exits if e <= blocks_run) if self.exit_sum else (blocks_run,)

    def check_exit(self, exit: int | None) -> int:
        """Returns `exit`, or the depth if it is None. Raises ModelError if there is no head after `exit` blocks."""
        if exit is None:
            return self.depth
        if exit not in self.all_exits:
            raise ModelError(f"exit={exit} has no head; this model has exits after {self.all_exits} blocks")
        return exit


class ExitHead(Module):
    """Exit head: residual stream [B, L, W] -> [B, D], by pooling, LayerNorm and projection, or LayerNorm and attention pool.

    With `arch.exit_head` 'adapter' or 'attention' a residual module is added to the pooled token (exit_heads.py).
    """

    def __init__(
        self, arch: VisionArch, *, attention: AttentionFn | None = None, dtype: DType = None, param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.pool = arch.pool
        self.class_token = arch.class_token
        if arch.pool == "map":
            self.ln = LayerNorm(arch.width, arch.norm_eps, param_dtype=param_dtype)
            self.map = _attention_pool(arch, attention=attention, **types, rngs=rngs)
        else:
            self.ln = LayerNorm(arch.width, 1e-5, param_dtype=param_dtype)
            self.proj = Linear(arch.width, arch.embed_dim, std=arch.width**-0.5, bias=False, **types, rngs=rngs)
        make = {
            "linear": lambda: None,
            "adapter": lambda: Adapter(arch.width, activation=arch.activation, **types, rngs=rngs),
            "attention": lambda: TokenAttention(arch.width, arch.heads, attention=attention, **types, rngs=rngs),
        }
        self.residual = nnx.data(make[arch.exit_head]())  # data, so that another module can replace it

    def __call__(self, x: Array) -> Array:
        if self.pool == "map":
            return self.map(self.ln(x))
        pooled = _pool(x, self.pool, self.class_token)
        if self.residual is not None:
            pooled = pooled + self.residual(x, pooled)
        return self.proj(self.ln(pooled))


class Trunk(Module):
    """The tower below the heads: patch and position embedding, class token, norm, the first `blocks` blocks (None: all)."""

    def __init__(
        self, arch: VisionArch, blocks: int | None = None, *, execution: Execution = Execution(),
        attention: AttentionFn | None = None, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        a, std = arch, arch.width**-0.5
        self.arch, self.execution, self.dtype = arch, execution, jnp.dtype(dtype)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        patch_std = (3 * a.patch_size**2) ** -0.5
        self.patch = PatchConv(a.patch_size, 3, a.width, std=patch_std, bias=a.patch_bias, **types)
        self.cls = draw(rngs, (a.width,), std, param_dtype) if a.class_token else None
        self.pos = draw(rngs, (a.tokens, a.width), std, param_dtype)
        self.ln_pre = nnx.data(LayerNorm(a.width, a.norm_eps, param_dtype=param_dtype) if a.pre_norm else None)
        kind: dict[str, Any] = {"depth": a.depth, "activation": a.activation, "eps": a.norm_eps, "attention": attention}
        self.depth = count = a.depth if blocks is None else blocks
        self.blocks = nnx.List([Block(a.width, a.heads, a.mlp_width, **kind, **types) for _ in range(count)])

    def embed(self, images: Array) -> Tokens:
        """images float [B, S, S, 3], normalised -> Tokens of [B, L, W] before the first block, in the compute dtype.

        Raises ValueError for other shapes, and TypeError for integers.
        """
        size = self.arch.image_size
        if not hasattr(images, "ndim"):
            raise TypeError(f"images must be a float array [batch, {size}, {size}, 3], got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images must be [batch, {size}, {size}, 3], channels last, for this vision tower; got {list(images.shape)}"
            )
        require_floats(images)
        x = self.patch(images.astype(self.dtype))
        b, _, _, width = x.shape
        x = x.reshape(b, -1, width)
        if self.cls is not None:
            x = jnp.concatenate([jnp.broadcast_to(self.cls[...].astype(self.dtype), (b, 1, width)), x], axis=1)
        x = x + self.pos[...].astype(self.dtype)[None]
        return Tokens(x if self.ln_pre is None else self.ln_pre(x), jnp.ones(x.shape[:2], jnp.float32))

    def run(self, tokens: Tokens, wanted: Iterable[int], start: int = 0, scales: Array | None = None) -> dict[int, Tokens]:
        """Tokens of [B, L, W] after `start` blocks -> {executed blocks: Tokens} for each of `wanted`.

        At a depth where patches are merged, both the given and the returned tokens are those before merging. `scales` float32
        [B, depth] multiplies the residuals of each image in each block; None is 1.
        """
        return run_trunk(self, tokens, wanted, start, scales)


def run_trunk(
    trunk: Trunk, tokens: Tokens, wanted: Iterable[int], start: int = 0, scales: Array | None = None
) -> dict[int, Tokens]:
    """Same as `Trunk.run`; modules call this, because nnx.tabulate traces all arguments of methods and some are no arrays."""
    require_blocks(trunk.blocks, trunk.depth)

    def part(tokens: Tokens, wanted: set[int], start: int) -> dict[int, Tokens]:
        found = run_blocks(trunk.blocks, tokens.values, wanted, execution=trunk.execution, start=start, scales=scales)
        return {blocks_run: Tokens(x, tokens.sizes) for blocks_run, x in found.items()}

    wanted, taps = set(wanted), dict[int, Tokens]()
    for stop, count in enumerate(trunk.arch.merge, 1):
        if count and start <= stop < max(wanted):
            taps |= part(tokens, {e for e in wanted if e < stop} - taps.keys() | {stop}, start)
            tokens, start = merge_similar(taps[stop], count, trunk.arch.class_token), stop
    taps |= part(tokens, wanted - taps.keys(), start)
    return {e: taps[e] for e in sorted(wanted)}


class VisionTower(Trunk):
    """Vision transformer with a head at each exit.

    Args:
        arch: architecture.
        execution: how the blocks run (remat, scan, sharding); does not change values.
        attention: attention function, see `transformer.Attention`; None is `ops.attention`.
        dtype: dtype of activations; parameters are cast to it in each layer.
        param_dtype: dtype of parameters.
        rngs: random keys for initialisation.
    """

    def __init__(
        self, arch: VisionArch, *, execution: Execution = Execution(), attention: AttentionFn | None = None,
        dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(arch, execution=execution, attention=attention, **types)
        self.ln_post = LayerNorm(arch.width, arch.norm_eps, param_dtype=param_dtype)
        if arch.head == "map":
            self.map = _attention_pool(arch, attention=attention, **types)
        else:
            self.proj = Linear(arch.width, arch.embed_dim, std=arch.width**-0.5, bias=False, **types)
        self.exits = nnx.Dict({str(e): ExitHead(arch, attention=attention, **types) for e in arch.exits})

    @overload
    def __call__(
        self,
        images: Array,
        exits: Sequence[int] | None = ...,
        scales: Array | None = ...,
        *,
        intermediates: Literal[False] = ...,
    ) -> dict[int, Array]: ...

    @overload
    def __call__(
        self, images: Array, exits: Sequence[int] | None = ..., scales: Array | None = ..., *, intermediates: Literal[True]
    ) -> tuple[dict[int, Array], dict[str, Array]]: ...

    def __call__(
        self, images: Array, exits: Sequence[int] | None = None, scales: Array | None = None, *, intermediates: bool = False
    ) -> dict[int, Array] | tuple[dict[int, Array], dict[str, Array]]:
        """images float [B, S, S, 3], normalised -> {executed blocks: float32 [B, D], not normalised}.

        Args:
            exits: executed blocks; None is every exit. Only max(exits) blocks run, so later blocks are absent from the compiled
                program.
            scales: float32 [B, depth], multiplies the residuals of each image in each block (0 skips it); None is 1.
            intermediates: also returns the tokens {name: [B, L, W]}: 'embed' before the first block, 'blocks/0' after it, and
                so on up to the last block that runs.

        Raises ModelError if there is no such exit, ValueError for wrong shapes or empty `exits`, TypeError for integer images.
        """
        exits = tuple(self.arch.check_exit(e) for e in (self.arch.all_exits if exits is None else exits))
        if not exits:
            raise ValueError(f"exits must not be empty; this model has exits after {self.arch.all_exits} blocks")
        tokens = self.embed(images)
        if not intermediates:
            return self._resume(tokens, 0, exits, scales)
        taps = run_trunk(self, tokens, range(1, max(exits) + 1), 0, scales)
        named = {"embed": tokens.values} | {f"blocks/{n - 1}": tap.values for n, tap in taps.items()}
        return self._heads(taps, exits), named

    def resume(self, tokens: Tokens, start: int, exits: Sequence[int], scales: Array | None = None) -> dict[int, Array]:
        """Resumes `__call__` from Tokens of [B, L, W] after `start` blocks; `exits` must not lie before `start`."""
        return self._resume(tokens, start, exits, scales)

    def _resume(self, tokens: Tokens, start: int, exits: Sequence[int], scales: Array | None) -> dict[int, Array]:
        wanted = {e for exit in exits for e in self.arch.heads_of(exit)}
        return self._heads(run_trunk(self, tokens, wanted, start, scales), exits)

    def _heads(self, taps: dict[int, Tokens], exits: Sequence[int]) -> dict[int, Array]:
        parts = {exit: self.arch.heads_of(exit) for exit in exits}
        heads = sorted({e for each in parts.values() for e in each})
        each = {e: self._embed(taps[e].values, e).astype(jnp.float32) for e in heads}
        # Ascending by depth.
        return {exit: reduce(operator.add, (each[e] for e in parts[exit])) for exit in sorted(parts)}

    def _embed(self, x: Array, blocks_run: int) -> Array:
        if blocks_run != self.arch.depth:
            return self.exits[str(blocks_run)](x)
        if self.arch.head == "map":
            return self.map(self.ln_post(x))
        return self.proj(self.ln_post(x[:, 0]))


def _attention_pool(arch: VisionArch, **kwargs: Any) -> AttentionPool:
    return AttentionPool(arch.width, arch.heads, arch.mlp_width, activation=arch.activation, eps=arch.norm_eps, **kwargs)


def _pool(x: Array, pool: str, class_token: bool) -> Array:
    """x [B, L, W] -> [B, W]: the class token, the mean of the patches, or the first patch."""
    if pool == "cls":
        return x[:, 0]
    patches = x[:, 1:] if class_token else x
    if pool == "first_patch":
        return patches[:, 0]
    return patches.astype(jnp.float32).mean(axis=1).astype(x.dtype)
