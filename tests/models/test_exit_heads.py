"""Exit heads with a residual against numpy, where they start, what they cost; and layer dropout in the blocks."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from icar_jax import architectures, checkpoint, pytree
from icar_jax.config import ClipConfig, ConfigError, ExperimentConfig, from_dict, validate
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from icar_jax.data.images import Preprocess
from icar_jax.models import flops
from icar_jax.models.clip import Clip, ClipArch, exit_sources, start_exits_from_final
from icar_jax.models.transformer import Block, Execution, block_scales, run_blocks
from icar_jax.models.vision import ExitHead, VisionArch, VisionTower
from icar_jax.parallel.rules import RULES
from icar_jax.training import init_weights
from tests.support import drawn
from tests.support import reference as ref
from tests.support.counting import require_counted

ARCH = VisionArch(32, 8, 32, 3, 4, 64, 24, exits=(1, 2))
HEADS = ("adapter", "attention")


def with_head(name, arch=ARCH, **changes):
    return dataclasses.replace(arch, exit_head=name, **changes)


def bridge(arch):
    return ExitHead.graph(arch)


def tokens(seed=0, batch=2):
    return np.random.default_rng(seed).standard_normal((batch, ARCH.tokens, ARCH.width)).astype(np.float32)


def expected(x, p, arch):
    """One image's tokens [L, W] -> [D], in float64."""
    pooled = {"cls": x[0], "first_patch": x[1], "mean": x[1:].mean(0)}[arch.pool]
    if arch.exit_head == "adapter":
        r = p["residual"]
        hidden = ref.gelu(ref.linear(ref.layer_norm(pooled, r["ln"], 1e-5), r["mlp"]["fc1"]))
        assert hidden.shape == (arch.width // 4,)
        pooled = pooled + ref.linear(hidden, r["mlp"]["fc2"])
    if arch.exit_head == "attention":
        r, size = p["residual"], arch.width // arch.heads
        kernel, bias = r["attn"]["qkv"]["kernel"], r["attn"]["qkv"]["bias"]
        query = (r["probe"] @ kernel + bias)[: arch.width]
        keys, values = np.split((ref.layer_norm(x, r["ln"], 1e-5) @ kernel + bias)[:, arch.width :], 2, axis=1)
        read = []
        for h in range(arch.heads):
            cols = slice(h * size, (h + 1) * size)
            weights = np.exp(keys[:, cols] @ query[cols] / np.sqrt(size))
            read.append(weights / weights.sum() @ values[:, cols])
        pooled = pooled + ref.linear(np.concatenate(read), r["attn"]["out"])
    return ref.linear(ref.layer_norm(pooled, p["ln"], 1e-5), p["proj"])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_heads_against_numpy(name, pool):
    arch = with_head(name, pool=pool)
    params = drawn.params(bridge(arch).shapes, 1)
    found = jax.jit(lambda p, x: bridge(arch)(p, x))(params, tokens())
    for row, x in zip(found, tokens().astype(np.float64), strict=True):
        np.testing.assert_allclose(row, expected(x, ref.f64(params), arch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_at_its_start_a_head_is_the_linear_head_and_learns(name):
    made = ExitHead.init(jax.random.key(0), with_head(name))
    linear = {"ln": made["ln"], "proj": made["proj"]}
    run = lambda arch, p: jax.jit(lambda p: bridge(arch)(p, tokens()))(p)
    np.testing.assert_allclose(run(with_head(name), made), run(ARCH, linear), atol=1e-6)
    last = {"adapter": "residual/mlp/fc2/kernel", "attention": "residual/attn/out/kernel"}[name]
    grads = pytree.flatten(jax.grad(lambda p: run(with_head(name), p)[:, 0].sum())(made))
    assert not pytree.flatten(made)[last].any() and np.abs(grads[last]).max() > 0


@pytest.mark.parametrize("name", HEADS)
def test_only_norm_and_projection_start_from_the_final_head(name):
    arch = architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2,), patch_size=32, exit_head=name))
    shapes = Clip.graph(arch).shapes
    assert set(exit_sources(shapes)) == {
        *(f"vision/exits/2/{leaf}" for leaf in ("ln/scale", "ln/bias", "proj/kernel")), "exit_logit_scale/2",
    }  # fmt: skip
    before = drawn.params(shapes, 0)
    flat, after = pytree.flatten(before), pytree.flatten(start_exits_from_final(before))
    assert [p for p in flat if "/residual/" in p]
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, flat[exit_sources(shapes).get(path, path)])


def test_every_parameter_of_the_heads_has_a_rule_of_sharding():
    for name in HEADS:
        arch = architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2,), exit_head=name))
        paths = [p for p in pytree.flatten(Clip.graph(arch).shapes) if "/residual/" in p]
        assert paths and [p for p in paths if not any(re.search(pattern, p) for pattern, _ in RULES)] == []


def test_summed_heads_are_the_sum_of_what_each_gives():
    own, summed = (dataclasses.replace(ARCH, exits=(1, 2), exit_sum=on) for on in (False, True))
    tower = lambda arch: VisionTower.graph(arch)
    params = drawn.params(tower(own).shapes, 0)
    images = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    run = lambda arch, exits: jax.jit(lambda p: tower(arch)(p, images, exits))(params)
    each = run(own, (1, 2, 3))
    for exit in (1, 2, 3):
        (found,) = run(summed, (exit,)).values()
        np.testing.assert_allclose(found, sum(each[e] for e in range(1, exit + 1)), atol=1e-5)
    assert list(run(summed, (3, 1))) == [1, 3]


def test_summed_heads_go_on_from_tokens_before_the_first_of_them():
    clip = Clip.graph(architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2, 4), patch_size=32, exit_sum=True)))
    params = drawn.params(clip.shapes, 0)
    images = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype(np.float32)
    whole = clip.encode_image_exits(params, images)
    trunk = VisionTower.graph(clip.arch.vision).merge(params["vision"])
    tokens = trunk.run(trunk.embed(images), (2,))[2]
    for exit, expected_ in whole.items():
        np.testing.assert_allclose(clip.encode_tokens(params, tokens, 2, exit), expected_, atol=1e-5)
    with pytest.raises(ValueError, match="come too late for exit 4, which reads block 2"):
        clip.encode_tokens(params, tokens, 3, 4)


def test_what_summed_heads_cannot_go_with(tmp_path):
    with pytest.raises(ValueError, match="attention-pool head"):
        VisionArch(32, 8, 32, 3, 4, 64, 32, head="map", class_token=False, exit_sum=True)
    for changes, message in (
        ({"exits": ()}, "exit_sum=True sums heads of exits"),
        ({"freeze": ("image",)}, "config.train.freeze=.*freezes; leave it False"),
    ):
        config = ExperimentConfig(clip=ClipConfig(variant="vit_demo", exits=changes.get("exits", (2,)), exit_sum=True))
        config.train.freeze = changes.get("freeze", ())
        with pytest.raises(ConfigError, match=message):
            validate(config)
    made = architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2,), patch_size=32))
    description = {"arch": dataclasses.asdict(made), "preprocess": Preprocess(64, "squash").to_dict()}
    folder = checkpoint.write(tmp_path / "model", "clip", description, drawn.params(Clip.graph(made).shapes, 0))
    other = dataclasses.replace(made, vision=dataclasses.replace(made.vision, exit_sum=True))
    with pytest.raises(ConfigError, match="would change its full-depth embeddings. Set it to False"):
        init_weights.adopt(other, folder)


@pytest.mark.parametrize("summed", [False, True], ids=["own", "summed"])
@pytest.mark.parametrize("name", ("linear", *HEADS))
def test_counted_flops_are_those_of_the_traced_program(name, summed):
    arch = architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2, 4), exit_head=name, exit_sum=summed))
    require_counted(arch)
    plain = dataclasses.replace(arch.vision, exit_head="linear", exit_sum=False)
    if summed:
        assert flops.vision_flops(arch.vision, 4) > flops.vision_flops(dataclasses.replace(arch.vision, exit_sum=False), 4)
        return
    assert flops.vision_flops(arch.vision) == flops.vision_flops(plain)  # full depth has no such head
    assert (flops.vision_flops(arch.vision, 2) > flops.vision_flops(plain, 2)) == (name != "linear")


def test_a_description_without_the_field_is_that_of_linear_heads():
    saved = dataclasses.asdict(architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2,))))
    del saved["vision"]["exit_head"]
    assert from_dict(saved, ClipArch).vision.exit_head == "linear"


def test_heads_that_are_refused(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="exit head 'deep' must be one of"):
        with_head("deep")
    with pytest.raises(ValueError, match="exits that pool 'map' need exit head 'linear'"):
        with_head("adapter", head="map", pool="map", embed_dim=32)
    arch = from_dict(checkpoint.describe(clip_folder)["arch"], ClipArch)
    vision = with_head("attention", arch.vision, exits=(1,), pool="first_patch")
    arch = dataclasses.replace(arch, vision=vision)
    saved = checkpoint.describe(clip_folder) | {"arch": dataclasses.asdict(arch)}
    kept = {name: value for name, value in saved.items() if name not in ("format", "kind", "hashes")}
    model = checkpoint.write(tmp_path / "model", "clip", kept, drawn.params(Clip.graph(arch).shapes, 0), None)
    with pytest.raises(ConvertError, match=r"icar layout cannot hold this model: its exit head has a residual \(attention\)"):
        export(model, tmp_path / "out", "icar")


@pytest.mark.parametrize("name", HEADS)
def test_a_run_with_residuals_starts_from_a_checkpoint_without(name, clip_folder):
    saved = from_dict(checkpoint.describe(clip_folder)["arch"], ClipArch)
    arch = dataclasses.replace(saved, vision=with_head(name, saved.vision))
    clip, notes = Clip.graph(arch), []
    fresh = lambda: drawn.params(clip.shapes, 5)
    found = init_weights.load_params(clip_folder, "clip", arch, clip.shapes, fresh, notes.append)
    assert notes == [f"config.train.init={clip_folder}: exits 1, 2 get a residual ({name}), which starts at zero"]
    own = pytree.flatten(checkpoint.read(clip_folder, "clip").params)
    for path, leaf in pytree.flatten(found).items():
        source = pytree.flatten(fresh()) if "/residual/" in path else own
        np.testing.assert_array_equal(np.asarray(leaf), source[path])


def test_new_exits_of_a_run_start_at_random_where_asked(clip_folder, tmp_path):
    arch = from_dict(checkpoint.describe(clip_folder)["arch"], ClipArch)
    plain = dataclasses.replace(arch, vision=dataclasses.replace(arch.vision, exits=(), merge=(1,)))
    about = {"arch": dataclasses.asdict(plain), "preprocess": checkpoint.describe(clip_folder)["preprocess"]}
    own = drawn.params(Clip.graph(plain).shapes, 0)
    model = checkpoint.write(tmp_path / "model", "clip", about, own, None)
    clip, own, notes = Clip.graph(arch), pytree.flatten(own), []
    fresh = drawn.params(clip.shapes, 5)
    for how in ("random", "final"):
        found = init_weights.load_params(model, "clip", arch, clip.shapes, lambda: fresh, notes.append, how)
        for path, leaf in pytree.flatten(found).items():
            expected = own[path] if path in own else own[exit_sources(clip.shapes)[path]]
            if how == "random" and path.startswith("vision/exits/"):
                expected = pytree.flatten(fresh)[path]
            np.testing.assert_array_equal(np.asarray(leaf), expected, path)
    merging = f"config.train.init={model}: token merging (1,) in the checkpoint, none here (config.clip.merge)"
    assert notes == [f"config.train.init={model}: exits 1, 2 are initialised randomly (config.clip.exit_start)", merging,
                     f"config.train.init={model}: exits 1, 2 are initialised from the full-depth head", merging]  # fmt: skip


def test_residuals_that_the_run_has_not_are_named(clip_folder, tmp_path):
    saved = from_dict(checkpoint.describe(clip_folder)["arch"], ClipArch)
    arch = dataclasses.replace(saved, vision=with_head("adapter", saved.vision))
    about = {"arch": dataclasses.asdict(arch), "preprocess": checkpoint.describe(clip_folder)["preprocess"]}
    model = checkpoint.write(tmp_path / "model", "clip", about, drawn.params(Clip.graph(arch).shapes, 0), None)
    for other in ("linear", "attention"):
        run = dataclasses.replace(saved, vision=with_head(other, saved.vision))
        with pytest.raises(init_weights.ConfigError, match=r"residual/mlp[^~]*--config.clip.exit_head=adapter") as error:
            init_weights.load_params(model, "clip", run, Clip.graph(run).shapes)
        assert "--config.clip.exits" not in str(error.value)


# --- layer dropout ---


def test_chances_grow_from_nothing_and_the_mean_scale_is_one():
    scales = np.asarray(block_scales(jax.random.key(0), 4000, 5, 0.4))
    chances = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    for block, chance in enumerate(chances):
        assert set(np.unique(scales[:, block])) <= {np.float32(0), np.float32(1 / (1 - chance))}
    np.testing.assert_allclose((scales == 0).mean(0), chances, atol=0.03)  # four standard deviations
    np.testing.assert_allclose(scales.mean(0), 1, atol=0.06)
    assert (block_scales(jax.random.key(0), 3, 1, 0.4) == 1).all()


@pytest.mark.parametrize("execution", [Execution(), Execution(scan=True), Execution("full", scan=True)])
def test_scaled_blocks_against_numpy(execution):
    made = Block.graph(16, 2, 24, depth=3)
    params = [drawn.params(made.shapes, i) for i in range(3)]
    x = np.random.default_rng(2).standard_normal((3, 4, 16)).astype(np.float32)
    scales = np.array([[1, 0, 2], [0, 0, 0], [1, 1, 1]], np.float32)
    run = lambda ps, x, s: run_blocks([made.merge(p) for p in ps], x, (1, 3), execution=execution, scales=s)
    found = jax.jit(run)(params, x, scales)
    for image in range(3):
        y = x[image].astype(np.float64)
        for block, p in enumerate(map(ref.f64, params)):
            y = y + scales[image, block] * ref.attention(ref.layer_norm(y, p["ln1"], 1e-5), p["attn"], 2, False)
            hidden = ref.gelu(ref.linear(ref.layer_norm(y, p["ln2"], 1e-5), p["mlp"]["fc1"]))
            y = y + scales[image, block] * ref.linear(hidden, p["mlp"]["fc2"])
            if block + 1 in found:
                np.testing.assert_allclose(found[block + 1][image], y, atol=2e-5)
    np.testing.assert_array_equal(found[3][1], x[1])  # the skipped image passes untouched
