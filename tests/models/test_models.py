"""Towers against plain numpy, exact parameter counts, exits that stop the program. Float32 law: 1e-5 a layer, 1e-4 a tower."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax import architectures, pytree
from icar_jax import config as cfg
from icar_jax.models import flops, variants
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXt, ConvNeXtArch
from icar_jax.models.ops import normalise
from icar_jax.models.text import TextArch
from icar_jax.models.transformer import Block
from icar_jax.models.vision import VisionArch
from tests.support import reference as ref
from tests.support.jaxprs import equations


def randomised(params, seed=0):
    """Biases, norms and scales away from their start, so that a swapped or dropped term shows."""
    rng = np.random.default_rng(seed)
    return pytree.map_with_path(
        lambda path, leaf: jnp.asarray(np.asarray(leaf) + 0.2 * rng.standard_normal(leaf.shape), jnp.float32), params
    )


def tiny_arch(pool="cls", exits=(2,), activation="gelu", temperature="own", depth=3):
    vision = VisionArch(32, 8, 32, depth, 4, 64, 24, activation, exits, pool)
    text = TextArch(12, 50, 16, 2, 2, 32, 24, activation, end_id=49)
    return ClipArch(vision, text, temperature)


@pytest.fixture
def images():
    return np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_block_against_numpy(causal, activation):
    block = Block.graph(32, 4, 48, depth=3, activation=activation, causal=causal)
    params = randomised(Block.init(jax.random.key(0), 32, 4, 48, depth=3))
    x = np.random.default_rng(2).standard_normal((2, 9, 32)).astype(np.float32)
    found = jax.jit(block)(params, x)
    expected = [ref.block(row, ref.f64(params), 4, causal, getattr(ref, activation)) for row in x.astype(np.float64)]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean", "first_patch"])
def test_vision_tower_against_numpy_at_every_exit(pool, images):
    clip = Clip.graph(tiny_arch(pool, exits=(1, 2)))
    params = randomised(Clip.init(jax.random.key(0), clip.arch))
    found = jax.jit(clip.encode_image_exits)(params, images)
    assert set(found) == {1, 2, 3}
    for exit, embeds in found.items():
        expected = [ref.vision(i, ref.f64(params)["vision"], clip.arch.vision, exit) for i in images.astype(np.float64)]
        np.testing.assert_allclose(embeds, expected, atol=1e-4)
        alone = jax.jit(clip.encode_image, static_argnums=2)(params, images, exit)
        np.testing.assert_allclose(alone, embeds, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_text_tower_against_numpy_pools_the_first_end_token(activation):
    clip = Clip.graph(tiny_arch(activation=activation))
    params = randomised(Clip.init(jax.random.key(0), clip.arch))
    # The second caption is padded with the end token, the third with zeros: neither may change the pooled position.
    tokens = np.array([[48, 1, 2, 3, 49] + [0] * 7, [48, 5, 49] + [49] * 9, [48] + [7] * 10 + [49]], np.int32)
    found = jax.jit(clip.encode_text)(params, tokens)
    expected = [ref.text(t, ref.f64(params)["text"], clip.arch.text, getattr(ref, activation)) for t in tokens]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_convnext_against_numpy(version):
    arch = ConvNeXtArch((1, 1, 2, 1), (8, 12, 16, 24), version)
    params = randomised(ConvNeXt.init(jax.random.key(0), arch))
    # 44 pixels: 11, 5, 2, 1 positions a side, so that odd sides are dropped as a strided convolution drops them.
    images = np.random.default_rng(3).standard_normal((2, 44, 44, 3)).astype(np.float32)
    found = jax.jit(ConvNeXt.graph(arch))(params, images)
    expected = [ref.convnext(i, ref.f64(params)) for i in images.astype(np.float64)]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_convnext_gradient_is_finite_where_a_channel_is_zero():
    arch = ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8), 2)
    model = ConvNeXt.graph(arch)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.shapes)
    grads = jax.jit(jax.grad(lambda p: model(p, jnp.zeros((1, 32, 32, 3))).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("head", ["classification", "regression"])
def test_complexity_heads_against_numpy(head):
    backbone = ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 12), 2)
    model = ComplexityModel.graph(ComplexityArch(backbone, head, 32))
    params = randomised(ComplexityModel.init(jax.random.key(0), model.arch))
    images = np.random.default_rng(4).standard_normal((3, 32, 32, 3)).astype(np.float32)
    p = ref.f64(params)
    expected = []
    for image in images.astype(np.float64):
        x = ref.layer_norm(ref.convnext(image, p["backbone"]), p["head"]["norm"], 1e-5)
        if head == "classification":
            a, b = ref.linear(x, p["head"]["fc"])
            expected.append(1 / (1 + np.exp(a - b)))
        else:
            x = np.maximum(ref.linear(x, p["head"]["fc1"]), 0)
            x = np.maximum(ref.linear(x, p["head"]["fc2"]), 0)
            expected.append(1 / (1 + np.exp(-ref.linear(x, p["head"]["fc3"])[0])))
    np.testing.assert_allclose(jax.jit(model.score)(params, images), expected, atol=1e-4)


def test_dropout_only_with_a_key():
    model = ComplexityModel.graph(ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8)), "regression", 32, dropout=0.5))
    params = randomised(ComplexityModel.init(jax.random.key(0), model.arch))
    x = jnp.ones((4, 32, 32, 3))
    logits = jax.jit(model.logits)
    plain = logits(params, x)
    np.testing.assert_array_equal(plain, logits(params, x))
    assert np.abs(plain - logits(params, x, jax.random.key(1))).max() > 1e-3


def test_blocks_keep_their_order_with_string_keys():
    """'10' sorts before '2': with twelve blocks reloaded from scattered string keys each block keeps its own weights."""
    clip = Clip.graph(tiny_arch(depth=12, exits=(10, 11)))
    params = randomised(Clip.init(jax.random.key(0), clip.arch))
    images = np.random.default_rng(1).standard_normal((1, 32, 32, 3)).astype(np.float32)
    flat = pytree.flatten(params)
    scattered = pytree.unflatten(dict(sorted(flat.items())))
    shuffled = {k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in scattered["vision"]["blocks"].items()}
    scattered["vision"]["blocks"] = dict(sorted(shuffled.items()))
    assert list(scattered["vision"]["blocks"])[:3] == ["0", "1", "10"]
    expected = ref.vision(images[0].astype(np.float64), ref.f64(params)["vision"], clip.arch.vision, 12)
    np.testing.assert_allclose(clip.encode_image(scattered, images)[0], expected, atol=1e-4)


def test_exit_heads_start_from_the_final_head_or_at_random():
    clip = Clip.graph(tiny_arch(exits=(1, 2)))
    final = Clip.init(jax.random.key(0), clip.arch, "final")["vision"]
    for head in final["exits"].values():
        np.testing.assert_array_equal(head["proj"]["kernel"], final["proj"]["kernel"])
        np.testing.assert_array_equal(head["ln"]["scale"], final["ln_post"]["scale"])
    random = Clip.init(jax.random.key(0), clip.arch, "random")["vision"]
    assert np.abs(random["exits"]["1"]["proj"]["kernel"] - random["proj"]["kernel"]).max() > 1e-3


def test_temperatures():
    own = Clip.graph(tiny_arch(temperature="own"))
    params = Clip.init(jax.random.key(0), own.arch)
    assert own.logit_scales(params)[2] == pytest.approx(1 / 0.07, rel=1e-5)
    params["exit_logit_scale"]["2"] = jnp.float32(9.0)
    scales = own.logit_scales(params)
    assert scales[2] == 100.0 and scales[3] == pytest.approx(1 / 0.07, rel=1e-5)
    shared = Clip.graph(tiny_arch(temperature="shared"))
    params = Clip.init(jax.random.key(0), shared.arch)
    assert "exit_logit_scale" not in params or not params["exit_logit_scale"]
    params["logit_scale"] = jnp.float32(2.0)
    assert len({float(s) for s in shared.logit_scales(params).values()}) == 1


def test_unknown_exit_is_named():
    clip = Clip.graph(tiny_arch(exits=(2,)))
    with pytest.raises(ValueError, match=r"exit=1 has no head.*\(2, 3\)"):
        clip.encode_image(clip.shapes, jnp.zeros((1, 32, 32, 3)), exit=1)


def test_the_tower_stops_at_the_requested_exit():
    """Later blocks are absent from the compiled program: their parameters are unused and the FLOPs fall with the exit."""
    clip = Clip.graph(tiny_arch(depth=6, exits=(2, 4)))
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    costs, used = {}, {}
    for exit in (2, 4, 6):
        compiled = jax.jit(lambda p, x, e=exit: clip.encode_image(p, x, e)).lower(clip.shapes, x).compile()
        costs[exit] = compiled.cost_analysis()["flops"]
        used[exit] = compiled.as_text().count("f32[32,96]")  # the q, k, v kernels that the program takes in
        closed = jax.make_jaxpr(lambda p, x, e=exit: clip.encode_image(p, x, e))(clip.shapes, x)
        names = list(pytree.flatten(clip.shapes))
        live = {str(v) for eqn in closed.jaxpr.eqns for v in eqn.invars}
        dead = {n for n, v in zip(names, closed.jaxpr.invars) if str(v) not in live}
        late = {n for n in names if n.startswith("vision/blocks/") and int(n.split("/")[2]) >= exit}
        assert late <= dead and not (dead & {n for n in names if n.startswith("vision/blocks/0/")})
    assert costs[2] < 0.45 * costs[6] and costs[2] < costs[4] < 0.8 * costs[6]
    assert used[2] < used[4] < used[6]


@pytest.mark.parametrize("exit", [2, 4, 6])
def test_counted_flops_agree_with_the_compiler(exit):
    """Matrix products dominate at this size, so the count and XLA's own analysis agree within 10%."""
    vision = VisionArch(64, 8, 128, 6, 4, 512, 64, exits=(2, 4))
    clip = Clip.graph(ClipArch(vision, TextArch(8, 50, 16, 1, 2, 32, 64, end_id=49)))
    x = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    compiled = jax.jit(lambda p, x: clip.encode_image(p, x, exit)).lower(clip.shapes, x).compile()
    counted = 4 * flops.vision_flops(vision, exit)
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.1)


def test_bf16_towers_have_no_float32_operand_in_any_dot_forward_or_backward():
    clip = Clip.graph(tiny_arch(exits=(1, 2)), dtype=jnp.bfloat16)

    def loss(params, images, tokens):
        embeds = clip.encode_image_exits(params, images)
        return sum(z.sum() for z in embeds.values()) + clip.encode_text(params, tokens).sum()

    tokens = jnp.full((2, 12), 49, jnp.int32)
    program = jax.make_jaxpr(jax.grad(loss))(Clip.init(jax.random.key(0), clip.arch), jnp.zeros((2, 32, 32, 3)), tokens)
    dots = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    # Three towers' worth of blocks: 4 projections and 2 attention products each, forward once and backward twice.
    assert len(dots) >= (3 + 2) * 6 * 3
    assert {str(v.aval.dtype) for e in dots for v in e.invars} == {"bfloat16"}
    assert {str(e.outvars[0].aval.dtype) for e in dots} == {"float32"}


IMAGE_PARAMS_M = {  # published sizes of the vision towers, in millions
    "vit_b32": 87.85, "vit_b16": 86.19, "vit_l14": 303.97, "vit_l14_336": 304.29,
    "vit_h14": 632.08, "vit_g14": 1012.65, "vit_bigg14": 1844.91,
}  # fmt: skip
IMAGE_GMACS = {
    "vit_b32": 4.41, "vit_b16": 17.56, "vit_l14": 81.0, "vit_l14_336": 191.0,
    "vit_h14": 167.3, "vit_g14": 267.0, "vit_bigg14": 483.7,
}  # fmt: skip
TOTAL_PARAMS = {
    "vit_demo": 8_185_089,
    "vit_tiny": 16_853_953,
    "vit_s16": 62_257_537,
    "vit_b32": 151_277_313,
    "vit_b16": 149_620_737,
    "vit_l14": 427_616_513,
    "vit_l14_336": 427_944_193,
    "vit_h14": 986_109_441,
    "vit_g14": 1_366_678_273,
    "vit_bigg14": 2_539_567_105,
}


def test_every_named_variant_is_counted():
    assert set(TOTAL_PARAMS) == set(variants.CLIP) - {"vit_tests"}
    assert {f"{family}_{size}" for family in ("convnext", "convnextv2") for size in CONVNEXT_PARAMS} == {*variants.CONVNEXT} - {
        "convnextv2_tests"
    }


def test_text_flops_against_the_published_count():
    """ViT-L/14's text tower is given as 13.30 GFLOPs in the ICAR paper."""
    assert flops.text_flops(variants.CLIP["vit_l14"].text) / 1e9 == pytest.approx(13.30, abs=0.01)


@pytest.mark.parametrize("name", list(TOTAL_PARAMS))
def test_clip_parameter_counts(name):
    shapes = Clip.graph(variants.CLIP[name]).shapes
    assert pytree.count(shapes) == TOTAL_PARAMS[name]
    if name in IMAGE_PARAMS_M:
        assert round(pytree.count(shapes["vision"]) / 1e6, 2) == IMAGE_PARAMS_M[name]
        assert flops.vision_flops(variants.CLIP[name].vision) / 2e9 == pytest.approx(IMAGE_GMACS[name], rel=1e-3)


CONVNEXT_PARAMS = {  # V1 and V2 with the 1000-class head
    "demo": (398_008, 400_136),
    "micro": (1_731_520, 1_736_000),
    "atto": (3_695_520, 3_708_400),
    "femto": (5_217_784, 5_233_240),
    "pico": (9_045_672, 9_066_280),
    "nano": (15_593_560, 15_623_800),
    "tiny": (28_589_128, 28_635_496),
    "small": (50_223_688, 50_318_440),
    "base": (88_591_464, 88_717_800),
    "large": (197_767_336, 197_956_840),
}
CONVNEXT_GMACS = {
    "atto": (0.547, 2.86), "femto": (0.779, 4.07), "pico": (1.37, 7.14), "nano": (2.45, 12.8),
    "tiny": (4.46, 23.3), "small": (8.68, 45.4), "base": (15.4, 80.2), "large": (34.4, 179.5),
}  # fmt: skip


@pytest.mark.parametrize("size", list(CONVNEXT_PARAMS))
def test_convnext_parameter_counts(size):
    for name, expected in zip((f"convnext_{size}", f"convnextv2_{size}"), CONVNEXT_PARAMS[size]):
        arch = variants.CONVNEXT[name]
        headed = dataclasses.replace(arch, num_classes=1000)
        count = pytree.count(ConvNeXt.graph(headed).shapes)
        assert count == expected
        assert pytree.count(ConvNeXt.graph(arch).shapes) == count - (arch.dims[3] + 1) * 1000
        for image_size, gmacs in zip((224, 512), CONVNEXT_GMACS.get(size, ())):
            assert flops.convnext_flops(headed, image_size) / 2e9 == pytest.approx(gmacs, rel=5e-3)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("variant", "vit_l15", "did you mean 'vit_l14'"),
        ("exits", (12,), "not below the tower's depth of 12"),
        ("image_size", 100, "multiple of the patch size 32; use 96"),
    ],
)
def test_registry_errors(field, value, message):
    config = cfg.ClipConfig(variant="vit_b32")
    setattr(config, field, value)
    with pytest.raises(cfg.ConfigError, match=message):
        architectures.clip_arch(config)


def test_normalise():
    pixels = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (pixels / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalise(pixels, mean, std), expected, atol=1e-6)
