"""Vision transformer with early exits.

Exits are numbered by executed blocks: exit 6 reads the residual stream after six blocks, pools it and projects it into the
embedding space of the full tower and the text tower. Full depth is always an exit and uses `ln_post` and `proj`. A bare tower
(projection 'none') ends in `ln_post`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models import pooling
from icar_jax.models.exit_heads import Adapter, TokenAttention
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType, LayerNorm, PatchConv, draw
from icar_jax.models.ops import require_floats
from icar_jax.models.projection import add_projection, embed_cross, project
from icar_jax.models.reduced_image import append_cross, log_sizes, run_reduced
from icar_jax.models.reduction.routes import split_route
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.swiglu import SwiGlu
from icar_jax.models.transformer import AttentionFn, AttentionPool, Block, Execution, require_blocks
from icar_jax.models.vision_arch import EXIT_FIELDS, POOLS, VisionArch

__all__ = ["EXIT_FIELDS", "POOLS", "ExitHead", "Trunk", "VisionArch", "VisionTower", "run_first", "run_trunk"]

Array = jax.Array
_NONE: Mapping[int, Array] = MappingProxyType({})


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

    def __call__(self, x: Array, sizes: Array | None = None, key_bias: Array | None = None) -> Array:
        """`key_bias` float32 [B, L] biases the tokens as keys of an attention, for merged patches; None is 0."""
        bias = {} if key_bias is None else {"key_bias": key_bias}
        if self.pool == "map":
            return self.map(self.ln(x), **bias)
        pooled = pooling.pool(x, self.pool, self.prefix, sizes)
        if self.residual is not None:
            pooled = pooled + self.residual(x, pooled, **bias)
        return self.of_pooled(pooled)

    def of_pooled(self, pooled: Array) -> Array:
        """Pooled tokens [B, W], or [B, n, W] of pool 'cls_mean' or several blocks -> [B, D], without the residual."""
        return project(self, pooling.flat(self.ln(pooled)))


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
        self.cross = nnx.Param(jnp.zeros((a.depth, a.width), param_dtype)) if a.has_cross else None
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
        tokens = Tokens(x if self.ln_pre is None else self.ln_pre(x), jnp.ones(x.shape[:2], jnp.float32))
        return append_cross(tokens) if self.arch.has_cross else tokens

    def run(self, tokens: Tokens, wanted: Iterable[int], start: int = 0, scales: Array | None = None) -> dict[int, Tokens]:
        """Tokens of [B, L, W] after `start` blocks -> {executed blocks: Tokens} for each of `wanted`.

        At a depth after which patches are merged (`merge`) or dropped, both the given and the returned tokens are those before.
        `scales` float32 [B, depth] multiplies the residuals of each image in each block; None is 1.
        """
        return run_trunk(self, tokens, wanted, start, scales)


def run_trunk(
    trunk: Trunk,
    tokens: Tokens,
    wanted: Iterable[int],
    start: int = 0,
    scales: Array | None = None,
    arch: VisionArch | None = None,
    cross: list[Array] | None = None,
) -> dict[int, Tokens]:
    """Same as `Trunk.run`; modules call this, because nnx.tabulate traces all arguments of methods and some are no arrays.

    `arch` has the schedule of token reduction, None is the trunk's own; `cross` receives the cross tokens (`run_reduced`).
    """
    require_blocks(trunk.blocks, trunk.depth)

    return run_reduced(trunk, tokens, wanted, start, scales, trunk.arch if arch is None else arch, cross)


def run_first(trunk: Trunk, images: Array, blocks: int) -> Tokens:
    """images float [B, S, S, 3], normalised -> Tokens of [B, L, W] after `blocks` blocks, from which heads can be reached."""
    arch = trunk.arch
    before = range(max(1, blocks - arch.head_blocks + 1), blocks)  # the heads after later blocks read these as well
    taps = run_trunk(trunk, trunk.embed(images), (*before, blocks))
    pooled = [pooling.parts(pooling.pooled_after(taps[n], n, arch)) for n in before]
    return taps[blocks]._replace(earlier=jnp.stack(pooled, axis=1)) if pooled else taps[blocks]


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
        arch, _ = self.arch.at_route(exits[0])
        taps = run_trunk(self, tokens, range(1, max(split_route(e)[0] for e in exits) + 1), 0, scales, arch)
        named = {"embed": tokens.values} | {f"blocks/{n - 1}": tap.values for n, tap in taps.items()}
        return self._heads(taps, exits, arch), named

    def resume(self, tokens: Tokens, start: int, exits: Sequence[int], scales: Array | None = None) -> dict[int, Array]:
        """Resumes `__call__` from Tokens of [B, L, W] after `start` blocks; `exits` must not lie before `start`.

        Where heads read several blocks, `tokens` must have `earlier` pooled tokens, as `run_first` gives them; else
        ValueError.
        """
        return self._resume(tokens, start, exits, scales)

    def _resume(
        self, tokens: Tokens, start: int, exits: Sequence[int], scales: Array | None, cross: list[Array] | None = None
    ) -> dict[int, Array]:
        found: dict[int, Array] = {}
        for number in dict.fromkeys(split_route(exit)[1] for exit in exits):  # one run for each schedule
            own = [exit for exit in exits if split_route(exit)[1] == number]
            arch, _ = self.arch.at_route(own[0])
            heads = {e for exit in own for e in arch.heads_of(split_route(exit)[0])}
            wanted = {block for e in heads for block in arch.blocks_of(e)}
            earlier = pooling.earlier_pooled(tokens, start, wanted)
            taps = run_trunk(self, tokens, wanted - earlier.keys(), start, scales, arch, cross)
            found |= self._heads(taps, own, arch, earlier)
        return {exit: found[exit] for exit in sorted(found)}  # ascending by depth

    def _heads(
        self, taps: dict[int, Tokens], exits: Sequence[int], arch: VisionArch, earlier: Mapping[int, Array] = _NONE
    ) -> dict[int, Array]:
        parts = {exit: arch.heads_of(split_route(exit)[0]) for exit in exits}
        heads = sorted({e for each in parts.values() for e in each})
        if arch.head_blocks == 1:
            each = {e: self._embed(taps[e], e, arch).astype(jnp.float32) for e in heads}
        else:
            read = dict(earlier) | {n: pooling.pooled_after(taps[n], n, arch) for n in taps}
            each = {e: self._of_blocks(read, e).astype(jnp.float32) for e in heads}
        return {exit: reduce(operator.add, (each[e] for e in parts[exit])) for exit in sorted(parts)}

    def _embed(self, tokens: Tokens, blocks_run: int, arch: VisionArch) -> Array:
        a = arch
        early = blocks_run != a.depth
        tokens = pooling.without_cross(tokens, a)
        x, merged, pool = tokens.values, blocks_run > a.first_merging, a.pool if early else a.head
        # Only a mean needs the sizes, only attention their logarithms: a head of the user need not know them.
        weighted = merged and pool in ("mean", "cls_mean")
        attends = merged and (pool == "map" or (early and a.exit_head == "attention"))
        bias = {"key_bias": log} if attends and (log := log_sizes(tokens, a)) is not None else {}
        if early:
            head = self.exits[str(blocks_run)]
            return head(x, tokens.sizes if weighted else None, **bias) if weighted or bias else head(x)
        if a.head == "map":
            return self.map(self.ln_post(x), **bias)
        return self._full_of_pooled(pooling.pool(x, a.head, a.prefix, tokens.sizes if weighted else None))

    def _full_of_pooled(self, pooled: Array) -> Array:
        return project(self, pooling.flat(self.ln_post(pooled)))

    def pooled(self, images: Array) -> dict[int, Array]:
        """images float [B, S, S, 3], normalised -> {executed blocks: [B, W] or [B, 2, W]}, for `arch.read_blocks`.

        `of_pooled` makes the embeddings of it: where the tower is frozen, this part need not run again. Only for heads that
        read pooled tokens alone (`arch.reads_pooled`).
        """
        taps = run_trunk(self, self.embed(images), self.arch.read_blocks)
        return {n: pooling.pooled_after(tokens, n, self.arch) for n, tokens in taps.items()}

    def of_pooled(self, pooled: Mapping[int, Array]) -> dict[int, Array]:
        """Outputs of `pooled` -> {executed blocks: float32 [B, D], not normalised} for every exit, as of `__call__`."""
        a = self.arch
        each = {e: self._of_blocks(pooled, e).astype(jnp.float32) for e in a.depths}
        return {e: reduce(operator.add, (each[part] for part in a.heads_of(e))) for e in a.depths}

    def _of_blocks(self, pooled: Mapping[int, Array], depth: int) -> Array:
        """The head at `depth` on the pooled tokens of the blocks that it reads -> [B, D]."""
        read = [pooled[block] for block in self.arch.blocks_of(depth)]
        joined = read[0] if len(read) == 1 else jnp.concatenate([pooling.parts(each) for each in read], axis=1)
        return self._full_of_pooled(joined) if depth == self.arch.depth else self.exits[str(depth)].of_pooled(joined)

    def with_cross_embeddings(
        self, images: Array, exits: Sequence[int], scales: Array | None = None
    ) -> tuple[dict[int, Array], Array]:
        """`__call__` and the cross tokens in the embedding space, float32 [blocks, B, D], for CrossGET's cross loss.

        The cross tokens of all blocks that run, normalised by `ln_pre` (`ln_post` where there is none) and projected. Their
        norm and projection get no gradient.
        """
        cross: list[Array] = []
        found = self._resume(self.embed(images), 0, exits, scales, cross)
        return found, embed_cross(
            self, self.ln_post if self.ln_pre is None else self.ln_pre, cross, self.arch.parts * self.arch.head_blocks
        )


def _attention_pool(arch: VisionArch, **kwargs: Any) -> AttentionPool:
    return AttentionPool(arch.width, arch.heads, arch.mlp_width, activation=arch.activation, eps=arch.norm_eps, **kwargs)


def _add_projection(module: nnx.Module, arch: VisionArch, **types: Any) -> None:
    add_projection(module, arch.projection, arch.projection_width, arch.pooled_width, arch.embed_dim, **types)
