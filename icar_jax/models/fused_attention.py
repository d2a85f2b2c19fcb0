"""Attention by one fused kernel of the accelerator, differentiable like every other operation, and the rules for using it.

A fused kernel (cuDNN's flash attention) never stores the [L, L] weights. It brings its own backward pass but neither forward
mode nor second derivatives. `fused` adds both: reverse mode runs the kernel's backward pass on what its forward pass saved, and
every other derivative is that of a formula in plain operations.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from icar_jax.models.autodiff import Derivatives, with_derivatives

Array = jax.Array
Arrays = tuple[Any, ...]
Capability = tuple[int, int]  # CUDA's compute capability: (9, 0) for H100 and H200
Formula = Callable[..., Array]  # (q, k, v, causal), [B, L, H, K] each -> [B, L, H, K]

CUDNN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
CUDNN_HEAD_DIM = 128  # the largest head on every GPU; cuDNN takes 256 on Hopper, but not in all versions for training
CUDNN_CAPABILITY = (8, 0)


# --- any kernel --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A fused attention kernel; q, k, v, their cotangents and the output are [B, L, H, K] of one dtype.

    Attributes:
        platform: name of the platform that it is compiled for, as in `lax.platform_dependent`.
        value: (q, k, v, causal) -> output.
        forward: (q, k, v, causal) -> (output, *saved); saved are float arrays [B, ...] that only `backward` reads.
        backward: (q, k, v, output, *saved, cotangent, causal) -> (dq, dk, dv).
    """

    platform: str
    value: Formula
    forward: Callable[..., Arrays]
    backward: Callable[..., Arrays]


def fused(kernel: Kernel, formula: Formula) -> Formula:
    """Returns attention by `kernel`, differentiable any number of times in both modes where `formula` is.

    Programs for other platforms, such as the CPU beside a GPU, contain `formula` and its derivatives.
    """

    def here(ours: Callable, others: Callable, *args: Array) -> Any:
        return lax.platform_dependent(*args, **{kernel.platform: _one_batch(ours)}, default=others)

    def value(q: Array, k: Array, v: Array, causal: bool) -> Array:
        return here(partial(kernel.value, causal=causal), partial(formula, causal=causal), q, k, v)

    # The rule of `forward` sends no tangent through what it saved, because that of `backward` depends on q, k, v instead.
    @partial(jax.custom_jvp, nondiff_argnums=(3,))
    def forward(q: Array, k: Array, v: Array, causal: bool) -> Arrays:
        run = partial(kernel.forward, causal=causal)
        _, *saved = jax.eval_shape(run, q, k, v)

        def others(q: Array, k: Array, v: Array) -> Arrays:
            unused = q.reshape(-1)[0].astype(jnp.float32)  # varies over the same mesh axes as q, in a shard_map
            return (formula(q, k, v, causal), *(jnp.full(s.shape, unused, s.dtype) for s in saved))

        return here(run, others, q, k, v)

    @forward.defjvp
    def forward_rule(causal: bool, primals: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays]:
        out = forward(*primals, causal)
        return out, (jax.jvp(partial(formula, causal=causal), primals, tangents)[1], *map(jnp.zeros_like, out[1:]))

    def formula_backward(q: Array, k: Array, v: Array, g: Array, causal: bool) -> Arrays:
        return jax.vjp(partial(formula, causal=causal), q, k, v)[1](g)

    @partial(jax.custom_jvp, nondiff_argnums=(2,))
    def backward(residuals: Arrays, g: Array, causal: bool) -> Arrays:
        others = lambda q, k, v, *rest: formula_backward(q, k, v, rest[-1], causal)
        return here(partial(kernel.backward, causal=causal), others, *residuals, g)

    @backward.defjvp
    def backward_rule(causal: bool, primals: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays]:
        (residuals, g), (moves, dg) = primals, tangents
        run = partial(formula_backward, causal=causal)
        return backward(residuals, g, causal), jax.jvp(run, (*residuals[:3], g), (*moves[:3], dg))[1]

    def saved_forward(q: Array, k: Array, v: Array, causal: bool) -> tuple[Array, Arrays]:
        out, *saved = forward(q, k, v, causal)
        return out, (q, k, v, out, *saved)

    def tangent(residuals: Arrays, tangents: Arrays, causal: bool) -> Array:
        given = [t is not None for t in tangents]

        def of(*moving: Array) -> Array:
            rest = iter(moving)
            return formula(*(next(rest) if moves else x for x, moves in zip(residuals, given)), causal)

        pick = lambda values: tuple(x for x, moves in zip(values, given) if moves)
        return jax.jvp(of, pick(residuals), pick(tangents))[1]

    return with_derivatives(Derivatives(saved_forward, tangent, backward, value), arrays=3)


def _one_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function of arrays [B, ...]: under `jax.vmap` it is called once, with the mapped axis merged into B.

    cuDNN's own rule for vmap fails if only some of q, k, v are mapped (jax 0.10).
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: list[bool], *args: Array) -> tuple[Any, Any]:
        whole = [x if is_batched else jnp.broadcast_to(x, (size, *x.shape)) for x, is_batched in zip(args, batched)]
        out = mapped(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        return jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return mapped


# --- kernels with a derivative of their own ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a kernel takes its arrays: `lift` pads and reorders one array [B, L, H, K], `restore` undoes it for L tokens."""

    lift: Callable[[Array], Array]
    restore: Callable[[Array, int], Array]
    prepare: Callable[[Array], Array] = lambda q: q  # linear map of q before `lift`


# (q, k, v, causal, length) -> output, arrays as of `Layout.lift`; tokens from `length` on are padding.
Call = Callable[..., Array]


def reverse_kernel(platform: str, call: Call, layout: Layout, value: Formula | None = None) -> Kernel:
    """Returns the kernel of a `call` that `jax.vjp` can differentiate once; undifferentiated it is `value` (None: `call`).

    The arrays saved for the backward pass are leaves of the function that `jax.vjp` returns, which is a pytree; so the forward
    pass is not repeated, and no private name of JAX is needed.
    """

    def lifted(q: Array, k: Array, v: Array) -> Arrays:
        return layout.lift(layout.prepare(q)), layout.lift(k), layout.lift(v)

    def pulled(args: Arrays, causal: bool, length: int) -> tuple[Array, list, Any, list[int], list[int]]:
        """Output, leaves of the backward pass and their structure, places of the output and of other saved floats in them."""
        out, pull = jax.vjp(lambda q, k, v: call(q, k, v, causal, length), *args)
        leaves, tree = jax.tree.flatten(pull)
        outs = [i for i, leaf in enumerate(leaves) if leaf is out]
        known = {*outs, *(i for i, leaf in enumerate(leaves) if any(leaf is x for x in args))}
        floats = [i for i, leaf in enumerate(leaves) if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating)]
        return out, leaves, tree, outs, [i for i in floats if i not in known]

    def own_value(q: Array, k: Array, v: Array, causal: bool) -> Array:
        return layout.restore(call(*lifted(q, k, v), causal, q.shape[1]), q.shape[1])

    def forward(q: Array, k: Array, v: Array, causal: bool) -> Arrays:
        out, leaves, _, _, others = pulled(lifted(q, k, v), causal, q.shape[1])
        return (layout.restore(out, q.shape[1]), *(leaves[i] for i in others))

    def backward(q: Array, k: Array, v: Array, out: Array, *rest: Array, causal: bool) -> Arrays:
        *saved, g = rest
        args, pull_lifted = jax.vjp(lifted, q, k, v)
        # The forward pass traced here only gives the structure: everything that it computes is replaced, and so removed.
        _, leaves, tree, outs, others = pulled(args, causal, q.shape[1])
        for i, leaf in (*((i, layout.lift(out)) for i in outs), *zip(others, saved, strict=True)):
            leaves[i] = leaf
        return pull_lifted(jax.tree.unflatten(tree, leaves)(layout.lift(g)))

    return Kernel(platform, value or own_value, forward, backward)


# --- cuDNN -------------------------------------------------------------------------------------------------------------------


def _cudnn_value(q: Array, k: Array, v: Array, causal: bool) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def _cudnn_call(q: Array, k: Array, v: Array, causal: bool, length: int) -> Array:
    if length == q.shape[1]:
        return _cudnn_value(q, k, v, causal)
    lengths = jnp.full(q.shape[:1], length, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation="cudnn", query_seq_lengths=lengths, key_value_seq_lengths=lengths
    )


# JAX (0.10 and 0.11) refuses odd lengths in training, for cuDNN would need even ones if there was a bias.
EVEN = Layout(lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))), lambda x, length: x[:, :length])
CUDNN = reverse_kernel("cuda", _cudnn_call, EVEN, _cudnn_value)


def cudnn_obstacle(dtype: Any, head_dim: int, lengths: tuple[int, int], capability: Capability | None) -> str:
    """Returns why cuDNN's attention cannot be used, or "" if it can.

    Args:
        dtype: of q, k and v.
        head_dim: K.
        lengths: of q and of k and v; causal or not, they must be equal here.
        capability: compute capability of the GPU; None if there is no NVIDIA GPU.
    """
    if capability is None:
        return "there is no NVIDIA GPU"
    if capability < CUDNN_CAPABILITY:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below {CUDNN_CAPABILITY[0]}.0"
    if jnp.dtype(dtype) not in CUDNN_DTYPES:
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if head_dim % 8 or not 0 < head_dim <= CUDNN_HEAD_DIM:
        return f"it takes heads of a multiple of 8 up to {CUDNN_HEAD_DIM} dimensions, not {head_dim}"
    if lengths[0] != lengths[1]:
        return f"q has {lengths[0]} tokens, k and v have {lengths[1]}"
    return ""


def cudnn_obstacle_here(q: Array, k: Array, v: Array) -> str:
    """Returns why cuDNN's attention cannot be used for q, k, v [B, L, H, K] on this machine's GPU, or "" if it can."""
    found = cudnn_obstacle(q.dtype, q.shape[-1], (q.shape[1], k.shape[1]), gpu_capability())
    if found:
        return found
    if not all(isinstance(size, int) for size in q.shape):
        return "the batch size is symbolic"
    return _refusal(q.shape, q.dtype)


@cache
def _refusal(shape: tuple[int, ...], dtype: Any) -> str:
    """Returns what JAX's wrapper of cuDNN objects to, which knows whether cuDNN is installed and what its version supports."""
    try:
        jax.eval_shape(partial(CUDNN.forward, causal=False), *3 * (jax.ShapeDtypeStruct(shape, dtype),))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def gpu_capability() -> Capability | None:
    """Returns the compute capability of the default backend's first GPU, None if it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", "")))
    return (int(match[1]), int(match[2])) if match else None
