"""The pre-norm transformer block of both towers, running a stack of blocks (remat, scan), and SigLIP's attention pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from icar_jax.config.choices import Remat
from icar_jax.errors import ModelError
from icar_jax.models import ops
from icar_jax.models.functional import Module, state_besides_parameters
from icar_jax.models.key_bias import attend, attend_by_channels
from icar_jax.models.layers import ACTIVATIONS, DType, LayerNorm, Linear, columns, draw

Array = jax.Array
Activation = Callable[[Array], Array]
AttentionFn = Callable[..., Array]  # (q, k, v, *, causal), [B, L, H, K] each -> [B, L, H, K]
Reduce = Callable[[Array, Array, Array], tuple[Array, Any]]  # (x, queries, keys), [B, L, W] each -> (fewer tokens, anything)
REMAT = get_args(Remat)
# Checkpoint names of the outputs of linear layers, for remat 'dots'. The last linear layer is not included, because the
# backward pass of a block does not need its output.
_PRODUCTS = ("qkv", "attn_out", "mlp_hidden")


@dataclass(frozen=True)
class Execution:
    """How the blocks of a tower are executed; does not change values.

    Attributes:
        remat: what the backward pass recomputes. 'none': nothing. 'full': whole blocks, so each stores only its input.
            'dots': everything but the outputs of linear layers; attention weights are recomputed.
        scan: stacks the parameters of equal blocks, matrices in the compute dtype, and runs one compiled block with lax.scan.
        sharding: sharding constraint on the residual stream x [B, L, W]; without it XLA shards its width inside the scan under
            FSDP.

    Raises ModelError for an unknown `remat`.
    """

    remat: str = "none"  # none | dots | full
    scan: bool = False
    sharding: jax.sharding.NamedSharding | None = None

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ModelError(f"remat {self.remat!r} must be one of {REMAT}")

    @property
    def how(self) -> str:
        """The setting that differs from running blocks one by one, for error messages."""
        return f"scan={self.scan}" if self.remat == "none" else f"remat={self.remat!r}"


class Attention(Module):
    """Multi-head self-attention; x [B, L, W] -> [B, L, W]. One linear layer computes q, k, v, concatenated in that order.

    `attention(q, k, v, *, causal)` computes the attention: q, k, v [B, L, H, K] in the compute dtype -> [B, L, H, K].
    Pass it, or replace it later: a function with `block.attn.attention = function`, a module with
    `block.attn.attention = nnx.data(module)`.
    """

    def __init__(
        self, width: int, heads: int, *, depth: int = 1, causal: bool = False, attention: AttentionFn | None = None,
        dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        """`depth`: blocks of the tower; the initial output projection is scaled by (2 depth)^-0.5, as in CLIP.

        Raises ModelError if `heads` does not divide `width`.
        """
        if width % heads:
            raise ModelError(f"width {width} is not a multiple of heads {heads}")
        self.width, self.heads, self.causal = width, heads, causal
        self.attention = ops.attention if attention is None else attention
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, std=width**-0.5, **types)
        self.out = Linear(width, width, std=(2 * depth * width) ** -0.5, **types)

    def __call__(self, x: Array, key_bias: Array | None = None) -> Array:
        """`key_bias` float32 [B, L] is added to the scaled scores of each token as a key; None is 0."""
        qkv = checkpoint_name(self.qkv(x), "qkv")
        # split, not slices: the gradient of split is one concatenation, that of slices a sum of padded arrays.
        q, k, v = map(self._by_head, jnp.split(qkv, 3, axis=-1))
        if key_bias is None:
            y = self.attention(q, k, v, causal=self.causal)
        else:
            y = attend_by_channels(self.attention, q, k, v, key_bias, self.causal)
        return checkpoint_name(self.out(y.reshape(x.shape)), "attn_out")

    def with_keys(self, x: Array, key_bias: Array | None = None) -> tuple[Array, Array, Array]:
        """`__call__`, and the projected queries and keys [B, L, W] of full width, before heads are split.

        Used where tokens are reduced; no gradient flows to `key_bias`.
        """
        q, k, v = jnp.split(checkpoint_name(self.qkv(x), "qkv"), 3, axis=-1)
        y = self._attend(q, k, v, key_bias, self.causal)
        return checkpoint_name(self.out(y), "attn_out"), q, k

    def read(self, query: Array, x: Array, key_bias: Array | None = None) -> Array:
        """Cross-attention with the same parameters: query [B, M, W] over x [B, L, W] -> [B, M, W]; `key_bias` as above."""
        q, kv = columns(self.qkv, query, 0, self.width), columns(self.qkv, x, self.width, None)
        k, v = jnp.split(kv, 2, axis=-1)
        return self.out(self._attend(q, k, v, key_bias, False))

    def _attend(self, q: Array, k: Array, v: Array, key_bias: Array | None, causal: bool) -> Array:
        """q [B, M, W], k and v [B, L, W] -> [B, M, W]."""
        heads = [self._by_head(each) for each in (q, k, v)]
        if key_bias is None:
            return self.attention(*heads, causal=causal).reshape(q.shape)
        return attend(self.attention, heads[0], heads[1], heads[2], key_bias, causal).reshape(q.shape)

    def _by_head(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)


class Mlp(Module):
    """Linear, activation, linear; x [B, L, W] -> [B, L, W].

    `activation` is a name of `layers.ACTIVATIONS` or an elementwise function [B, L, hidden] -> [B, L, hidden]. Replace it later
    with `mlp.activation = function`, or by a module with `mlp.activation = nnx.data(module)`.
    """

    def __init__(
        self, width: int, hidden: int, *, depth: int = 1, activation: str | Activation = "gelu", dtype: DType = None,
        param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if not callable(activation) and activation not in ACTIVATIONS:
            raise ModelError(f"activation {activation!r} must be one of {tuple(ACTIVATIONS)}, or a function")
        self.activation = activation if callable(activation) else ACTIVATIONS[activation]
        self.fc1 = Linear(width, hidden, std=(2 * width) ** -0.5, **types)
        self.fc2 = Linear(hidden, width, std=(2 * depth * width) ** -0.5, **types)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(checkpoint_name(self.fc1(x), "mlp_hidden")))


class Block(Module):
    """Pre-norm block: x + attn(ln1(x)), then x + mlp(ln2(x)); x [B, L, W] -> [B, L, W], in the compute dtype."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, depth: int = 1, activation: str | Activation = "gelu", eps: float = 1e-5,
        causal: bool = False, attention: AttentionFn | None = None, dtype: DType = None, param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        types = {"dtype": dtype, "param_dtype": param_dtype}
        self.ln1 = LayerNorm(width, eps, param_dtype=param_dtype)
        self.attn = Attention(width, heads, depth=depth, causal=causal, attention=attention, **types, rngs=rngs)
        self.ln2 = LayerNorm(width, eps, param_dtype=param_dtype)
        self.mlp = Mlp(width, hidden, depth=depth, activation=activation, **types, rngs=rngs)

    def __call__(self, x: Array, scale: Array | None = None, key_bias: Array | None = None) -> Array:
        """`scale` float32 [B] multiplies both residuals of each image (0 skips the block); `key_bias` as of Attention."""
        x = x + _scaled(self.attn(self.ln1(x), **_given(key_bias)), scale)
        return x + _scaled(self.mlp(self.ln2(x)), scale)

    def reduced(self, x: Array, reduce: Reduce, scale: Array | None = None, key_bias: Array | None = None) -> tuple[Array, Any]:
        """`__call__` with fewer tokens after the attention: `reduce(x, queries, keys)` -> (x [B, M, W], anything).

        Returns (x [B, M, W], what `reduce` returned besides).
        """
        y, q, k = self.attn.with_keys(self.ln1(x), key_bias)
        x, rest = reduce(x + _scaled(y, scale), q, k)
        return x + _scaled(self.mlp(self.ln2(x)), scale), rest


class PostNormBlock(Block):
    """Post-norm block of BERT, with the parameters of Block: x = ln1(x + attn(x)), then ln2(x + mlp(x))."""

    def __call__(self, x: Array, scale: Array | None = None, key_bias: Array | None = None) -> Array:
        """Arguments as of Block."""
        x = self.ln1(x + _scaled(self.attn(x, **_given(key_bias)), scale))
        return self.ln2(x + _scaled(self.mlp(x), scale))

    def reduced(self, x: Array, reduce: Reduce, scale: Array | None = None, key_bias: Array | None = None) -> tuple[Array, Any]:
        """As of Block."""
        y, q, k = self.attn.with_keys(x, key_bias)
        x, rest = reduce(self.ln1(x + _scaled(y, scale)), q, k)
        return self.ln2(x + _scaled(self.mlp(x), scale)), rest


def _given(key_bias: Array | None) -> dict[str, Array]:
    """The argument `key_bias`, left out where there is none: an attention module of the user need not know it."""
    return {} if key_bias is None else {"key_bias": key_bias}


def _scaled(residual: Array, scale: Array | None) -> Array:
    return residual if scale is None else (scale[:, None, None] * residual).astype(residual.dtype)


def block_scales(key: Array, batch: int, depth: int, dropout: float) -> Array:
    """Returns residual scales float32 [batch, depth] of stochastic depth (Huang et al. 2016, arXiv:1603.09382).

    Block i of n is skipped for an image with probability p = dropout i / (n - 1), increasing with depth as in LayerSkip
    (Elhoushi et al. 2024, arXiv:2404.16710): 0 for the first block, `dropout` for the last. Kept residuals are scaled by
    1 / (1 - p), so that the expected residual is that without dropout.
    """
    chance = dropout * jnp.arange(depth) / max(depth - 1, 1)
    return jnp.where(jax.random.uniform(key, (batch, depth)) < chance, 0.0, 1 / (1 - chance))


def run_blocks(
    blocks: Sequence[nnx.Module],
    x: Array,
    wanted: Iterable[int],
    *,
    execution: Execution,
    start: int = 0,
    scales: Array | None = None,
    key_bias: Array | None = None,
) -> dict[int, Array]:
    """Runs the blocks up to max(wanted): x [B, L, W] -> {executed blocks: [B, L, W]} for each of `wanted`.

    Args:
        blocks: modules that map x -> x or, with `scales`, (x, scale [B]) -> x.
        wanted: numbers of executed blocks, none below `start`.
        execution: remat, scan and sharding.
        start: blocks executed already.
        scales: float32 [B, blocks], multiplies the residuals of each image in each block; None is 1.
        key_bias: float32 [B, L], passed to every block; None is 0.

    Raises ValueError if `execution` scans over blocks that differ, or uses scan or remat with blocks that have non-parameter
    state.
    """
    taps = {}
    for stop in sorted(set(wanted)):
        own = None if scales is None else scales[:, start:stop].T
        x = taps[stop] = _run(blocks[start:stop], x, own, execution, start, key_bias)
        start = stop
    return taps


def _run(
    blocks: Sequence[nnx.Module], x: Array, scales: Array | None, execution: Execution, first: int, key_bias: Array | None
) -> Array:
    """Runs all of `blocks` on x; `first` is the index of the first one in the tower; scales [blocks, B]."""
    place = lambda x: placed(x, execution)
    bias = _given(key_bias)
    run = lambda block, x, scale: place(block(place(x), **bias) if scale is None else block(place(x), scale, **bias))
    scan = execution.scan and len(blocks) > 1
    if not scan and execution.remat == "none":
        for i, block in enumerate(blocks):
            x = run(block, x, None if scales is None else scales[i])
        return x
    split = [nnx.split(block) for block in blocks]
    params = [nnx.to_pure_dict(state) for _, state in split]
    for i, block in enumerate(blocks, first):
        _require_parameters_only(block, i, execution)

    def one_of(i: int) -> Callable:
        def pure(x: Array, p: Any, scale: Array | None) -> Array:
            block = nnx.merge(split[i][0], p)
            y = run(block, x, scale)
            _require_parameters_only(block, first + i, execution)  # `sow` adds state during the call
            return y

        return _rematerialised(pure, execution.remat, scan)

    if not scan:
        for i, p in enumerate(params):
            x = one_of(i)(x, p, None if scales is None else scales[i])
        return x
    _require_equal([graph for graph, _ in split], params, first)
    # Matrices that the layer casts anyway are cast before stacking, because the stack is a copy.
    cast = {
        (*path, "kernel") for path, layer in nnx.iter_modules(blocks[0]) if type(layer) is Linear and layer.dtype == x.dtype
    }

    def stack(path: Any, *leaves: Array) -> Array:
        keys = tuple(part.key for part in path)
        return jnp.stack([leaf.astype(x.dtype) if keys in cast else leaf for leaf in leaves])

    stacked = jax.tree_util.tree_map_with_path(stack, *params)
    one = one_of(0)
    return jax.lax.scan(lambda x, each: (one(x, *each), None), x, (stacked, scales))[0]


def run_one(block: nnx.Module, number: int, call: Callable, state: Any, execution: Execution) -> Any:
    """call(block, state) -> new state, trees of arrays, for one block that changes more than x; with the remat of `execution`.

    Raises ValueError if the block has non-parameter state, which remat would lose.
    """
    if execution.remat == "none":
        return call(block, state)
    _require_parameters_only(block, number, execution)
    graph, params = nnx.split(block)

    def pure(state: Any, p: Any) -> Any:
        made = nnx.merge(graph, p)
        new = call(made, state)
        _require_parameters_only(made, number, execution)
        return new

    return _rematerialised(pure, execution.remat, False)(state, nnx.to_pure_dict(params))


def placed(x: Array, execution: Execution) -> Array:
    """x [B, L, W] with the sharding constraint of `execution`."""
    return x if execution.sharding is None else jax.lax.with_sharding_constraint(x, execution.sharding)


def require_blocks(blocks: Sequence, depth: int) -> None:
    """Raises ValueError if blocks were added or removed, because exits are numbered by blocks."""
    if len(blocks) != depth:
        raise ValueError(
            f"this tower was built with {depth} blocks and now has {len(blocks)}; blocks may be replaced but not added or "
            "removed; to change the depth, build it with dataclasses.replace(arch, depth=...)"
        )


def _require_equal(graphs: Sequence, params: Sequence, first: int) -> None:
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in params]
    apart = [first + i for i in range(1, len(graphs)) if graphs[i] != graphs[0] or shapes[i] != shapes[0]]
    if apart:
        raise ValueError(
            f"scan needs equal blocks, but blocks {', '.join(map(str, apart))} differ from block {first}; "
            "run them one by one: Execution(scan=False), config.train.scan_blocks=False"
        )


def _require_parameters_only(block: nnx.Module, number: int, execution: Execution) -> None:
    if found := state_besides_parameters(block):
        raise ValueError(
            f"block {number} has non-parameter state ({found}), which {execution.how} would lose; run blocks one by one "
            "without remat: Execution('none', scan=False)"
        )


def _rematerialised(block: Callable, remat: str, in_loop: bool) -> Callable:
    if remat == "none":
        return block
    # A policy by name, because policies for all dots would also store those of attention, and because named values are stored
    # in the compute dtype, while the products themselves are float32.
    policy = jax.checkpoint_policies.save_only_these_names(*_PRODUCTS) if remat == "dots" else None
    return jax.checkpoint(block, policy=policy, prevent_cse=not in_loop)


class AttentionPool(Module):
    """SigLIP's attention pool: a learned query (probe) attends to all tokens, then a residual MLP; [B, L, W] -> [B, W]."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, activation: str | Activation = "gelu", eps: float = 1e-5,
        attention: AttentionFn | None = None, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        types = {"dtype": dtype, "param_dtype": param_dtype}
        self.probe = draw(rngs, (width,), width**-0.5, param_dtype)
        self.attn = Attention(width, heads, attention=attention, **types, rngs=rngs)
        self.ln = LayerNorm(width, eps, param_dtype=param_dtype)
        self.mlp = Mlp(width, hidden, activation=activation, **types, rngs=rngs)

    def __call__(self, x: Array, key_bias: Array | None = None) -> Array:
        """`key_bias` float32 [B, L]: the logarithms of the sizes of merged tokens; None is 0."""
        y = self.attn.read(jnp.broadcast_to(self.probe[...], (x.shape[0], 1, x.shape[2])), x, key_bias)
        return (y + self.mlp(self.ln(y)))[:, 0]
