"""Parts of benchmarks/accelerator.py about the device and single operations: environment, kernels, attention."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_sizes import Size, compiled, memory_bytes, peak_flops, speed, time_steps
from jax.extend.backend import get_backend

from icar_jax.config import MeshConfig
from icar_jax.models import ops
from icar_jax.models.depthwise import depthwise_conv
from icar_jax.models.encoders import unit_norm
from icar_jax.models.fused_attention import cudnn_obstacle_here
from icar_jax.models.reduction.similar import merge_similar
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.parallel.mesh import make_mesh
from icar_jax.training.losses import contrastive, ring

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
# Largest error, as a share of the largest value of the reference, whose inputs are rounded to the same dtype. A float32 result
# differs by the order of its sums; one in bfloat16 is rounded once or twice to 8 bits.
TOLERANCES = {F32: 1e-4, BF16: 2e-2}
ATTENTIONS = {"xla": ops.xla_attention, "cudnn": ops.cudnn_attention}
Named = dict[str, Any]


# --- environment -------------------------------------------------------------------------------------------------------------


def environment(size: Size, done: Named) -> Iterator[tuple[str, Callable[[], Named]]]:
    yield "machine", machine
    yield "matrix product", partial(matrix_product, size)


def machine() -> Named:
    """Describes device, memory, driver and versions."""
    device = jax.devices()[0]
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device_kind": device.device_kind, "platform": jax.default_backend(), "devices": jax.device_count(),
        "compute_capability": getattr(device, "compute_capability", None), "backend": get_backend().platform_version,
        "memory_bytes": memory_bytes("bytes_limit"), "driver": driver(), "versions": versions,
        "python": platform.python_version(), "peak_tflops": (peak_flops() or 0) / 1e12 or None,
    }  # fmt: skip


def driver() -> str | None:
    """Returns name, driver and memory of the GPU as nvidia-smi prints them; None without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return (found.stdout.strip().splitlines() or [None])[0]


def matrix_product(size: Size) -> Named:
    """Times one bf16 product of square random matrices: what the device reaches in practice."""
    n = size.product
    a, b = (jax.random.normal(jax.random.key(i), (n, n), BF16) for i in range(2))
    program = compiled(lambda a, b: ops.dot(a, b, BF16), a, b)
    found = time_steps(lambda: program.run(a, b), size)
    return {"compile_s": program.compile_s, **found, **speed(2 * n**3, found["median_s"])}


# --- correctness -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """`function(dtype, *arrays)` -> array or dict of arrays, and the shapes of the arrays."""

    function: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    dtypes: tuple[Any, ...] = (BF16, F32)


def operations(size: Size, device: Any) -> dict[str, Operation]:
    """{name: operation}, the most important first. Losses in chunks run on a mesh of `device`."""
    b, length, heads, dim = size.op
    width, rows = heads * dim, (b * length, heads * dim)
    tokens, by_head = (b, length, width), (b, length, heads, dim)
    side, kernel = size.conv

    def attended(attend: Callable, causal: bool) -> Callable[..., Any]:
        # The reference, in float32, is XLA's attention: cuDNN takes no float32.
        return lambda t, *qkv: (ops.xla_attention if t == F32 else attend)(*qkv, causal=causal, dtype=t)

    def losses(kind: str, chunk: int) -> Callable[..., Any]:
        compare: Callable = contrastive.per_exit
        if chunk:
            compare = partial(ring.per_exit, mesh=make_mesh(MeshConfig(), [device]), chunk=chunk)

        def run(_: Any, early: jax.Array, full: jax.Array, text: jax.Array) -> Any:
            same = lambda value: dict.fromkeys((1, 2), jnp.float32(value))
            images = {1: unit_norm(early), 2: unit_norm(full)}
            found = compare(images, unit_norm(text), same(20), same(-5), kind=kind, direction="symmetric")
            return {str(exit): loss for exit, loss in found.items()}

        return run

    merge = lambda t, x: merge_similar(Tokens(x, jnp.ones(x.shape[:2])), x.shape[1] // 4, True).values
    embedded = [(8 * b, width)] * 3
    xla, cudnn = ops.xla_attention, ops.cudnn_attention
    return {
        "attention cudnn": Operation(attended(cudnn, False), [by_head] * 3, (BF16,)),
        "attention cudnn causal": Operation(attended(cudnn, True), [by_head] * 3, (BF16,)),
        "attention cudnn even length": Operation(attended(cudnn, False), [(b, length - 1, heads, dim)] * 3, (BF16,)),
        "attention xla": Operation(attended(xla, False), [by_head] * 3),
        "attention xla causal": Operation(attended(xla, True), [by_head] * 3),
        "linear": Operation(lambda t, x, k, bias: ops.linear(x, k, bias, dtype=t), [tokens, (width, 2 * width), (2 * width,)]),
        "layer_norm": Operation(
            lambda t, x, scale, bias: ops.layer_norm(x, scale, bias, eps=1e-5, dtype=t), [tokens, (width,), (width,)]
        ),
        "gelu_erf": Operation(lambda t, x: ops.gelu_erf(x), [tokens]),
        "depthwise": Operation(
            lambda t, x, k: depthwise_conv(x, k, dtype=t), [(b, side, side, width), (kernel, kernel, 1, width)]
        ),
        "dot": Operation(lambda t, x, y: ops.dot(x, y, t), [rows, (width, width)]),
        "dot batched": Operation(lambda t, x, y: ops.dot(x, y, t), [(b, heads, length, dim), (b, heads, dim, length)]),
        "dot_t": Operation(lambda t, x, y: ops.dot_t(x, y, t), [rows, (4 * width, width)]),
        "gelu_tanh": Operation(lambda t, x: ops.gelu_tanh(x), [tokens]),
        "quick_gelu": Operation(lambda t, x: ops.quick_gelu(x), [tokens]),
        "softmax loss": Operation(losses("softmax", 0), embedded, (F32,)),
        "sigmoid loss": Operation(losses("sigmoid", 0), embedded, (F32,)),
        "softmax loss in chunks": Operation(losses("softmax", 2 * b), embedded, (F32,)),
        "sigmoid loss in chunks": Operation(losses("sigmoid", 2 * b), embedded, (F32,)),
        "token merging": Operation(merge, [(b, min(length, 65), width)]),
        "normalise": Operation(
            lambda t, x: ops.normalise((20 * jnp.abs(x)).astype(jnp.uint8), (0.5,) * 3, (0.3,) * 3), [(b, 32, 32, 3)], (F32,)
        ),
    }


def kernels(size: Size, done: Named) -> Iterator[tuple[str, Callable[[], Named]]]:
    for name, operation in operations(size, jax.devices()[0]).items():
        for dtype in operation.dtypes:
            yield f"{name} {dtype.name}", partial(check_operation, size, name, dtype)


def check_operation(size: Size, name: str, dtype: Any) -> Named:
    """Compares value and gradients on the device in `dtype` with the CPU's in float32, from inputs rounded to `dtype`."""
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    ours, theirs = operations(size, device)[name], operations(size, host)[name]
    if name.startswith("attention cudnn"):
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ours.shapes]
        if why := cudnn_obstacle_here(*shapes):
            return {"skipped": why}
    rng = np.random.default_rng(0)
    rounded = lambda shape: rng.standard_normal(shape, np.float32).astype(dtype)
    arrays = [rounded(shape) for shape in ours.shapes]
    results = jax.eval_shape(partial(theirs.function, F32), *(jax.ShapeDtypeStruct(x.shape, F32) for x in arrays))
    cotangents = jax.tree.map(lambda s: rounded(s.shape), results)

    def run(operation: Operation, where: Any, dtype: Any) -> Any:
        def both(arrays: Any, cotangents: Any) -> Any:
            out, pull = jax.vjp(partial(operation.function, dtype), *arrays)
            gradients = pull(jax.tree.map(lambda o, g: g.astype(o.dtype), out, cotangents))
            return {"value": out, "gradients": gradients}

        placed = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), (arrays, cotangents)), where)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(jax.jit(both)(*placed)))

    errors = jax.tree_util.tree_map(error_of, run(ours, device, dtype), run(theirs, host, F32))
    named = {jax.tree_util.keystr(path): error for path, error in jax.tree_util.tree_leaves_with_path(errors)}
    where = max(named, key=lambda path: named[path])
    largest, tolerance = named[where], TOLERANCES[dtype]
    return {
        "passed": bool(largest <= tolerance), "tolerance": tolerance, "where": where,
        "largest_error": largest if np.isfinite(largest) else None,
    }  # fmt: skip


def error_of(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference as a share of the largest expected value; inf if a value is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    most = float(np.abs(expected).max(initial=0.0))
    return float(np.abs(found - expected).max(initial=0.0)) / (most or 1.0)


# --- attention ---------------------------------------------------------------------------------------------------------------


def attention_speed(size: Size, done: Named) -> Iterator[tuple[str, Callable[[], Named]]]:
    for shape in size.attention:
        batch, length, heads, dim, causal = shape
        for backward in (True, False):
            for name in ATTENTIONS:
                what = f"{length} tokens {batch}x{heads}x{dim}{' causal' if causal else ''}"
                yield (
                    f"{what} {'gradient' if backward else 'forward'} {name}",
                    partial(time_attention, size, name, shape, backward),
                )


def time_attention(size: Size, name: str, shape: tuple[int, int, int, int, bool], backward: bool) -> Named:
    """Times attention of random bf16 inputs, or value and gradient; FLOPs are counted in full also where causal."""
    batch, length, heads, dim, causal = shape
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (batch, length, heads, dim), BF16) for key in keys)
    if name == "cudnn" and (why := cudnn_obstacle_here(q, k, v)):
        return {"skipped": why}
    attend = partial(ATTENTIONS[name], causal=causal)

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(g)

    arguments = (q, k, v, g) if backward else (q, k, v)
    program = compiled(gradient if backward else attend, *arguments)
    found = time_steps(lambda: program.run(*arguments), size)
    flops = 4 * batch * heads * length**2 * dim * (3 if backward else 1)
    rate = speed(flops, found["median_s"])
    return {"compile_s": program.compile_s, "peak_bytes": program.needed_bytes, **found, **rate}
