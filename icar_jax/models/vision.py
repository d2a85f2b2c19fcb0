"""Vision transformer with early exits.

Exits are numbered by executed blocks: exit 6 reads the residual stream after six blocks, pools it and projects it into the
embedding space of the full tower and the text tower. Full depth is always an exit and uses `ln_post` and `proj`. A bare tower
(projection 'none') ends in `ln_post`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models.exit_heads import Adapter, TokenAttention
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType, LayerNorm, PatchConv, draw
from icar_jax.models.ops import require_floats
from icar_jax.models.projection import add_projection, project
from icar_jax.models.swiglu import SwiGlu
from icar_jax.models.token_merging import Tokens, merge_similar
from icar_jax.models.transformer import AttentionFn, AttentionPool, Block, Execution, require_blocks, run_blocks
from icar_jax.models.vision_arch import EXIT_FIELDS, POOLS, VisionArch

__all__ = ["EXIT_FIELDS", "POOLS", "ExitHead", "Trunk", "VisionArch", "VisionTower", "run_trunk"]

Array = jax.Array


class ExitHead(Module):
    """Exit head: residual stream [B, L, W] -> [B, D], by pooling, LayerNorm and projection, or LayerNorm and attention pool.

    `sizes` float32 [B, L] weights the tokens of a mean, for merged patches; None weights all alike.

    With `arch.exit_head` 'adapter' or 'attention' a residual module is added to the pooled token (exit_heads.py).
    """

    def __init__(
        self, arch: VisionArch, *, attention: AttentionFn | None = None, dtype: DType = None, param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.pool = arch.pool
        self.class_token, self.prefix = arch.class_token, arch.prefix
        if arch.pool == "map":
            self.ln = LayerNorm(arch.width, arch.norm_eps, param_dtype=param_dtype)
            self.map = _attention_pool(arch, attention=attention, **types, rngs=rngs)
        else:
            self.ln = LayerNorm(arch.width, arch.exit_eps, param_dtype=param_dtype)
            _add_projection(self, arch, **types, rngs=rngs)
        make = {
            "linear": lambda: None,
            "adapter": lambda: Adapter(arch.width, activation=arch.activation, **types, rngs=rngs),
            "attention": lambda: TokenAttention(arch.width, arch.heads, attention=attention, **types, rngs=rngs),
        }
        self.residual = nnx.data(make[arch.exit_head]())  # data, so that another module can replace it

    def __call__(self, x: Array, sizes: Array | None = None) -> Array:
        if self.pool == "map":
            return self.map(self.ln(x))
        pooled = _pool(x, self.pool, self.prefix, sizes)
        if self.residual is not None:
            pooled = pooled + self.residual(x, pooled)
        return project(self, _flat(self.ln(pooled)))


class Trunk(Module):
    """The tower below the heads: embedding of patches and positions, class token, registers, norm, the first `blocks` blocks.

    `blocks` None is all of them.
    """

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
        self.pos = draw(rngs, (a.tokens - a.registers, a.width), std, param_dtype)
        self.registers = draw(rngs, (a.registers, a.width), std, param_dtype) if a.registers else None
        self.ln_pre = nnx.data(LayerNorm(a.width, a.norm_eps, param_dtype=param_dtype) if a.pre_norm else None)
        kind: dict[str, Any] = {"depth": a.depth, "activation": a.activation, "eps": a.norm_eps, "attention": attention}
        self.depth = count = a.depth if blocks is None else blocks
        self.blocks = nnx.List([Block(a.width, a.heads, a.mlp_width, **kind, **types) for _ in range(count)])
        if a.ffn == "swiglu":
            for block in self.blocks:
                block.mlp = SwiGlu(a.width, a.mlp_width, depth=a.depth, **types)  # type: ignore[assignment]

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
        if self.registers is not None:
            registers = jnp.broadcast_to(self.registers[...].astype(self.dtype), (b, *self.registers.shape))
            first = int(self.arch.class_token)
            x = jnp.concatenate([x[:, :first], registers, x[:, first:]], axis=1)
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
            tokens, start = merge_similar(taps[stop], count, trunk.arch.prefix), stop
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
            _add_projection(self, arch, **types)
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
        each = {e: self._embed(taps[e], e).astype(jnp.float32) for e in heads}
        # Ascending by depth.
        return {exit: reduce(operator.add, (each[e] for e in parts[exit])) for exit in sorted(parts)}

    def _embed(self, tokens: Tokens, blocks_run: int) -> Array:
        x, a = tokens.values, self.arch
        early = blocks_run != a.depth
        # Only a mean needs the sizes: a head of the user need not know them.
        weighted = blocks_run > a.first_merging and (a.pool if early else a.head) in ("mean", "cls_mean")
        if early:
            head = self.exits[str(blocks_run)]
            return head(x, tokens.sizes) if weighted else head(x)
        if a.head == "map":
            return self.map(self.ln_post(x))
        pooled = _pool(x, a.head, a.prefix, tokens.sizes if weighted else None)
        return project(self, _flat(self.ln_post(pooled)))


def _attention_pool(arch: VisionArch, **kwargs: Any) -> AttentionPool:
    return AttentionPool(arch.width, arch.heads, arch.mlp_width, activation=arch.activation, eps=arch.norm_eps, **kwargs)


def _add_projection(module: nnx.Module, arch: VisionArch, **types: Any) -> None:
    add_projection(module, arch.projection, arch.projection_width, arch.pooled_width, arch.embed_dim, **types)


def _pool(x: Array, pool: str, prefix: int, sizes: Array | None) -> Array:
    """x [B, L, W] -> [B, W], or [B, 2, W] for 'cls_mean'; the first `prefix` tokens are no patches. `sizes` as of ExitHead."""
    if pool == "cls":
        return x[:, 0]
    patches = x[:, prefix:]
    if pool == "first_patch":
        return patches[:, 0]
    wide = patches.astype(jnp.float32)
    if sizes is None:
        mean = wide.mean(axis=1).astype(x.dtype)
    else:
        weights = sizes[:, prefix:, None]
        mean = ((wide * weights).sum(axis=1) / weights.sum(axis=1)).astype(x.dtype)
    return jnp.stack([x[:, 0], mean], axis=1) if pool == "cls_mean" else mean


def _flat(pooled: Array) -> Array:
    """[B, W] or [B, 2, W] -> [B, W] or [B, 2 W]."""
    return pooled.reshape(len(pooled), -1) if pooled.ndim == 3 else pooled
