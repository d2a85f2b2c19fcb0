"""Splash attention, the fused TPU kernel of `jax.experimental.pallas`, as a kernel of `fused_attention`.

Lengths are padded to a multiple of 128. XLA cannot split the kernel over chips, so on a mesh it runs in a `jax.shard_map`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from icar_jax.models.fused_attention import Array, Kernel, Layout, reverse_kernel

LANES = 128  # lengths and blocks are multiples of it
LARGEST_BLOCK = 1024  # scores of one block, float32, must fit on the chip several times
FASTER_FROM = 577  # tokens in training; estimated for v5e, docs/accelerator.md


def padded_length(length: int) -> int:
    """Returns the length that the kernel computes for `length` tokens."""
    return -(-length // LANES) * LANES


def splash_is_faster(q: Array, k: Array, causal: bool, sharding: NamedSharding) -> bool:
    """Whether training with q and k [B, L, H, K], so sharded, is estimated to be faster with the kernel.

    False where the kernel cannot be used: in attention pools, and where `sharding` does not divide batch and heads.
    """
    if causal or q.shape != k.shape or q.dtype != jnp.bfloat16 or q.shape[1] < FASTER_FROM:
        return False
    try:
        sharding.shard_shape(q.shape)
    except ValueError:
        return False
    return True


def _lift(x: Array) -> Array:
    length = x.shape[1]
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded_length(length) - length), (0, 0)))


BY_HEAD = Layout(
    lift=_lift,
    restore=lambda x, length: jnp.swapaxes(x[:, :, :length], 1, 2),
    prepare=lambda q: q * q.shape[-1] ** -0.5,  # the kernel does not scale the scores
)


@cache
def _mha(length: int, heads: int, causal: bool, interpret: bool) -> Any:
    """The library's kernel for q, k, v [H, L, K], L = `length` a multiple of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    largest = min(length, LARGEST_BLOCK)
    block = next(b for b in range(largest - largest % LANES, 0, -LANES) if length % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    mask = (library.CausalMask if causal else library.FullMask)((length, length))
    with jax.ensure_compile_time_eval():  # kept beyond this trace
        return library.make_splash_mha_single_device(
            library.MultiHeadMask([mask] * heads),
            block_sizes=library.BlockSizes(**sizes),
            interpret=interpret,
        )


def splash_kernel(platform: str = "tpu", interpret: bool = False) -> Kernel:
    """Returns the kernel; `interpret` computes the same in plain operations, for tests on another `platform`."""

    def call(q: Array, k: Array, v: Array, causal: bool, length: int) -> Array:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        tokens = q.shape[2]
        ours = (jnp.arange(tokens) < length).astype(jnp.int32)
        segments = SegmentIds(q=ours, kv=ours) if length < tokens else None  # padding attends to padding only
        kernel = _mha(tokens, q.shape[1], causal, interpret)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)

    return reverse_kernel(platform, call, BY_HEAD)
