"""The tower arithmetic: values against numpy, gradients against plain autodiff, dot operand dtypes from the jaxpr.

Law: 1e-5 in float32. Every bf16 dot form runs both ways here, because some forms have no kernel on CPU.
"""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax.models import depthwise, ops
from tests.support.jaxprs import equations

F32, BF16 = jnp.float32, jnp.bfloat16
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def normal(*shape, seed=0, dtype=F32):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape), dtype)


def close(actual, expected, scale=1.0, **tolerance):
    """Compare trees of arrays; `scale` divides both, for values far from unit size."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64) / scale, np.asarray(b, np.float64) / scale, **(tolerance or TOLERANCE)
        ),
        actual,
        expected,
    )


def gradients(function, *args, seed=7):
    """Jitted gradients of a random projection of `function(*args)` with respect to every argument."""
    weight = normal(*jax.eval_shape(function, *args).shape, seed=seed)
    scalar = lambda *a: (function(*a).astype(F32) * weight).sum()
    return jax.jit(jax.grad(scalar, argnums=tuple(range(len(args)))))(*args)


def plain_attention(q, k, v, causal):
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("blhk,bmhk->bhlm", q, k) * q.shape[-1] ** -0.5
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
        return jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores), v)


def plain_layer_norm(x, scale, bias, eps):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * scale + bias


def block(params, x, dtype, causal=False):
    """A pre-norm transformer block, four heads."""
    batch, length, width = x.shape
    h = ops.layer_norm(x, params["scale"], params["shift"], eps=1e-5, dtype=dtype)
    qkv = jnp.split(ops.linear(h, params["qkv"], params["qkv_bias"], dtype=dtype), 3, axis=-1)
    q, k, v = (t.reshape(batch, length, 4, -1) for t in qkv)
    x = x + ops.linear(ops.attention(q, k, v, causal=causal, dtype=dtype).reshape(x.shape), params["out"], dtype=dtype)
    h = ops.gelu_erf(ops.linear(x, params["up"], None, dtype=dtype))
    return x + ops.linear(h, params["down"], None, dtype=dtype)


def block_params(width=32):
    shapes = dict(qkv=(width, 3 * width), out=(width, width), up=(width, 4 * width), down=(4 * width, width))
    params = {name: normal(*shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
    return params | {"scale": jnp.ones(width), "shift": jnp.zeros(width), "qkv_bias": normal(3 * width)}


@pytest.mark.parametrize("bias", [False, True])
def test_linear_float32(bias):
    x, kernel, b = normal(2, 5, 24), normal(24, 40), normal(40)
    args = (x, kernel, b) if bias else (x, kernel)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + (np.asarray(b) if bias else 0)
    close(ops.linear(*args, dtype=F32), expected)
    plain = lambda x, k, *b: jnp.matmul(x, k, precision="highest") + (b[0] if b else 0)
    close(gradients(lambda *a: ops.linear(*a, dtype=F32), *args), gradients(plain, *args), scale=5.0)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_float32(causal):
    q, k, v = (normal(2, 9, 3, 8, seed=s) for s in range(3))
    scores = np.einsum("blhk,bmhk->bhlm", *(np.asarray(t, np.float64) for t in (q, k))) / np.sqrt(8)
    if causal:
        scores = np.where(np.tril(np.ones((9, 9), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhlm,bmhk->blhk", weights / weights.sum(-1, keepdims=True), np.asarray(v, np.float64))
    attend = lambda q, k, v: ops.attention(q, k, v, causal=causal, dtype=F32)
    close(attend(q, k, v), expected)
    close(gradients(attend, q, k, v), gradients(lambda *a: plain_attention(*a, causal), q, k, v))


def test_causal_attention_ignores_later_tokens():
    q, k, v = (normal(1, 6, 2, 4, seed=s) for s in range(3))
    changed = ops.attention(q, k.at[:, 4:].add(3.0), v.at[:, 4:].add(3.0), causal=True, dtype=F32)
    close(changed[:, :4], ops.attention(q, k, v, causal=True, dtype=F32)[:, :4])


def test_attention_survives_large_scores():
    q, k, v = (100.0 * normal(1, 4, 2, 8, seed=s) for s in range(3))
    out = gradients(lambda *a: ops.attention(*a, dtype=F32), q, k, v)
    assert all(np.isfinite(t).all() for t in out)


def test_bf16_dots_have_no_float32_operand():
    params, x = block_params(), normal(2, 7, 32)
    loss = lambda p, x: (block(p, x, BF16, causal=True).astype(F32) ** 2).sum()
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    dots = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) >= 3 * 6  # six products forward, twelve backward
    for dot in dots:
        assert [v.aval.dtype for v in dot.invars] == [BF16, BF16], dot
        assert dot.outvars[0].aval.dtype == F32, dot


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the CPU compiler's text")
def cpu_multiplies_bf16() -> bool:
    """Whether this processor has bf16 instructions; without them XLA computes such dots in float32, as it should."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and bool({"amx_bf16", "avx512_bf16"} & set(cpuinfo.read_text().split()))


@pytest.mark.skipif(not cpu_multiplies_bf16(), reason="this processor has no bf16 instructions")
def test_xla_keeps_bf16_dots_on_cpu():
    """XLA converts an operand to float32 where it finds a layout it does not like; such a dot is several times slower."""
    params, x = block_params(128), normal(2, 64, 128)
    loss = lambda p, x: (block(p, x, BF16, causal=True).astype(F32) ** 2).sum()
    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile().as_text()
    dtypes = dict(re.findall(r"%(\S+) = (\w+)\[", text))
    operands = re.findall(r" dot\(%([^,\s]+), %([^)\s]+)\)", text)
    assert len(operands) >= 18
    assert {dtypes[name] for pair in operands for name in pair} == {"bf16"}


def test_bf16_block_is_close_to_float32():
    params, x = block_params(), normal(2, 7, 32)
    run = lambda dtype: gradients(lambda p, x: block(p, x, dtype), params, x)
    half, full = run(BF16), run(F32)
    assert all(g.dtype == F32 for g in jax.tree.leaves(half))
    for h, f in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert np.linalg.norm(h - f) < 0.03 * np.linalg.norm(f)


@pytest.mark.parametrize("dot", [ops.dot, ops.dot_t])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_every_bf16_dot_runs_both_ways_whatever_surrounds_it(dot, batch):
    """A transpose before or after a dot must not turn it into a form that has no kernel."""
    lhs, rhs = normal(*batch, 48, 32), normal(*batch, *((64, 32) if dot is ops.dot_t else (32, 64)))
    swap = lambda t: jnp.swapaxes(t, -1, -2)
    for before_l, before_r, after in itertools.product([False, True], repeat=3):

        def apply(a, b):
            out = dot(swap(a) if before_l else a, swap(b) if before_r else b, BF16)
            return swap(out) if after else out

        args = (swap(lhs) if before_l else lhs, swap(rhs) if before_r else rhs)
        da, db = gradients(lambda a, b: dot(a, b, BF16), lhs, rhs)
        out = jax.jit(apply)(*args)
        close(swap(out) if after else out, dot(lhs, rhs, BF16), rtol=1e-3, atol=1e-3)
        weight = normal(*batch, 48, 64, seed=7)
        scalar = lambda a, b: (apply(a, b) * (swap(weight) if after else weight)).sum()
        ga, gb = jax.jit(jax.grad(scalar, argnums=(0, 1)))(*args)
        close(swap(ga) if before_l else ga, da, rtol=1e-3, atol=1e-3)
        close(swap(gb) if before_r else gb, db, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_bf16_linear_of_a_few_rows(rows):
    x, kernel = normal(rows, 32), normal(32, 16)
    out = jax.jit(lambda x, k: ops.linear(x, k, dtype=BF16))(x, kernel)
    close(out, x @ kernel, rtol=0.05, atol=0.1)
    found = gradients(lambda x, k: ops.linear(x, k, dtype=BF16), x, kernel)
    close(found, gradients(jnp.matmul, x, kernel), rtol=0.05, atol=0.1)


# Widths below, at and above the gradient's tile, and sizes that are not a multiple of it.
@pytest.mark.parametrize("shape", [(2, 14, 14, 8), (1, 7, 7, 4), (2, 9, 5, 3), (1, 3, 130, 2), (1, 2, 2, 5)])
def test_depthwise_paths_agree(shape):
    x, kernel, g = normal(*shape), normal(7, 7, 1, shape[-1]), normal(*shape, seed=3)
    conv, pull = jax.vjp(depthwise._conv, x, kernel)
    close(jax.jit(depthwise._shifted_sum)(x, kernel), conv, scale=10.0)
    dx, dk = pull(g)
    taps = float(np.sqrt(np.prod(shape[:3])))
    close(jax.jit(depthwise._kernel_gradient_tiles)(x, kernel, g), dk, scale=taps)
    close(jax.jit(depthwise._kernel_gradient_conv)(x, kernel, g), dk, scale=taps)
    dx_op, dk_op = jax.jit(lambda *a: jax.vjp(lambda x, k: depthwise.depthwise_conv(x, k, dtype=F32), *a)[1](g))(x, kernel)
    close(dx_op, dx, scale=10.0)
    close(dk_op, dk, scale=taps)


def test_depthwise_against_numpy():
    x, kernel, bias = normal(2, 6, 5, 3), normal(7, 7, 1, 3), normal(3)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))
    expected = np.einsum("bhwcij,ijc->bhwc", windows, np.asarray(kernel, np.float64)[:, :, 0]) + np.asarray(bias)
    close(depthwise.depthwise_conv(x, kernel, bias, dtype=F32), expected)
    half = depthwise.depthwise_conv(x, kernel, bias, dtype=BF16)
    assert half.dtype == BF16
    close(half, expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("shape", [(7, 7, 4, 1), (6, 6, 1, 4), (7, 7, 1, 3)])
def test_depthwise_names_a_wrong_kernel(shape):
    with pytest.raises(ValueError, match=r"kernel of shape \[odd, odd, 1, 4\]"):
        depthwise.depthwise_conv(jnp.zeros((1, 8, 8, 4)), jnp.zeros(shape), dtype=F32)


def test_layer_norm():
    x, scale, bias = 3 * normal(2, 5, 24) + 1, normal(24), normal(24, seed=1)
    close(ops.layer_norm(x, scale, bias, eps=1e-5), plain_layer_norm(np.asarray(x, np.float64), scale, bias, 1e-5))
    actual = gradients(lambda *a: ops.layer_norm(*a, eps=1e-5), x, scale, bias)
    close(actual, gradients(lambda *a: plain_layer_norm(*a, 1e-5), x, scale, bias))
    assert ops.layer_norm(x, scale, bias, eps=1e-5, dtype=BF16).dtype == BF16
    assert ops.layer_norm(x.astype(BF16), scale, bias, eps=1e-5).dtype == BF16


@pytest.mark.parametrize(
    "function, plain",
    [
        (ops.gelu_erf, lambda x: jax.nn.gelu(x, approximate=False)),
        (ops.gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True)),
        (ops.quick_gelu, lambda x: x * jax.nn.sigmoid(1.702 * x)),
    ],
)
def test_activations(function, plain):
    x = jnp.linspace(-8, 8, 1001)
    close(function(x), plain(x))
    close(gradients(function, x), gradients(plain, x))
    half = function(x.astype(BF16))
    assert half.dtype == BF16
    close(half, plain(x), rtol=0.02, atol=0.02)
