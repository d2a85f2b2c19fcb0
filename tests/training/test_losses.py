"""Contrastive losses against float64 arithmetic, plain, round the ring and accumulated, on one device and on fake meshes."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.config import ConfigError, MeshConfig
from icar_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh
from icar_jax.parallel.rules import shardings
from icar_jax.training.losses import contrastive, grad_cache, ring
from tests.support.comparing import assert_close
from tests.support.programs import on_eight_devices

KINDS = (("softmax", "symmetric"), ("softmax", "image_to_text"), ("sigmoid", "symmetric"))
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
EXIT_WEIGHTS = {3: 0.3, 6: 0.7}


def reference(image, text, scale, bias, kind, direction):
    """Loss and its gradients for image, text, scale and bias in float64, from the formulas alone."""
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    count, own = len(image), np.eye(len(image))
    cosines = image @ text.T
    if kind == "sigmoid":
        logits, sign = scale * cosines + bias, 2 * own - 1
        loss = np.logaddexp(0, -sign * logits).sum() / count
        slope = -sign / (1 + np.exp(sign * logits)) / count
    else:
        logits = scale * cosines
        rows, columns = (np.logaddexp.reduce(logits, axis=axis) for axis in (1, 0))
        slope = np.exp(logits - rows[:, None]) - own
        loss = rows.mean() - np.diag(logits).mean()
        if direction == "symmetric":
            slope = (slope + np.exp(logits - columns) - own) / 2
            loss = (loss + columns.mean() - np.diag(logits).mean()) / 2
        slope = slope / count
    d_bias = slope.sum() if kind == "sigmoid" else 0.0
    return loss, (scale * slope @ text, scale * slope.T @ image, (slope * cosines).sum(), d_bias)


def reference_per_exit(arguments, kind, direction):
    """The same for a weighted sum over exits: {exit: loss}, gradients shaped like the arguments."""
    images, text, scales, biases = arguments
    found = {e: reference(images[e], text, float(scales[e]), float(biases[e]), kind, direction) for e in images}
    part = lambda i: {e: EXIT_WEIGHTS[e] * found[e][1][i] for e in images}
    return {e: found[e][0] for e in images}, (part(0), sum(part(1).values()), part(2), part(3))


def embeddings(rows, width, noise, seed=0):
    """Unit vectors in float32: text and an image of it with noise."""
    rng = np.random.default_rng(seed)
    unit = lambda z: (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    text = rng.standard_normal((rows, width))
    return unit(text + noise * rng.standard_normal((rows, width))), unit(text)


def problem(rows=24, width=16, noise=2.0, scales=(10.0, 40.0)):
    """images, text, scales, biases for two exits. With this noise the temperatures are too low for the data: a gradient that is
    a small difference of large terms, as near the best temperature, has no 1e-5 in float32, whatever computes it."""
    images = {e: embeddings(rows, width, noise * f)[0] for e, f in zip(EXIT_WEIGHTS, (1.5, 1.0))}
    numbers = lambda values: {e: np.float32(v) for e, v in zip(EXIT_WEIGHTS, values)}
    return images, embeddings(rows, width, 0.0)[1], numbers(scales), numbers((-4.0, -10.0))


def value_and_grad(per_exit):
    """({exit: loss}, gradients of their weighted sum for all four arguments)."""

    def total(*arguments):
        values = per_exit(*arguments)
        return sum(EXIT_WEIGHTS[e] * values[e] for e in values), values

    def run(*arguments):
        grads, values = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)
        return values, grads

    return run


# --- one device ---


@pytest.mark.parametrize("kind, direction", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7]),
    noise=st.sampled_from([0.3, 1.0, 5.0]),
    scale=st.floats(1, 60),
    bias=st.floats(-15, 5),
    seed=st.integers(0, 9),
)
def test_plain_losses_against_float64(kind, direction, rows, noise, scale, bias, seed):
    image, text = embeddings(rows, 5, noise, seed)
    scale, bias = np.float32(scale), np.float32(bias)
    loss = contrastive.per_exit({1: image}, text, {1: scale}, {1: bias}, kind=kind, direction=direction)[1]
    assert float(loss) == pytest.approx(reference(image, text, scale, bias, kind, direction)[0], rel=1e-5, abs=1e-5)


def test_the_sigmoid_loss_of_a_known_case():
    """SigLIP at its start: cosines 0, scale 10, bias -10: B log(1+e^10)/B for the pairs, (B-1) log(1+e^-10) for the rest."""
    image, text = np.eye(8, dtype=np.float32)[:4], np.eye(8, dtype=np.float32)[4:]
    expected = np.log1p(np.exp(10)) + 3 * np.log1p(np.exp(-10))
    assert float(contrastive.sigmoid(image, text, 10.0, -10.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunk", [4, 5, 100])
def test_ring_on_one_device_equals_float64(chunk):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arguments = problem(12, 8)

    @jax.jit
    def both(*arguments):
        forms = {}
        for kind, direction in KINDS:
            run = lambda *a: ring.per_exit(*a, kind=kind, direction=direction, mesh=mesh, chunk=chunk)
            forms[f"{kind} {direction}"] = value_and_grad(run)(*arguments)
        return forms

    found = both(*arguments)
    for kind, direction in KINDS:
        assert_close(found[f"{kind} {direction}"], reference_per_exit(arguments, kind, direction), (kind, direction))


def test_ring_keeps_its_precision_where_the_loss_is_nearly_zero():
    """Scale 100 and images equal to their texts: losses of 1e-6 and below stay non-negative and equal to the plain ones."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arguments = problem(12, 32, noise=0.0, scales=(100.0, 100.0))
    common = {"kind": "softmax", "direction": "symmetric"}
    values, grads = jax.jit(value_and_grad(lambda *a: ring.per_exit(*a, **common, mesh=mesh, chunk=4)))(*arguments)
    plain, plain_grads = jax.jit(value_and_grad(lambda *a: contrastive.per_exit(*a, **common)))(*arguments)
    for e in values:
        assert 0 <= float(values[e]) == pytest.approx(float(plain[e]), abs=1e-5)
    for found, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        assert np.abs(found - expected).max() <= 1e-5


def test_errors_name_the_field():
    images, text, scales, biases = problem(4, 4)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    common = {"direction": "symmetric", "mesh": mesh}
    with pytest.raises(ConfigError, match="config.loss.chunk=0"):
        ring.per_exit(images, text, scales, biases, kind="softmax", chunk=0, **common)
    for call in (lambda **k: ring.per_exit(*problem(4, 4), chunk=2, **common, **k),
                 lambda **k: contrastive.per_exit(*problem(4, 4), direction="symmetric", **k)):  # fmt: skip
        with pytest.raises(ConfigError, match="config.loss.kind='sigmod'.*did you mean 'sigmoid'"):
            call(kind="sigmod")
    with pytest.raises(ConfigError, match=r"config.train.accumulate=3 does not divide the 4 rows .*multiple of 3"):
        grad_cache.value_and_grad(None, None, {}, {"image": np.zeros((4, 2))}, parts=3, mesh=mesh)


# --- eight fake devices ---


IMPORTED = "import json\nfrom tests.training import test_losses\n"


def meshes():
    for shape in MESHES:
        yield shape, make_mesh(MeshConfig(*shape))


def compare_on_meshes() -> dict:
    """Every kind of loss on every mesh, with a chunk that divides the 6 or 12 texts of a device and one that does not."""
    arguments = problem(48, 16)
    expected = {kind: reference_per_exit(arguments, *kind) for kind in KINDS}
    named = {kind: {"kind": kind[0], "direction": kind[1]} for kind in KINDS}
    forms = lambda *a: [value_and_grad(lambda *a: contrastive.per_exit(*a, **named[kind]))(*a) for kind in KINDS]
    plain = dict(zip(KINDS, jax.jit(forms)(*arguments), strict=True))
    checked = 0
    for shape, mesh in meshes():
        local, rows = 48 // batch_shards(mesh), batch_sharding(mesh)
        images, text, *numbers = arguments
        placed = (jax.device_put(images, rows), jax.device_put(text, rows), *numbers)
        cases = [(kind, chunk) for kind in KINDS for chunk in (local // 2, local - 1)]

        def form(kind, chunk):
            return value_and_grad(lambda *a: ring.per_exit(*a, **named[kind], mesh=mesh, chunk=chunk))

        found = jax.jit(lambda *a: [form(*case)(*a) for case in cases])(*placed)
        for (kind, chunk), result in zip(cases, found, strict=True):
            assert_close(result, expected[kind], (shape, kind, chunk, "against float64"))
            assert_close(result, plain[kind], (shape, kind, chunk, "against plain"))
            assert all(leaf.sharding.is_equivalent_to(rows, 2) for leaf in jax.tree.leaves(result[1][:2]))
            checked += 1
    return {"checked": checked}


@pytest.mark.check
def test_ring_equals_float64_and_plain_on_every_mesh():
    assert on_eight_devices(IMPORTED + "print(json.dumps(test_losses.compare_on_meshes()))", fast=False) == {
        "checked": len(MESHES) * len(KINDS) * 2
    }


def loss_memory() -> dict:
    """The benchmark's figures at a batch of 4096, and which collectives the ring uses."""
    sys.path.insert(0, "benchmarks")
    import loss_memory

    rows = loss_memory.measure_memory(batches=(4096,), chunks=(128,))
    compiled = loss_memory.compile_loss(loss_memory.mesh(), 4096, "softmax", 512)
    return {
        "temporary": {f"{row['kind']} {row['chunk']}": row["temp_bytes"] for row in rows}
        | {"softmax 512": compiled.memory_analysis().temp_size_in_bytes},
        "collectives": [name for name in COLLECTIVES if f" {name}(" in compiled.as_text()],
    }


@pytest.mark.check
def test_memory_of_the_ring_is_bounded_by_chunk_and_width():
    """Temporaries of one device of 2 x 4, forward and backward: 2 exits of b = 512 rows against chunks of c texts."""
    found = on_eight_devices(IMPORTED + "print(json.dumps(test_losses.loss_memory()))", fast=False)
    temporary, (exits, local, width) = found["temporary"], (2, 512, 768)
    for kind, chunk in (("softmax", 128), ("softmax", 512), ("sigmoid", 128)):
        assert temporary[f"{kind} {chunk}"] < 4 * exits * local * (2 * chunk + 4 * width), (kind, chunk)
    for kind in ("softmax", "sigmoid"):
        assert temporary[f"{kind} 0"] > 4 * exits * local * 4096  # plain: the rows of all logits, and more
        assert temporary[f"{kind} 128"] < temporary[f"{kind} 0"] / 4
    assert found["collectives"] == ["all-reduce", "collective-permute"]  # no device ever holds all texts


# --- gradient accumulation ---


def tower_params(rng, hidden):
    init = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)
    return {
        "vision": {"fc1": {"kernel": init(192, hidden)}, "fc2": {"kernel": init(hidden, hidden)},
                   "exits": {"3": init(hidden, 16)}, "proj": {"kernel": init(hidden, 16)}},
        "text": {"embed": init(50, 16), "unused": init(3, 3)},
        "logit_scale": jnp.asarray(2.0), "exit_logit_scale": {"3": jnp.asarray(1.5)},
    }  # fmt: skip


def embed(params, batch):
    unit = lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    pixels = batch["image"].reshape(len(batch["image"]), -1) / 255.0 - 0.5
    first = jax.nn.gelu(pixels @ params["vision"]["fc1"]["kernel"])
    second = jax.nn.gelu(first @ params["vision"]["fc2"]["kernel"])
    text = params["text"]["embed"][batch["tokens"]].mean(1)
    images = {3: unit(first @ params["vision"]["exits"]["3"]), 6: unit(second @ params["vision"]["proj"]["kernel"])}
    return {"image": images, "text": unit(text)}


def contrast(params, found, per_exit=contrastive.per_exit):
    scales = {3: jnp.exp(params["exit_logit_scale"]["3"]), 6: jnp.exp(params["logit_scale"])}
    values = per_exit(found["image"], found["text"], scales, None, kind="softmax", direction="symmetric")
    return sum(EXIT_WEIGHTS[e] * values[e] for e in values), {f"loss_{e}": value for e, value in values.items()}


def tower_batch(rows):
    rng = np.random.default_rng(1)
    return {"image": rng.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8), "tokens": rng.integers(0, 50, (rows, 5))}


def accumulated(mesh, parts, per_exit=contrastive.per_exit):
    form = lambda p, found: contrast(p, found, per_exit)
    return lambda p, b: grad_cache.value_and_grad(embed, form, p, b, parts=parts, mesh=mesh)


def test_accumulated_gradient_equals_the_whole_batch():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    params, batch = tower_params(np.random.default_rng(0), 24), tower_batch(8)
    expected = jax.jit(jax.value_and_grad(lambda p: contrast(p, embed(p, batch)), has_aux=True))(params)
    for parts in (1, 2, 4):
        assert_close(jax.jit(accumulated(mesh, parts))(params, batch), expected, parts)


def test_rows_keep_their_order():
    """What `contrast` sees is the embedding of the batch in the order of the batch."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    rows = np.arange(12, dtype=np.float32)
    weighted = lambda p, x: ((p["w"] * x * rows).sum(), {"rows": x})
    run = lambda p, b: grad_cache.value_and_grad(lambda p, b: b["x"] * p["w"], weighted, p, b, parts=3, mesh=mesh)
    (loss, metrics), grads = jax.jit(run)({"w": jnp.asarray(2.0)}, {"x": rows})
    np.testing.assert_array_equal(metrics["rows"], 2 * rows)
    assert float(loss) == 4 * (rows**2).sum() and float(grads["w"]) == 4 * (rows**2).sum()


def accumulate_on_meshes() -> dict:
    """Gradients of 4 parts on every mesh, on one also of 2 under the ring, and what moves an image between devices."""
    params, batch = tower_params(np.random.default_rng(0), 96), tower_batch(64)
    expected = jax.jit(jax.value_and_grad(lambda p: contrast(p, embed(p, batch)), has_aux=True))(params)
    checked, moved = 0, []
    for shape, mesh in meshes():
        layout, rows = shardings(params, mesh), batch_sharding(mesh)
        for parts in (2, 4) if shape == (2, 4, 1) else (4,):
            per_exit = partial(ring.per_exit, mesh=mesh, chunk=5) if parts == 2 else contrastive.per_exit
            step = jax.jit(accumulated(mesh, parts, per_exit), in_shardings=(layout, rows), out_shardings=(None, layout))
            compiled = step.lower(params, batch).compile()
            assert_close(compiled(jax.device_put(params, layout), jax.device_put(batch, rows)), expected, (shape, parts))
            checked += 1
            for line in compiled.as_text().splitlines():
                line = line.split("metadata")[0]
                if any(f" {name}(" in line for name in ("all-gather", "all-to-all", "collective-permute")):
                    moved += [line] if "u8[" in line or "8,8,3]" in line or ",192]" in line else []
    return {"checked": checked, "moved": moved}


@pytest.mark.check
def test_accumulation_on_every_mesh_moves_no_image():
    assert on_eight_devices(IMPORTED + "print(json.dumps(test_losses.accumulate_on_meshes()))", fast=False) == {
        "checked": 4,
        "moved": [],
    }


def test_accumulation_holds_the_residuals_of_one_part():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    params, batch = tower_params(np.random.default_rng(0), 64), tower_batch(512)
    product = lambda p, found: (jnp.sum(found["text"] * found["image"][6]), {})
    temporary = {}
    for parts in (1, 8):
        run = lambda p, b: grad_cache.value_and_grad(embed, product, p, b, parts=parts, mesh=mesh)
        temporary[parts] = jax.jit(run).lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    assert temporary[8] < temporary[1] / 3, temporary
