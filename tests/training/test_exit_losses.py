"""Distillation and the mixed gallery against float64 arithmetic, and what the clip task makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.config import ClipConfig, LossConfig, MeshConfig
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.parallel.mesh import make_mesh
from icar_jax.training.losses import contrastive
from icar_jax.training.losses import exits as exit_losses
from icar_jax.training.tasks.kinds import kind_of
from tests.support.runs import CAPTIONS, tiny_config

FULL, ROWS = 6, 5
KEY = jax.random.key(3)


def embeddings(seed=0, rows=ROWS, exits=(2, 4, FULL)):
    rng = np.random.default_rng(seed)
    unit = lambda z: (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    text = rng.standard_normal((rows, 7))
    return {e: unit(text + (8 - e) / 4 * rng.standard_normal(text.shape)) for e in exits}, unit(text)


def softmax(logits, axis):
    shifted = np.exp(logits - logits.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def reference_kl(images, text, scales):
    """(loss, {exit: gradient for its images}) in float64."""
    images, text = {e: np.float64(z) for e, z in images.items()}, np.float64(text)
    logits = {e: scales[e] * z @ text.T for e, z in images.items()}
    early, total, grads = [e for e in images if e != FULL], 0.0, {FULL: np.zeros_like(images[FULL])}
    for e in early:
        slope = 0.0
        for axis in (0, 1):
            p, q = softmax(logits[FULL], axis), softmax(logits[e], axis)
            total += (p * np.log(p / q)).sum() / len(text) / 2 / len(early)
            slope = slope + (q - p) / len(text) / 2 / len(early)
        grads[e] = scales[e] * slope @ text
    return total, grads


_kl = jax.jit(jax.value_and_grad(lambda i, t, s: exit_losses.distill_kl(i, t, s, FULL), argnums=(0, 1, 2)))
_cosine = jax.jit(jax.value_and_grad(lambda i: exit_losses.distill_cosine(i, FULL)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), scales=st.tuples(*[st.floats(1, 60)] * 3))
def test_kl_and_its_gradient_against_float64(seed, scales):
    (images, text), scales = embeddings(seed), dict(zip((2, 4, FULL), map(np.float32, scales), strict=True))
    value, (d_images, d_text, d_scales) = _kl(images, text, scales)
    expected, grads = reference_kl(images, text, scales)
    assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-5) and value >= -1e-6
    for e, grad in d_images.items():
        np.testing.assert_allclose(grad, grads[e], rtol=1e-3, atol=1e-4)
    assert not d_images[FULL].any() and not d_text.any() and not d_scales[FULL] and d_images[2].any() and d_scales[2]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_cosine_and_its_gradient_against_float64(seed):
    images, _ = embeddings(seed)
    value, grads = _cosine(images)
    expected = np.mean([1 - (np.float64(images[e]) * images[FULL]).sum(1).mean() for e in (2, 4)])
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not grads[FULL].any()
    np.testing.assert_allclose(grads[2], -images[FULL] / ROWS / 2, atol=1e-6)


def test_an_exit_that_equals_full_depth_has_nothing_to_learn():
    images, text = embeddings()
    same = {2: images[FULL], FULL: images[FULL]}
    assert float(exit_losses.distill_cosine(same, FULL)) == pytest.approx(0, abs=1e-6)
    assert float(exit_losses.distill_kl(same, text, {2: 9.0, FULL: 9.0}, FULL)) == pytest.approx(0, abs=1e-6)


def test_the_mixed_gallery_takes_each_image_whole_from_an_exit_drawn_for_it():
    images, _ = embeddings(rows=300)
    mixed = np.asarray(exit_losses.mixed_images(images, KEY))
    stacked = np.stack(list(images.values()))
    source = (stacked == mixed).all(2)  # [E, B]
    assert (source.sum(0) == 1).all()
    assert (source.sum(1) > 70).all()  # a third each; 70 lies 3.7 standard deviations below
    np.testing.assert_array_equal(mixed, exit_losses.mixed_images(images, KEY))
    assert (mixed != exit_losses.mixed_images(images, jax.random.key(4))).any()


# --- the clip task ---


def contrast(loss=None, temperature="own", key=KEY):
    """(loss, metrics, gradients for the embeddings, what went in) of the task's contrast on given embeddings."""
    config = tiny_config()
    config.clip = ClipConfig(variant="vit_demo", exits=(2, 4), patch_size=32, context_length=16, temperature=temperature)
    config.loss = loss or LossConfig()
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    task = kind_of(config).task(Tokenizer.train(CAPTIONS, 300), mesh)
    images, text = embeddings(rows=8)
    own = {"2": jnp.float32(1.0), "4": jnp.float32(1.5)} if temperature == "own" else {}
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), task.shapes)
    params |= {"logit_scale": jnp.float32(2.0), "exit_logit_scale": own}
    if config.loss.kind == "sigmoid":
        params |= {"logit_bias": jnp.float32(-3.0), "exit_logit_bias": {k: jnp.float32(-2.0) for k in own}}
    found = {"image": {str(e): z for e, z in images.items()}, "text": text}
    contrast = jax.value_and_grad(task.contrast, argnums=1, has_aux=True)
    # The ring is a program of many parts, which would be compiled one by one.
    (value, metrics), grads = (jax.jit(contrast) if config.loss.chunk else contrast)(params, found, key)
    return value, metrics, grads, (images, text, {2: np.exp(1.0), 4: np.exp(1.5), 6: np.exp(2.0)})


def test_without_weights_the_loss_is_the_sum_over_the_exits_bit_for_bit():
    value, metrics, *_, (images, text, _) = contrast()
    scales = {e: jnp.exp(jnp.float32(s)) for e, s in ((2, 1.0), (4, 1.5), (6, 2.0))}
    plain = contrastive.per_exit(images, text, scales, None, kind="softmax", direction="symmetric")
    weights = contrastive.exit_weights((), (2, 4, 6))
    assert value == sum(weights[e] * plain[e] for e in plain)
    assert set(metrics) == {f"{name}_{e}" for name in ("loss", "scale") for e in (2, 4, 6)}


def test_every_lever_adds_its_weight_times_its_loss_and_is_logged():
    base, *_, (images, text, scales) = contrast()
    value, metrics, *_ = contrast(LossConfig(distill_cosine=0.5, distill_kl=2.0, mixed=0.25))
    assert float(metrics["distill_cosine"]) == pytest.approx(float(exit_losses.distill_cosine(images, 6)), rel=1e-5)
    assert float(metrics["distill_kl"]) == pytest.approx(reference_kl(images, text, scales)[0], rel=1e-4)
    mixed = exit_losses.mixed_images(images, jax.random.fold_in(KEY, 1))
    expected = contrastive.contrastive(mixed, text, scales[6])  # at full depth's temperature
    assert float(metrics["loss_mixed"]) == pytest.approx(float(expected), rel=1e-5)
    parts = 0.5 * metrics["distill_cosine"] + 2.0 * metrics["distill_kl"] + 0.25 * metrics["loss_mixed"]
    assert float(value) == pytest.approx(float(base + parts), rel=1e-6)


def test_distillation_moves_the_exits_and_not_full_depth():
    *_, plain, _ = contrast()
    *_, held, _ = contrast(LossConfig(distill_cosine=1.0, distill_kl=1.0))
    np.testing.assert_allclose(held["image"]["6"], plain["image"]["6"], atol=1e-7)
    np.testing.assert_allclose(held["text"], plain["text"], atol=1e-7)
    for e in ("2", "4"):
        assert np.abs(held["image"][e] - plain["image"][e]).max() > 1e-3


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_mixed_gallery_goes_round_the_ring_too(kind):
    plain, ring = (contrast(LossConfig(kind=kind, mixed=0.5, distill_cosine=0.5, chunk=chunk)) for chunk in (0, 3))
    assert float(ring[0]) == pytest.approx(float(plain[0]), rel=1e-5)
    assert float(ring[1]["loss_mixed"]) == pytest.approx(float(plain[1]["loss_mixed"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(ring[2]), jax.tree.leaves(plain[2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_is_drawn_comes_from_the_key_alone():
    mixed = LossConfig(mixed=1.0)
    first, again, other = (contrast(mixed, key=key)[1]["loss_mixed"] for key in (KEY, KEY, jax.random.key(9)))
    assert first == again != other
