"""Where a researcher puts a loaded model: other libraries' weights, threads, pickles, forked children, strict JAX."""

import copy
import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from flax import nnx

import icar_jax
from icar_jax import checkpoint, cli, pytree
from icar_jax.checkpoint import CheckpointError
from icar_jax.convert.convert import convert
from icar_jax.convert.export import export
from icar_jax.inference.explain import Explainer
from icar_jax.inference.forward import count_compilations
from tests.support import parity_cases
from tests.support.places import FIXTURES, ROOT

FOLDER = FIXTURES / "format_1"
BUNDLES = [FOLDER / "bundle_complexity", FOLDER / "bundle_blocks"]
PICTURES = list(np.load(FOLDER / "outputs.npz")["images"])
TEXTS = ["a red square", "many shapes"]


@pytest.fixture(scope="module")
def hf_folder(clip_folder, tmp_path_factory):
    """The random CLIP without its exits, as Hugging Face has it."""
    folder = tmp_path_factory.mktemp("hf")
    loaded = checkpoint.read(clip_folder, "clip")
    flat = {p: leaf for p, leaf in pytree.flatten(loaded.params).items() if "exit" not in p}
    about = {**loaded.description, "arch": {**loaded.description["arch"]}}
    about["arch"]["vision"] = {**about["arch"]["vision"], "exits": ()}
    own = checkpoint.write(folder / "own", "clip", about, pytree.unflatten(flat), loaded.tokenizer)
    export(own, folder / "hf", "hf")
    return folder / "hf"


def test_other_weights_are_converted_in_memory(hf_folder, tmp_path):
    before = sorted(hf_folder.iterdir())
    model = icar_jax.load(hf_folder, exits=(1, 2))
    assert model.exits == (1, 2, 3) and model.tokenizer is not None and sorted(hf_folder.iterdir()) == before
    convert(hf_folder, tmp_path / "own")
    own = icar_jax.load(tmp_path / "own")
    for one in (model, icar_jax.load(hf_folder)):
        np.testing.assert_array_equal(one.encode_text(TEXTS), own.encode_text(TEXTS))
        np.testing.assert_array_equal(one.encode_image(PICTURES), own.encode_image(PICTURES))
    clip = icar_jax.Clip.from_pretrained(hf_folder, exits=(1,))
    assert isinstance(clip, nnx.Module) and clip.arch.vision.exits == (1,)
    with pytest.raises(TypeError, match="unknown options exit; expected activation, base, context_length, exits"):
        icar_jax.load(hf_folder, exit=1)
    with pytest.raises(CheckpointError, match="is an icar_jax checkpoint and needs no options; leave out exits"):
        icar_jax.load(tmp_path / "own", exits=(1,))
    with pytest.raises(CheckpointError, match="does not exist"):
        icar_jax.load(tmp_path / "nothing")


def test_a_saved_module_is_a_checkpoint_like_any_other(clip_folder, tmp_path):
    model = icar_jax.load(clip_folder)
    clip = icar_jax.Clip.from_pretrained(clip_folder)
    clip.logit_scale[...] = clip.logit_scale[...] + 1
    folder = clip.save(tmp_path / "new", preprocess=model.preprocess, tokenizer=model.tokenizer, note="warmer")
    again = icar_jax.load(folder)
    assert again.description["note"] == "warmer" and again.temperature == pytest.approx(np.e * model.temperature)
    np.testing.assert_array_equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    graph, params = clip.split()
    plain = icar_jax.Clip.graph(dataclasses.replace(graph.arch, vision=dataclasses.replace(graph.arch.vision, exits=())))
    full = {"vision": {**params["vision"]}, "text": params["text"], "logit_scale": params["logit_scale"]}
    full["vision"].pop("exits")
    saved = plain.merge(full).save(tmp_path / "b", preprocess=model.preprocess, tokenizer=model.tokenizer)
    export(saved, tmp_path / "hf", "hf")
    with pytest.raises(CheckpointError, match="images of 64 pixels, but this tower takes 32"):
        clip.save(tmp_path / "c", preprocess=dataclasses.replace(model.preprocess, image_size=64))
    other = icar_jax.Clip.from_pretrained(clip_folder)
    other.vision.blocks[0].mlp.activation = jax.nn.relu
    with pytest.raises(CheckpointError, match="differs from its `arch`"):
        other.save(tmp_path / "c", preprocess=model.preprocess)
    attn = clip.vision.blocks[0].attn
    attn.qkv = nnx.LoRA(32, 2, 96, base_module=attn.qkv, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"unexpected: vision/blocks/0/attn/qkv/lora_a"):
        clip.save(tmp_path / "c", preprocess=model.preprocess)
    assert not (tmp_path / "c").exists()


def test_the_parts_of_a_loaded_model(clip_folder, complexity_folder):
    model = icar_jax.load(BUNDLES[0])
    assert isinstance(model.clip, icar_jax.Clip) and model.complexity is not None and model.tokenizer is not None
    assert model.clip.split()[1]["logit_scale"] is model.params["logit_scale"]
    plain, scorer = icar_jax.load(clip_folder), icar_jax.load(complexity_folder)
    assert plain.complexity is None and scorer.clip is None and scorer.preprocess.image_size == 32
    batch = np.zeros((2, 32, 32, 3), np.float32)
    np.testing.assert_allclose(scorer.complexity(batch), scorer.complexity.score(batch))


def test_what_is_changed_in_a_part_counts_from_the_next_call_on():
    model = icar_jax.load(BUNDLES[0])
    before, text = model.encode_image(PICTURES, exit=4), model.encode_text(TEXTS)
    model.clip.vision.blocks[1].mlp.activation = jax.nn.relu
    changed = model.encode_image(PICTURES, exit=4)
    assert np.abs(changed - before).max() > 1e-4
    with count_compilations() as compiled:  # a change is taken once
        np.testing.assert_array_equal(model.encode_image(PICTURES, exit=4), changed)
    assert compiled() == 0
    np.testing.assert_array_equal(model.encode_text(TEXTS), text)
    kernel = model.clip.text.proj.kernel
    kernel[...] = -kernel[...]
    np.testing.assert_allclose(model.encode_text(TEXTS), -text, atol=1e-6)
    scores, explained = model.score(PICTURES), Explainer(model).explain(PICTURES[:2])
    np.testing.assert_allclose([e.score for e in explained], scores[:2], atol=1e-5)
    fc = model.complexity.head.fc.kernel
    fc[...] = fc[...][:, ::-1]
    explained = Explainer(model).explain(PICTURES[:2])
    assert np.abs(model.score(PICTURES) - scores).max() > 1e-4
    np.testing.assert_allclose([e.score for e in explained], model.score(PICTURES[:2]), atol=1e-5)
    assert set(model.identity.values()).isdisjoint(icar_jax.load(BUNDLES[0]).identity.values())
    with pytest.raises(TypeError, match="model.clip no longer has the structure of its checkpoint"):
        pickle.dumps(model)
    swapped = icar_jax.load(BUNDLES[0])
    other = dataclasses.replace(swapped.arch.vision, depth=5)
    swapped.clip.vision = icar_jax.Clip(dataclasses.replace(swapped.arch, vision=other), rngs=nnx.Rngs(0)).vision
    for _ in range(2):  # it is refused each time, not taken silently the second time
        with pytest.raises(ValueError, match="model.clip has a tower of a different shape"):
            swapped.encode_image(PICTURES)
    shared = icar_jax.load(BUNDLES[1])
    assert shared.clip is shared.clip
    shared.clip.vision.blocks[1].mlp.activation = jax.nn.relu
    with pytest.raises(ValueError, match="model.clip was modified, but the router of this bundle shares the first blocks"):
        shared.route(PICTURES)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda b: b.name)
def test_a_model_pickles_and_copies(bundle):
    model = icar_jax.load(bundle, batch_size=4)
    expected = model.route(PICTURES)
    for other in (pickle.loads(pickle.dumps(model)), copy.copy(model), copy.deepcopy(model)):
        found = other.route(PICTURES)
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)
        np.testing.assert_array_equal(found.exits, expected.exits)
        assert other.identity == model.identity and other.exits == model.exits
        np.testing.assert_array_equal(other.encode_text(TEXTS), model.encode_text(TEXTS))


def test_two_models_in_six_threads():
    models = [icar_jax.load(bundle, batch_size=4) for bundle in BUNDLES]
    expected = [(m.route(PICTURES).embeddings, m.encode_text(TEXTS)) for m in models]

    def work(i):
        model = models[i % 2]
        return model.route(PICTURES).embeddings, model.encode_text(TEXTS)

    with ThreadPoolExecutor(6) as pool:
        for i, (image, text) in enumerate(pool.map(work, range(12))):
            np.testing.assert_array_equal(image, expected[i % 2][0])
            np.testing.assert_array_equal(text, expected[i % 2][1])


def test_the_command_line_in_a_thread_leaves_signals_alone(capsys):
    before, raised = signal.getsignal(signal.SIGTERM), []

    def describe():
        try:
            cli.main(["describe", str(BUNDLES[0])])
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=describe)
    thread.start()
    thread.join()
    assert raised == [] and "bundle" in capsys.readouterr().out
    cli.main(["describe", str(BUNDLES[0])])
    assert signal.getsignal(signal.SIGTERM) is before


STRICT = """
import asyncio, os, sys
import numpy as np
import jax
for option in sys.argv[2:]:
    name, _, value = option.partition("=")
    jax.config.update(name, {"True": True}.get(value, value))
import icar_jax
model = icar_jax.load(sys.argv[1], batch_size=4)
rng = np.random.default_rng(0)
pictures = [rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(5)]

async def both():
    loop = asyncio.get_running_loop()
    run = lambda f: loop.run_in_executor(None, f)
    return await asyncio.gather(run(lambda: model.route(pictures)), run(lambda: model.encode_text(["a red square"])))

routed, text = asyncio.run(both())
assert routed.embeddings.dtype == text.dtype == np.float32 and routed.embeddings.shape == (5, 16)
grad = jax.jit(jax.grad(lambda p, x: model.graph.encode_image(p, x).sum()))
side = model.preprocess.image_size
grads = grad(model.params, jax.device_put(np.ones((1, side, side, 3), np.float32)))
assert {str(leaf.dtype) for leaf in jax.tree.leaves(grads)} == {"float32"}
print("held")
"""


@pytest.mark.parametrize("options", [
    ("jax_enable_x64=True",), ("jax_numpy_dtype_promotion=strict",), ("jax_debug_nans=True",),
    ("jax_numpy_rank_promotion=raise",), ("jax_transfer_guard=disallow",),
], ids=lambda o: o[0])  # fmt: skip
@pytest.mark.check
def test_strict_settings_of_jax_hold(options):
    run = subprocess.run([sys.executable, "-c", STRICT, str(BUNDLES[0]), *options], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "held" in run.stdout, run.stderr[-3000:]


TRAIN = """
import sys, tempfile
import jax
jax.config.update("jax_transfer_guard", "disallow")
jax.config.update("jax_numpy_rank_promotion", "raise")
from tests.support.runs import tiny_config
from icar_jax.config import validate
from icar_jax.training.loop import train
for kind in ("clip", "complexity"):
    with tempfile.TemporaryDirectory() as folder:
        assert (train(validate(tiny_config(kind)), folder + "/run") / "icar.json").is_file()
print("held")
"""


@pytest.mark.check
def test_training_holds_without_implicit_transfers_and_rank_promotion():
    run = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert run.returncode == 0 and "held" in run.stdout, run.stderr[-3000:]


def _in_child(model, queue):
    try:
        queue.put(("done", model.encode_text(TEXTS).shape))
    except RuntimeError as error:
        queue.put(("refused", str(error)))


@pytest.mark.check
@pytest.mark.parametrize("how, expected", [("fork", "refused"), ("spawn", "done")])
def test_a_forked_child_is_refused_and_a_spawned_one_works(how, expected):
    model = icar_jax.load(BUNDLES[0])
    model.encode_text(TEXTS)
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(model, queue))
    child.start()
    outcome, what = queue.get(timeout=120)
    child.join(30)
    assert outcome == expected and not child.is_alive()
    assert how != "fork" or "get_context('spawn')" in what
    assert os.getpid() == model._process


@pytest.mark.parametrize("name", ["openai", "open_clip_gelu", "open_clip_custom_text", "hf_quick_gelu", "siglip", "icar"])
def test_every_librarys_clip_is_a_module_at_once(name, tmp_path):
    case = parity_cases.load(name)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in case.options.items()}
    clip = icar_jax.Clip.from_pretrained(parity_cases.write_source(case, tmp_path / "source"), **options)
    graph, params = clip.split()
    image, text = jax.jit(lambda p, x, t: (graph.encode_image(p, x), graph.encode_text(p, t)))(
        params, case.images, case.inputs["tokens"]
    )
    np.testing.assert_allclose(image, case.outputs["image_embeds"], atol=1e-4)
    np.testing.assert_allclose(text, case.outputs["text_embeds"], atol=1e-4)
