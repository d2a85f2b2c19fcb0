"""Every op in both modes of differentiation, to second order, batched, against the same arithmetic in plain jax.numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax.models import depthwise, ops

F32 = jnp.float32
HIGHEST = jax.lax.Precision.HIGHEST


def plain_attention(q, k, v, causal):
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k, precision=HIGHEST) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores), v, precision=HIGHEST)


def plain_norm(x, scale, bias):
    y = x - x.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5) * scale + bias


def plain_conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


QKV = ((2, 3, 2, 4),) * 3
# name: (ours, plain, shapes of the arguments)
CASES = {
    "dot": (lambda a, b: ops.dot(a, b, F32), lambda a, b: jnp.matmul(a, b, precision=HIGHEST), ((2, 3, 4), (2, 4, 5))),
    "dot_t": (lambda a, b: ops.dot_t(a, b, F32), lambda a, b: a @ jnp.swapaxes(b, -1, -2), ((3, 4), (5, 4))),
    "linear": (lambda x, k, b: ops.linear(x, k, b, dtype=F32), lambda x, k, b: x @ k + b, ((2, 3, 4), (4, 5), (5,))),
    "attention": (lambda q, k, v: ops.attention(q, k, v, dtype=F32), lambda q, k, v: plain_attention(q, k, v, False), QKV),
    "causal": (
        lambda q, k, v: ops.attention(q, k, v, causal=True, dtype=F32), lambda q, k, v: plain_attention(q, k, v, True), QKV,
    ),
    "depthwise": (lambda x, k: depthwise.depthwise_conv(x, k, dtype=F32), plain_conv, ((2, 5, 4, 3), (3, 3, 1, 3))),
    "layer_norm": (lambda x, s, b: ops.layer_norm(x, s, b, eps=1e-5), plain_norm, ((3, 6), (6,), (6,))),
    "gelu": (ops.gelu_erf, lambda x: jax.nn.gelu(x, approximate=False), ((3, 4),)),
    "gelu_tanh": (ops.gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True), ((3, 4),)),
    "quick_gelu": (ops.quick_gelu, lambda x: x * jax.nn.sigmoid(1.702 * x), ((3, 4),)),
}  # fmt: skip


def drawn(shapes, seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), F32) for shape in shapes]


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def loss(function, shape_seed=7):
    def scalar(*args):
        out = function(*args)
        return jnp.sum(out * drawn([out.shape], shape_seed)[0]) + jnp.sum(jnp.square(out))

    return scalar


@pytest.mark.parametrize("name", CASES)
def test_both_modes_to_second_order_and_batched(name):
    ours, plain, shapes = CASES[name]
    args, tangents = drawn(shapes, 0), drawn(shapes, 1)
    every = tuple(range(len(args)))

    @jax.jit
    def derivatives(args, tangents):
        def of(function):
            scalar = loss(function)
            gradient = jax.grad(scalar, every)
            push = lambda *args: jax.jvp(function, args, tuple(tangents))[1]
            batch = [jnp.stack([a, 2 * a + 0.1]) for a in args]
            return {
                "jvp": jax.jvp(function, tuple(args), tuple(tangents)),
                "one argument": jax.jvp(lambda x: function(x, *args[1:]), (args[0],), (tangents[0],))[1],
                "last argument": jax.jvp(lambda x: function(*args[:-1], x), (args[-1],), (tangents[-1],))[1],
                "grad": gradient(*args),
                "hessian-vector": jax.jvp(gradient, tuple(args), tuple(tangents))[1],
                "grad of grad": jax.grad(lambda *a: sum(jnp.sum(jnp.sin(g)) for g in gradient(*a)), every)(*args),
                "jvp of jvp": jax.jvp(push, tuple(args), tuple(tangents))[1],
                "grad of jvp": jax.grad(lambda *a: jnp.sum(jnp.sin(push(*a))), every)(*args),
                "vmap of grad": jax.vmap(gradient)(*batch),
                "vmap of jvp": jax.vmap(lambda *a: jax.jvp(function, a, tuple(tangents))[1])(*batch),
                "grad through vmap": jax.grad(
                    lambda x: jnp.sum(jnp.sin(jax.vmap(lambda b: function(x, *b))(batch[1:]))) if batch[1:] else jnp.sum(x)
                )(args[0]),
            }

        return of(ours), of(plain)

    found, expected = derivatives(args, tangents)
    for mode in found:
        close(found[mode], expected[mode])


def test_eager_forward_mode():
    x, t = drawn([(3, 4)], 0)[0], drawn([(3, 4)], 1)[0]
    close(jax.jvp(ops.quick_gelu, (x,), (t,))[1], jax.jvp(lambda x: x * jax.nn.sigmoid(1.702 * x), (x,), (t,))[1])


def test_forward_mode_in_bfloat16_is_near_float32():
    args, tangents = drawn(QKV, 0), drawn(QKV, 1)
    exact = jax.jvp(lambda *a: ops.attention(*a, dtype=F32), args, tangents)[1]
    found = jax.jit(lambda a, t: jax.jvp(lambda *a: ops.attention(*a, dtype=jnp.bfloat16), a, t)[1])(args, tangents)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(F32), exact, atol=0.1)
