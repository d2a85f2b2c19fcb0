"""How programs are compiled for the machine at hand: options of XLA's CPU backend that pay on some processors only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax

_BF16 = frozenset(("amx_bf16", "avx512_bf16", "bf16"))  # x86's, x86's, ARM's


def bf16_instructions(cpuinfo: str) -> bool:
    """Whether the text of /proc/cpuinfo lists instructions that multiply bf16 matrices."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return any(key.strip() in ("flags", "Features") and not _BF16.isdisjoint(value.split()) for key, _, value in lines)


@cache
def has_bf16_instructions() -> bool:
    """Whether this machine's processor multiplies bf16 matrices in hardware; true where the system does not tell."""
    path = Path("/proc/cpuinfo")
    return bf16_instructions(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else True


# XLA hands matrix products, reductions and what lies around them to YNNPACK. For products that is what uses a processor's bf16
# instructions; without them the backend's own are faster, most of all in bf16 (jax 0.10.2). Its reductions are always faster.
_REDUCTIONS_ONLY = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@cache
def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit` that make programs of the default backend fast on this machine; often none."""
    if jax.default_backend() != "cpu" or has_bf16_instructions():
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_REDUCTIONS_ONLY)()
    except jax.errors.JaxRuntimeError:  # a release of XLA that has another name for it, or no YNNPACK
        return {}
    return _REDUCTIONS_ONLY


def jit_for_host(function: Callable, **kwargs: Any) -> Callable:
    """`jax.jit(function, **kwargs)` with `compiler_options`; not to be called inside a traced function."""
    return jax.jit(function, compiler_options=compiler_options() or None, **kwargs)
