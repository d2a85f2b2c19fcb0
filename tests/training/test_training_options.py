"""Options of training: frozen groups, the first moment in bfloat16, the moving average, and starting from a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, MeshConfig, OptimConfig, from_dict
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.positions import resize_positions
from icar_jax.models import variants
from icar_jax.models.clip import LOGIT_BIAS_START, Clip, ClipArch
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.text import TextArch
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import VisionArch
from icar_jax.parallel.mesh import make_mesh, replicated
from icar_jax.parallel.rules import shardings
from icar_jax.training import init_weights, start
from icar_jax.training.optimizer import ema_init, ema_update, make_optimizer, state_like, trainable
from tests.support import parity_cases
from tests.support.jaxprs import equations

ARCH = ClipArch(VisionArch(16, 8, 16, 2, 2, 32, 8, exits=(1,)), TextArch(6, 20, 16, 2, 2, 32, 8, end_id=19), logit_bias=True)
GROUP_OF = {
    "vision/blocks/0/attn/qkv/kernel": "image", "vision/pos": "image", "vision/ln_post/scale": "image",
    "vision/proj/kernel": "image", "vision/map/probe": "image", "vision/exits/6/proj/kernel": "exits",
    "vision/exits/6/ln/bias": "exits", "text/embed": "text", "text/blocks/1/mlp/fc1/bias": "text", "logit_scale": "temperature",
    "logit_bias": "temperature", "exit_logit_scale/6": "temperature", "exit_logit_bias/6": "temperature",
}  # fmt: skip
CONFIG = OptimConfig(warmup_steps=0, weight_decay=0.1, lr=1e-2, exit_lr=1e-2, temperature_lr=1e-2)


def random_tree(shapes, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return pytree.map_with_path(lambda _, s: jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32), shapes)


def bits(leaf):
    return np.asarray(leaf).view(np.int32)


# --- frozen groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GROUP_OF)
def test_the_group_of_a_parameter(path):
    assert trainable(path, ())
    frozen = [g for g in ("image", "text", "exits", "temperature") if not trainable(path, (g,))]
    assert frozen == [GROUP_OF[path]]
    assert not trainable(path, ("image", "text", "exits", "temperature"))


@pytest.mark.parametrize("freeze", [("image",), ("text", "temperature"), ("exits",)])
def test_frozen_parameters_keep_every_bit_and_have_no_moments(freeze, tmp_path):
    shapes = Clip.graph(ARCH).shapes
    params = random_tree(shapes, 0)
    for group in (params["vision"], params["vision"]["exits"]["1"]["ln"], params["text"]["ln_final"]):
        name = "bias" if "bias" in group else "cls"
        group[name] = jnp.full((16,), -0.0)  # which adding 0.0 would turn into 0.0
    optimizer = make_optimizer(CONFIG, 10, freeze)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, now = optimizer.init(params), params
    for i in range(3):
        now, state = step(now, state, random_tree(shapes, 1 + i))
    before, after = pytree.flatten(params), pytree.flatten(now)
    learnt = {path for path in before if trainable(path, freeze)}
    assert 0 < len(learnt) < len(before)
    for path in before:
        assert np.array_equal(bits(before[path]), bits(after[path])) != (path in learnt), path
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32]
    assert sorted(m.shape for m in moments) == sorted(2 * [before[path].shape for path in learnt])
    with ocp.CheckpointManager(tmp_path / "state") as store:
        store.save(1, args=ocp.args.StandardSave(state))
        store.wait_until_finished()
        restored = store.restore(1, args=ocp.args.StandardRestore(jax.eval_shape(optimizer.init, shapes)))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_gradients_of_frozen_parameters_do_not_count_in_clipping():
    shapes = Clip.graph(ARCH).shapes
    params, grads = random_tree(shapes, 0), random_tree(shapes, 1)
    frozen_large = pytree.map_with_path(lambda path, g: g if trainable(path, ("image",)) else 1e6 * g, grads)
    frozen_zero = pytree.map_with_path(lambda path, g: g if trainable(path, ("image",)) else 0 * g, grads)
    config = dataclasses.replace(CONFIG, eps=1.0)  # so that Adam's step depends on the size of the gradient
    updates = []
    for freeze, g in ((("image",), frozen_large), (("image",), frozen_zero), ((), frozen_zero)):
        optimizer = make_optimizer(config, 10, freeze)
        update = jax.jit(lambda g, optimizer=optimizer: optimizer.update(g, optimizer.init(params), params)[0])
        updates.append(pytree.flatten(update(g)))
    for path in updates[0]:
        np.testing.assert_array_equal(updates[0][path], updates[1][path], err_msg=path)
        if trainable(path, ("image",)):  # and with the other leaves' gradients at zero, freezing changes nothing for these
            np.testing.assert_allclose(updates[0][path], updates[2][path], rtol=1e-6, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("freeze", [(), ("image", "temperature")])
def test_moments_are_laid_out_as_their_parameters(freeze):
    shapes, mesh = Clip.graph(ARCH).shapes, make_mesh(MeshConfig())
    optimizer, layout = make_optimizer(CONFIG, 10, freeze), shardings(shapes, mesh)
    state = state_like(optimizer, shapes, layout, replicated(mesh))
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(optimizer.init, shapes))
    adam = (state.inner_states["learn"].inner_state if freeze else state)[1]
    for moments in (adam.mu, adam.nu):
        for path, sharding in pytree.flatten(moments).items():
            expected = pytree.flatten(layout)[path] if trainable(path, freeze) else optax.MaskedNode()
            assert sharding == expected, path
    assert adam.count == replicated(mesh)


@pytest.mark.parametrize("execution", [Execution(), Execution("full", True)], ids=str)
def test_the_backward_pass_of_a_stopped_tower_is_not_traced(execution):
    """What freezing saves: behind stop_gradient neither a scan nor remat computes a frozen block's gradient."""
    clip, images = Clip.graph(ARCH, execution=execution), jnp.zeros((2, 16, 16, 3))

    def loss(params, freeze):
        params = pytree.map_with_path(lambda p, x: x if trainable(p, freeze) else jax.lax.stop_gradient(x), params)
        return sum(z.sum() for z in clip.encode_image_exits(params, images).values())

    def dots(function):
        program = jax.make_jaxpr(function)(clip.shapes).jaxpr
        return len([e for e in equations(program) if e.primitive.name == "dot_general"])

    forward = dots(lambda p: loss(p, ()))
    assert dots(jax.grad(lambda p: loss(p, ("image", "exits")))) == forward
    # The exit's projection alone has a gradient: of its kernel, and of its input for the norm below it.
    assert dots(jax.grad(lambda p: loss(p, ("image",)))) == forward + 2
    assert dots(jax.grad(lambda p: loss(p, ()))) >= 2.5 * forward


# --- first moment in bfloat16 ------------------------------------------------------------------------------------------------


def test_mu_dtype_is_that_of_the_first_moment_alone():
    shapes = Clip.graph(ARCH).shapes
    params, grads = random_tree(shapes, 0), random_tree(shapes, 1, 1e-3)
    updates = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(CONFIG, mu_dtype=dtype, clip_norm=0.0), 10)
        state = optimizer.init(params)
        for _ in range(2):
            updates[dtype], state = jax.jit(optimizer.update)(grads, state, params)
        adam = state[1]  # after clipping
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(adam.mu)} == {dtype}
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(adam.nu)} == {"float32"}
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(updates[dtype])} == {"float32"}
        expected = (1 - 0.9**2) * np.asarray(grads["text"]["embed"])
        tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
        np.testing.assert_allclose(adam.mu["text"]["embed"].astype(jnp.float32), expected, rtol=tolerance)
    # bfloat16 keeps 8 bits of a number; the step is proportional to the moment, decay aside.
    for a, b in zip(jax.tree.leaves(updates["float32"]), jax.tree.leaves(updates["bfloat16"])):
        np.testing.assert_allclose(b, a, rtol=2**-7, atol=2**-7 * 1e-2)
        assert a.size == 1 or not np.array_equal(a, b)


# --- moving average of the weights -------------------------------------------------------------------------------------------


def test_ema_against_a_loop_in_numpy():
    shapes = Clip.graph(ARCH).shapes
    params = random_tree(shapes, 0)
    ema = ema_init(params)
    expected = {path: np.asarray(leaf, np.float64) for path, leaf in pytree.flatten(params).items()}
    update = jax.jit(lambda ema, params, step: ema_update(ema, params, 0.5, step))
    keeps = []
    for step in range(20):
        params = random_tree(shapes, 1 + step)
        ema = update(ema, params, step)
        keeps.append(min(0.5, (1 + step) / (10 + step)))
        expected = {p: keeps[-1] * expected[p] + (1 - keeps[-1]) * np.asarray(x) for p, x in pytree.flatten(params).items()}
    assert keeps[0] == 0.1 and keeps[7] < 0.5 and keeps[8] == keeps[-1] == 0.5  # warm-up, then the decay itself
    for path, leaf in pytree.flatten(ema).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)


def test_ema_is_float32_in_buffers_of_its_own_and_rests_where_weights_rest():
    params = {"a": jnp.full((4,), 0.3, jnp.bfloat16), "b": jnp.arange(4.0)}
    ema = ema_init(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(ema)} == {"float32"}
    assert ema["b"].unsafe_buffer_pointer() != params["b"].unsafe_buffer_pointer()  # both are donated to the step
    after = ema_update(ema, params, 0.999, 7)
    jax.tree.map(np.testing.assert_array_equal, after, ema)  # what is frozen stays the same in the average


# --- initialisation from a checkpoint ----------------------------------------------------------------------------------------


def converted(name, folder, **options):
    """A parity case as `icar convert` writes it, with its architecture."""
    case = parity_cases.load(name)
    convert(parity_cases.write_source(case, folder / "source"), folder / "model", Options(**{**case.options, **options}))
    arch = {"clip": ClipArch, "complexity": ComplexityArch, "convnext": ConvNeXtArch}[case.kind]
    return case, folder / "model", from_dict(checkpoint.describe(folder / "model")["arch"], arch)


def changed(arch, vision=None, text=None, **clip):
    vision, text = dataclasses.replace(arch.vision, **(vision or {})), dataclasses.replace(arch.text, **(text or {}))
    return dataclasses.replace(arch, vision=vision, text=text, **clip)


def load(path, arch, **kwargs):
    return pytree.flatten(init_weights.load_params(path, "clip", arch, Clip.graph(arch).shapes, **kwargs))


def test_converted_weights_with_added_exits_another_image_size_and_a_shorter_context(tmp_path):
    case, model, arch = converted("hf_gelu", tmp_path)
    saved = pytree.flatten(checkpoint.read(model, "clip").params)
    same = load(model, arch)
    assert same.keys() == saved.keys()
    for path, leaf in same.items():
        np.testing.assert_array_equal(np.asarray(leaf), saved[path])

    softmax = changed(arch, {"exits": (1,)})
    np.testing.assert_array_equal(np.asarray(load(model, softmax)["exit_logit_scale/1"]), saved["logit_scale"])
    run, notes = changed(arch, {"exits": (1,), "image_size": 24}, {"context_length": 7}, logit_bias=True), []
    mesh, shapes = make_mesh(MeshConfig()), Clip.graph(run).shapes
    params = init_weights.load_params(model, "clip", run, shapes, note=notes.append)
    placed = init_weights.place(params, shardings(shapes, mesh))
    assert pytree.differences(shapes, placed) == []
    found = pytree.flatten(placed)
    assert {str(leaf.dtype) for leaf in found.values()} == {"float32"}
    new = {
        "vision/pos": resize_positions(saved["vision/pos"], 4, True),
        "text/pos": saved["text/pos"][:7],
        "vision/exits/1/ln/scale": saved["vision/ln_post/scale"],
        "vision/exits/1/ln/bias": saved["vision/ln_post/bias"],
        "vision/exits/1/proj/kernel": saved["vision/proj/kernel"],
        "logit_scale": np.float32(np.log(10)),  # from softmax to sigmoid: both start from SigLIP's values
        "exit_logit_scale/1": np.float32(np.log(10)),
        "logit_bias": np.float32(LOGIT_BIAS_START),
        "exit_logit_bias/1": np.float32(LOGIT_BIAS_START),
    }
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, new.get(path, saved.get(path)), err_msg=path)
    for part in ("resized from 12 to 24 pixels", "truncated from 10 to 7", "scales start at 10", "exits 1 are initialised"):
        assert part in "\n".join(notes)
    images = np.repeat(np.repeat(case.images, 2, axis=1), 2, axis=2)
    assert jax.jit(lambda p, x: Clip.graph(run).encode_image(p, x, exit=1))(placed, images).shape == (2, 32)


@pytest.mark.parametrize("name", ["hf_quick_gelu", "siglip", "openai"])
def test_a_run_takes_over_what_only_the_checkpoint_knows(name, tmp_path):
    """A variant of the registry says gelu, class token and causal text; the weights may be another model under these."""
    _, model, saved = converted(name, tmp_path, exits=())
    run = ClipArch(
        VisionArch(saved.vision.image_size, saved.vision.patch_size, saved.vision.width, saved.vision.depth, 1,
                   saved.vision.mlp_width, saved.vision.embed_dim),
        TextArch(saved.text.context_length, saved.text.vocabulary, saved.text.width, saved.text.depth, 1,
                 saved.text.mlp_width, saved.text.embed_dim, end_id=saved.text.end_id),
        logit_bias=saved.logit_bias,
    )  # fmt: skip
    theirs = saved.vision.activation
    with pytest.raises(ConfigError, match=rf"vision activation: '{theirs}' in the checkpoint, 'gelu' in the run"):
        load(model, run)
    adopted = init_weights.adopt(run, model)
    assert adopted == changed(saved, {"pool": adopted.vision.pool})
    params = pytree.map_with_path(lambda _, leaf: np.asarray(leaf), pytree.unflatten(load(model, adopted)))
    images = np.zeros((1, saved.vision.image_size, saved.vision.image_size, 3), np.float32)
    expected = jax.jit(Clip.graph(saved).encode_image)(checkpoint.read(model, "clip").params, images)
    np.testing.assert_array_equal(jax.jit(Clip.graph(adopted).encode_image)(params, images), expected)
    with_exit = init_weights.adopt(changed(run, {"exits": (1,)}), model)
    assert with_exit.vision.exits == (1,) and with_exit.vision.pool == ("map" if saved.vision.head == "map" else "cls")
    load(model, with_exit)


def test_every_difference_and_its_remedy_is_named_at_once(clip_folder):
    saved = from_dict(checkpoint.describe(clip_folder)["arch"], ClipArch)
    run = changed(saved, {"exits": (2,), "pool": "mean"}, {"vocabulary": saved.text.vocabulary + 5, "context_length": 40})
    with pytest.raises(ConfigError) as error:
        load(clip_folder, run)
    message = str(error.value)
    for part in (
        f"config.train.init={clip_folder}", "shape of text/embed", "shape of text/pos: expected (40, 16), found (16, 16)",
        "vision pool: 'cls' in the checkpoint", "config.data.tokenizer", "--config.clip.context_length=16",
        "--config.clip.pool=cls",
    ):  # fmt: skip
        assert part in message, message
    with pytest.raises(ConfigError, match=r"--config.clip.temperature=own"):
        load(clip_folder, dataclasses.replace(saved, temperature="shared"))


def test_another_size_names_the_variant(tmp_path, clip_folder):
    saved = variants.CLIP["vit_b16"]
    description = {"arch": dataclasses.asdict(saved)}
    model = checkpoint.write(tmp_path / "model", "clip", description, {"logit_scale": np.float32(1)})
    with pytest.raises(ConfigError, match=r"vision width: 768 in the checkpoint, 1024 in the run[^~]*variant=vit_b16$"):
        init_weights.adopt(variants.CLIP["vit_l14"], model)
    with pytest.raises(ConfigError, match=r"vision patch_size: 16 in the checkpoint, 32 in the run[^~]*variant=vit_b16$"):
        init_weights.adopt(variants.CLIP["vit_b32"], model)
    with pytest.raises(ConfigError, match=r"no variant of models/variants.py has its sizes"):
        init_weights.adopt(variants.CLIP["vit_b32"], clip_folder)


def test_a_complexity_model_starts_from_an_imagenet_backbone(tmp_path):
    _, model, saved = converted("convnext_v2_linear", tmp_path)
    arch = ComplexityArch(dataclasses.replace(saved, num_classes=0), "regression", 64)
    complexity, notes = ComplexityModel.graph(arch), []
    note = notes.append
    fresh = random_tree(complexity.shapes, 0)
    load = lambda arch: init_weights.load_params(
        model, "complexity", arch, ComplexityModel.graph(arch).shapes, lambda: fresh, note
    )
    params = load(arch)
    assert pytree.differences(complexity.shapes, params) == []
    backbone = pytree.flatten(checkpoint.read(model, "convnext").params)
    for path, leaf in pytree.flatten(params).items():
        expected = pytree.flatten(fresh)[path] if path.startswith("head/") else backbone[path.removeprefix("backbone/")]
        np.testing.assert_array_equal(np.asarray(leaf), expected, err_msg=path)
    assert "initialised randomly" in notes[0]
    with pytest.raises(ConfigError, match=r"config.train.init=[^~]*unexpected: backbone/stages/0/blocks/0/mlp/grn"):
        load(dataclasses.replace(arch, backbone=dataclasses.replace(arch.backbone, version=1)))


def test_a_complexity_model_starts_from_another_and_names_a_different_head(complexity_folder):
    saved = from_dict(checkpoint.describe(complexity_folder)["arch"], ComplexityArch)
    arch = dataclasses.replace(saved, image_size=64, dropout=0.0)  # neither is in the parameters
    params = init_weights.load_params(complexity_folder, "complexity", arch, ComplexityModel.graph(arch).shapes)
    expected = pytree.flatten(checkpoint.read(complexity_folder, "complexity").params)
    for path, leaf in pytree.flatten(params).items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path])
    other = dataclasses.replace(saved, head="classification")
    with pytest.raises(ConfigError, match=r"missing: head/fc/kernel[^~]*--config.complexity.head=regression"):
        init_weights.load_params(complexity_folder, "complexity", other, ComplexityModel.graph(other).shapes)


def test_bundles_workdirs_and_what_is_not_there(tmp_path, clip_folder, complexity_folder):
    arch = from_dict(checkpoint.describe(clip_folder)["arch"], ClipArch)
    bundle = checkpoint.write_bundle(tmp_path / "bundle", {}, clip_folder, complexity_folder)
    assert load(bundle, arch).keys() == load(clip_folder.parent, arch).keys() == load(clip_folder, arch).keys()
    assert start.load_tokenizer(bundle) == (clip_folder / "tokenizer.json").read_text()
    with pytest.raises(ConfigError, match=r"config.train.init=.*no checkpoint of kind clip"):
        load(complexity_folder, arch)
    with pytest.raises(ConfigError, match=r"config.train.init=.*does not exist"):
        load(tmp_path / "nowhere", arch)
    weights = bundle / "clip" / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    with pytest.raises(ConfigError, match=r"config.train.init=.*is damaged"):
        load(bundle, arch)
