"""Compiler options for the current machine: settings of XLA's CPU backend that are faster only on some processors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax

_BF16 = frozenset(("amx_bf16", "avx512_bf16", "bf16"))  # x86's, x86's, ARM's


def bf16_instructions(cpuinfo: str) -> bool:
    """Returns whether the text of /proc/cpuinfo lists bf16 matrix or dot-product instructions."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return any(key.strip() in ("flags", "Features") and not _BF16.isdisjoint(value.split()) for key, _, value in lines)


@cache
def has_bf16_instructions() -> bool:
    """Returns whether the processor has bf16 matrix or dot-product instructions; True if /proc/cpuinfo does not exist."""
    path = Path("/proc/cpuinfo")
    return bf16_instructions(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else True


# XLA fuses matrix products and reductions into YNNPACK calls. For products this uses the bf16 instructions of a processor;
# without them XLA's own kernels are faster, especially in bf16 (jax 0.10.2). YNNPACK's reductions are always faster.
_REDUCTIONS_ONLY = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@cache
def compiler_options() -> dict[str, Any]:
    """Returns the `compiler_options` for `jax.jit` that are fastest on this machine's default backend; often empty."""
    if jax.default_backend() != "cpu" or has_bf16_instructions():
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_REDUCTIONS_ONLY)()
    except jax.errors.JaxRuntimeError:  # this XLA release names the option differently or has no YNNPACK
        return {}
    return _REDUCTIONS_ONLY


def jit_for_host(function: Callable, **kwargs: Any) -> Callable:
    """Returns `jax.jit(function, **kwargs)` with `compiler_options`; must not be called inside a traced function."""
    return jax.jit(function, compiler_options=compiler_options() or None, **kwargs)
