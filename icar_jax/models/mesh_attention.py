"""Attention of a training step on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding

from icar_jax.models import fused_attention, ops
from icar_jax.models.splash_attention import splash_is_faster, splash_kernel

Array = jax.Array

# Only what is differentiated: encoding is faster in plain operations.
_splash = fused_attention.fused(replace(splash_kernel(), value=ops.attention_formula), ops.attention_formula)


def attention_on(sharding: NamedSharding) -> Callable[..., Array]:
    """Returns the attention of a training step whose q, k and v [B, L, H, K] are sharded so, over batch and heads.

    On a mesh of TPU chips it is splash attention where the compiler's estimates are in its favour (docs/accelerator.md), each
    chip on its own part. Elsewhere it is `ops.attention`.
    """
    device: Any = next(iter(sharding.device_set))
    if device.platform != "tpu":
        return ops.attention
    mesh, spec = sharding.mesh, sharding.spec
    run = lambda q, k, v: _splash(q, k, v, False)
    split = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)

    def attend(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
        return split(q, k, v) if splash_is_faster(q, k, causal, sharding) else ops.attention(q, k, v, causal=causal)

    return attend
