"""Fused attention: every derivative through a kernel that has only reverse mode, the rules of cuDNN, programs for CUDA."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as wrapper

from icar_jax.convert.stablehlo import export_programs
from icar_jax.errors import ModelError
from icar_jax.models import fused_attention, ops, splash_attention
from icar_jax.models.fused_attention import EVEN, cudnn_obstacle
from icar_jax.models.mesh_attention import attention_on
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import VisionArch, VisionTower
from tests.support.places import ROOT

BF16, F32 = jnp.bfloat16, jnp.float32


# --- a kernel that knows only reverse mode, once ---


def plain(q, k, v, causal, length):
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k, precision="highest") * q.shape[-1] ** -0.5
    keep = jnp.ones(scores.shape[-2:], bool)
    if causal:
        keep = jnp.tril(keep)
    keep = keep & (jnp.arange(keep.shape[1]) < length)[None]
    weights = jax.nn.softmax(jnp.where(keep, scores, -1e30))
    return jnp.einsum("bhlm,bmhk->blhk", weights, v, precision="highest"), weights


def opaque(q, k, v, causal, length):
    """Attention whose passes cannot be differentiated; like cuDNN's, the backward pass reads what the forward pass saved."""
    even = q.shape[1] % 2 == 0
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)

    def forward(q, k, v):
        assert even, "as cuDNN's wrapper, training takes only even lengths"
        lengths = jnp.full(q.shape[:1], length, jnp.int32)
        weights = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1], q.shape[1]), q.dtype)
        run = lambda q, k, v: tuple(map(np.asarray, plain(*map(jnp.asarray, (q, k, v)), causal, length)))
        out, weights = jax.pure_callback(run, (shape, weights), q, k, v)
        return out, (q, k, v, lengths, jnp.zeros(0), out, weights)

    def backward(residuals, g):
        q, k, v, _, _, out, p = residuals
        dv = jnp.einsum("bhlm,blhk->bmhk", p, g)
        dp = jnp.einsum("blhk,bmhk->bhlm", g, v)
        ds = p * (dp - jnp.swapaxes((g * out).sum(-1), 1, 2)[..., None]) * q.shape[-1] ** -0.5
        grads = jnp.einsum("bhlm,bmhk->blhk", ds, k), jnp.einsum("bhlm,blhk->bmhk", ds, q), dv
        # A callback: cannot be differentiated again.
        return jax.pure_callback(lambda *grads: tuple(2 * np.asarray(t) for t in grads), (shape,) * 3, *(t / 2 for t in grads))

    value = lambda q, k, v: jax.pure_callback(
        lambda q, k, v: np.asarray(plain(*map(jnp.asarray, (q, k, v)), causal, length)[0]), shape, q, k, v
    )
    function = jax.custom_vjp(value)
    function.defvjp(forward, backward)
    return function(q, k, v)


def formula(q, k, v, causal):
    return ops.xla_attention(q, k, v, causal=causal)


attend = fused_attention.fused(fused_attention.reverse_kernel("cpu", opaque, EVEN), formula)


def drawn(shape, count=3, seed=0, dtype=F32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(count)]


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [4, 5])
def test_every_derivative_of_a_kernel_with_reverse_mode_only(length, causal):
    args, tangents = drawn((2, length, 3, 4)), drawn((2, length, 3, 4), seed=1)
    every = (0, 1, 2)

    @jax.jit
    def derivatives(args, tangents):
        def of(function):
            scalar = lambda *args: jnp.sum(jnp.sin(function(*args)))
            gradient = jax.grad(scalar, every)
            push = lambda *args: jax.jvp(function, args, tuple(tangents))[1]
            batch = [jnp.stack([a, 2 * a + 0.1, a - 1]) for a in args]
            return {
                "value": function(*args),
                "grad": gradient(*args),
                "grad of k": jax.grad(lambda k: scalar(args[0], k, args[2]))(args[1]),
                "jvp": push(*args),
                "jvp of v": jax.jvp(lambda v: function(*args[:2], v), (args[2],), (tangents[2],))[1],
                "hessian-vector": jax.jvp(gradient, tuple(args), tuple(tangents))[1],
                "grad of grad": jax.grad(lambda *a: sum(jnp.sum(jnp.sin(g)) for g in gradient(*a)), every)(*args),
                "grad of jvp": jax.grad(lambda *a: jnp.sum(jnp.sin(push(*a))), every)(*args),
                "third": jax.jvp(lambda *a: jax.jvp(gradient, a, tuple(tangents))[1], tuple(args), tuple(tangents))[1],
                "vmap": jax.vmap(function)(*batch),
                "vmap of one": jax.vmap(lambda k: function(args[0], k, args[2]))(batch[1]),
                "vmap of grad": jax.vmap(gradient)(*batch),
                "vmap of grad of one": jax.vmap(lambda v: gradient(*args[:2], v))(batch[2]),
                "remat": jax.grad(lambda *a: jnp.sum(jax.checkpoint(scalar)(*a)), every)(*args),
            }

        return of(lambda q, k, v: attend(q, k, v, causal)), of(lambda q, k, v: formula(q, k, v, causal))

    found, expected = derivatives(args, tangents)
    for name in found:
        jax.tree.map(lambda a: np.isfinite(a).all() or pytest.fail(name), found[name])
        close(found[name], expected[name])


def test_the_kernel_runs_once_forward_and_once_backward():
    args = drawn((2, 4, 3, 4))
    text = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a, False))), (0, 1, 2))).lower(*args).compile().as_text()
    assert len(re.findall(r"custom-call\(.*callback", text)) == 2


def test_programs_for_other_platforms_contain_the_formula():
    other = fused_attention.fused(fused_attention.reverse_kernel("cuda", opaque, EVEN), formula)
    args = drawn((2, 5, 3, 4))
    close(jax.jit(lambda *a: other(*a, True))(*args), formula(*args, True))
    gradients = lambda function: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a, True))), (0, 1, 2)))(*args)
    close(gradients(other), gradients(formula))


# --- when cuDNN's can be used ---

GOOD = dict(dtype=BF16, head_dim=64, lengths=(257, 257), capability=(9, 0))


@pytest.mark.parametrize(
    "changed",
    [{}, {"dtype": jnp.float16}, {"head_dim": 72}, {"head_dim": 128}, {"head_dim": 8}, {"lengths": (77, 77)},
     {"lengths": (1024, 1024)}, {"capability": (8, 0)}, {"capability": (8, 6)}, {"capability": (12, 0)}],
)  # fmt: skip
def test_cudnn_takes(changed):
    assert cudnn_obstacle(**GOOD | changed) == ""


@pytest.mark.parametrize(
    "changed, why",
    [({"dtype": F32}, "bfloat16 and float16, not float32"), ({"dtype": jnp.float64}, "not float64"),
     ({"head_dim": 60}, "multiple of 8 up to 128 dimensions, not 60"), ({"head_dim": 136}, "not 136"),
     ({"head_dim": 0}, "not 0"), ({"lengths": (1, 257)}, "q has 1 tokens, k and v have 257"),
     ({"capability": (7, 5)}, "7.5, below 8.0"), ({"capability": None}, "no NVIDIA GPU")],
)  # fmt: skip
def test_cudnn_does_not_take(changed, why):
    assert why in cudnn_obstacle(**GOOD | changed)


def test_without_a_gpu_attention_is_xlas_to_the_bit():
    q, k, v = drawn((2, 9, 3, 8), dtype=BF16)
    jaxprs = [str(jax.make_jaxpr(lambda *a: f(*a, causal=True))(q, k, v)) for f in (ops.attention, ops.xla_attention)]
    assert jaxprs[0] == jaxprs[1]
    with pytest.raises(ModelError, match="there is no NVIDIA GPU; use icar_jax.models.ops.xla_attention"):
        ops.cudnn_attention(q, k, v)


# --- programs for CUDA, lowered without a GPU ---


@pytest.fixture
def hopper(monkeypatch):
    """Traces as on a machine with a Hopper GPU and cuDNN."""
    monkeypatch.setattr(fused_attention, "gpu_capability", lambda: (9, 0))
    monkeypatch.setattr(wrapper, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(wrapper, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(wrapper, "is_cuda_compute_capability_equal", lambda capability: False)
    fused_attention._refusal.cache_clear()
    yield
    fused_attention._refusal.cache_clear()


def lowered(function, *args, platform="cuda"):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def calls(text):
    return sorted(re.findall(r"@(__cudnn\$\w+)", text))


def gradient(function):
    return jax.grad(lambda *a: function(*a).astype(F32).sum(), (0, 1, 2))


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.mark.parametrize("causal, length, mask", [(False, 16, "NO_MASK"), (False, 17, "PADDING"), (True, 77, "PADDING_CAUSAL")])
def test_cuda_programs_call_cudnn(hopper, causal, length, mask):
    args = [jax.ShapeDtypeStruct((2, length, 4, 64), BF16)] * 3
    attention = lambda *a: ops.attention(*a, causal=causal)
    text = lowered(attention, *args)
    assert calls(text) == [FORWARD]
    assert ("PADDING" in text) is False  # only training needs even lengths
    text = lowered(gradient(attention), *args)
    assert set(calls(text)) == {FORWARD, BACKWARD} and calls(text).count(BACKWARD) == 1
    assert f"mask_type\\22: \\22{mask}\\22" in text
    assert f"x{length}x{length}x" not in text  # no weights
    assert ops.attention(*drawn((2, length, 4, 64), dtype=BF16), causal=causal).dtype == BF16  # on the CPU of that machine


@pytest.mark.parametrize("changed", [dict(dtype=F32), dict(shape=(2, 16, 4, 60))])
def test_cuda_programs_have_xlas_attention_where_cudnn_takes_none(hopper, changed):
    shape, dtype = changed.get("shape", (2, 16, 4, 64)), changed.get("dtype", BF16)
    args = [jax.ShapeDtypeStruct(shape, dtype)] * 3
    assert calls(lowered(gradient(ops.attention), *args)) == []


def test_other_derivatives_of_cuda_programs(hopper):
    args = [jax.ShapeDtypeStruct((2, 17, 4, 64), BF16)] * 3
    forward = lambda *a: jax.jvp(ops.attention, a, a)
    assert calls(lowered(forward, *args)) == [FORWARD]
    second = lambda *a: jax.jvp(gradient(ops.attention), a, a)
    assert BACKWARD in calls(lowered(second, *args))
    twice = gradient(lambda *a: sum(jnp.sin(t) for t in gradient(ops.attention)(*a)))
    assert BACKWARD in calls(lowered(twice, *args))
    mapped = jax.vmap(gradient(ops.attention), in_axes=(None, 0, None))
    stacked = jax.ShapeDtypeStruct((3, 2, 17, 4, 64), BF16)
    text = lowered(mapped, args[0], stacked, args[2])
    assert calls(text).count(BACKWARD) == 1 and "tensor<6x18x4x64xbf16>" in text


@pytest.mark.parametrize("execution", [Execution(), Execution("dots"), Execution("full", scan=True)])
def test_a_tower_trains_with_cudnn_on_cuda_only(hopper, execution):
    arch = VisionArch(32, 8, 64, 3, 2, 64, 24, exits=(1,))  # heads of 32 dimensions, 17 tokens
    tower = VisionTower.graph(arch, execution=execution, dtype=BF16)
    loss = lambda p, x: sum(jnp.sum(z.astype(F32)) for z in tower(p, x, (1, 3)).values())
    args = tower.shapes, jax.ShapeDtypeStruct((2, 32, 32, 3), F32)
    found = calls(lowered(jax.grad(loss), *args))
    assert set(found) == {FORWARD, BACKWARD}
    assert calls(lowered(jax.grad(loss), *args, platform="cpu")) == []
    assert calls(lowered(jax.grad(loss), *args, platform="tpu")) == []
    plain = VisionTower.graph(arch, execution=execution, dtype=BF16, attention=ops.xla_attention)
    loss = lambda p, x: sum(jnp.sum(z.astype(F32)) for z in plain(p, x, (1, 3)).values())
    assert calls(lowered(jax.grad(loss), *args)) == []


def test_cudnn_attention_says_what_the_wrapper_says(hopper, monkeypatch):
    def absent():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(wrapper, "check_cudnn_version", absent)
    args = [jax.ShapeDtypeStruct((2, 16, 4, 64), BF16)] * 3
    with pytest.raises(ModelError, match="cuDNN is not detected.; use"):
        jax.eval_shape(ops.cudnn_attention, *args)
    assert calls(lowered(ops.attention, *args)) == []


def test_a_symbolic_batch_keeps_xlas_attention(hopper):
    (batch,) = jax.export.symbolic_shape("batch")
    args = [jax.ShapeDtypeStruct((batch, 16, 4, 64), BF16)] * 3
    jax.export.export(jax.jit(ops.attention), platforms=("cpu", "cuda"))(*args)


def test_exported_programs_have_xlas_attention(hopper, shared_bundle, tmp_path):
    """A call of cuDNN has no promise of compatibility, and JAX cannot lower it for several platforms at once."""
    export_programs(shared_bundle, tmp_path / "out", platforms=("cpu", "cuda"), batch=2, dtype="bfloat16")
    for file in (tmp_path / "out").glob("*.stablehlo"):
        assert b"cudnn" not in file.read_bytes(), file.name


# --- splash, the kernel for TPU ---


@pytest.mark.parametrize("causal", [False, True])
def test_splash_computes_attention(causal):
    """In plain operations on the CPU: pallas interprets the kernel."""
    interpreted = fused_attention.fused(splash_attention.splash_kernel("cpu", interpret=True), formula)
    args, g = drawn((2, 130, 2, 16)), drawn((2, 130, 2, 16), 1, seed=3)[0]
    both = lambda function: jax.jit(
        lambda *a: (lambda out, pull: (out, pull(g)))(*jax.vjp(lambda *a: function(*a, causal), *a))
    )
    found, expected = both(interpreted)(*args), both(formula)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), found, expected)
    close(jax.jit(lambda *a: interpreted(*a, causal))(*args), expected[0])


@pytest.mark.parametrize("length, padded, block", [(128, 128, 128), (257, 384, 384), (1025, 1152, 384), (4096, 4096, 1024)])
def test_splash_blocks_divide_the_padded_length(length, padded, block):
    assert splash_attention.padded_length(length) == padded
    assert splash_attention._mha(padded, 2, False, False).kwargs["block_sizes"].block_q == block


def one_device():
    """A sharding over batch and heads, on one CPU device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))


def test_splash_is_for_long_bidirectional_sequences_in_bf16():
    place, faster = one_device(), splash_attention.splash_is_faster
    q = jax.ShapeDtypeStruct((2, 577, 4, 64), BF16)
    assert faster(q, q, False, place)
    assert not faster(q, q, True, place)
    assert not faster(jax.ShapeDtypeStruct((2, 1, 4, 64), BF16), q, False, place)
    short, full = jax.ShapeDtypeStruct((2, 576, 4, 64), BF16), jax.ShapeDtypeStruct((2, 577, 4, 64), F32)
    assert not faster(short, short, False, place) and not faster(full, full, False, place)


def test_off_tpu_splash_is_xlas_and_a_mesh_changes_nothing():
    assert attention_on(one_device()) is ops.attention
    args = drawn((2, 9, 3, 8))
    close(jax.jit(ops.splash_attention)(*args), ops.xla_attention(*args))
    query = args[0][:, :1]
    close(jax.jit(ops.splash_attention)(query, *args[1:]), ops.xla_attention(query, *args[1:]))


TPU_PROGRAM = """
import os, sys
os.environ.update({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
os.environ.update({"TPU_ACCELERATOR_TYPE": "v5litepod-8"})
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from icar_jax.models.mesh_attention import attention_on

devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
mesh = Mesh(devices.reshape(2, 2), ("data", "tensor"))
place = NamedSharding(mesh, P("data", None, "tensor"))
attend = attention_on(place)
loss = lambda q, k, v: attend(q, k, v, causal=False).astype(jnp.float32).sum()
for length, expected in ((577, 3), (257, 0)):  # forward pass, and two kernels of the backward pass
    args = [jax.ShapeDtypeStruct((4, length, 4, 64), jnp.bfloat16, sharding=place)] * 3
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().as_text()
    found = text.count('custom_call_target="tpu_custom_call"')
    assert found == expected, (length, found)
    assert "all-gather" not in text and "all-to-all" not in text
    text = jax.jit(loss).lower(*args).compile().as_text()
    assert "tpu_custom_call" not in text  # encoding
print("compiled")
"""


@pytest.mark.check
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")
def test_training_programs_for_tpu_contain_splash():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # libtpu does not know the flags of other tests
    command = [sys.executable, "-c", TPU_PROGRAM]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0 and "compiled" in found.stdout, found.stderr[-3000:]
