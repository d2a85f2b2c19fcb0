"""Sharding rules by path, and one step on eight fake devices against one device."""

import dataclasses
import re

import pytest
from jax.sharding import PartitionSpec as P

from icar_jax import architectures, pytree
from icar_jax.config import ClipConfig
from icar_jax.models import variants
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch
from icar_jax.parallel.rules import RULES, spec_for
from icar_jax.training.loop import train
from tests.support import programs
from tests.support.programs import on_eight_devices
from tests.support.runs import tiny_config

SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("vision/blocks/3/attn/qkv/kernel", (64, 192), P("fsdp", "tensor")),
        ("vision/blocks/3/attn/out/kernel", (64, 64), P("tensor", "fsdp")),
        ("text/blocks/0/mlp/fc1/bias", (256,), P("tensor")),
        ("vision/exits/3/proj/kernel", (64, 33), P("fsdp", None)),
        ("vision/blocks/3/ln1/scale", (64,), P()),
        ("text/proj_mlp/fc1/kernel", (64, 32), P("fsdp", "tensor")),
        ("vision/exits/3/proj_mlp/fc2/kernel", (32, 16), P("tensor", "fsdp")),
        ("logit_scale", (), P()),
        ("exit_logit_scale/3", (), P()),
        ("vision/blocks/3/attn/qkv/kernel", (63, 192), P(None, "tensor")),  # an axis that does not divide stays whole
        ("somewhere/new", (512, 512), P("fsdp", None)),  # large and unmatched: fsdp
        ("somewhere/new", (5, 5), P()),
    ],
)
def test_spec_of_a_path(path, shape, spec):
    assert spec_for(path, shape, SHAPE) == spec


def test_every_large_leaf_of_the_large_model_is_cut():
    """ViT-L/14 by shapes alone: no matrix of a million scalars or more is left whole on every device."""
    shapes = pytree.flatten(Clip.graph(variants.CLIP["vit_l14"]).shapes)
    whole = [p for p, leaf in shapes.items() if spec_for(p, leaf.shape, SHAPE) == P() and leaf.size >= 1 << 20]
    assert whole == []


def test_no_leaf_of_the_large_model_is_unmatched():
    """ViT-L/14 with exits and both losses' scalars: a rule of the table for every parameter, and so for its moments."""
    arch = architectures.clip_arch(ClipConfig(variant="vit_l14", exits=(6, 12)))
    paths = list(pytree.flatten(Clip.graph(dataclasses.replace(arch, logit_bias=True)).shapes))
    assert len(paths) > 400 and [p for p in paths if not any(re.search(pattern, p) for pattern, _ in RULES)] == []


def test_no_leaf_of_joined_towers_is_unmatched():
    """A text tower after BERT, registers and SwiGLU in the vision tower, and projections with an MLP."""
    space = {"projection": "linear_mlp", "projection_width": 32}
    text = TextArch(20, 90, 24, 2, 3, 40, 16, end_id=0, pool="mean", causal=False, post_norm=True, pad_id=0, **space)
    vision = VisionArch(16, 8, 24, 2, 2, 40, 16, exits=(1,), registers=2, ffn="swiglu", **space)
    paths = list(pytree.flatten(Clip.graph(ClipArch(vision, text)).shapes))
    assert {"text/ln_embed/scale", "text/proj_mlp/fc1/kernel", "vision/exits/1/proj_mlp/fc2/kernel"} <= set(paths)
    assert [p for p in paths if not any(re.search(pattern, p) for pattern, _ in RULES)] == []


def test_every_rule_is_used():
    config = ClipConfig(variant="vit_l14", exits=(12,))
    paths = list(pytree.flatten(Clip.graph(architectures.clip_arch(config)).shapes))
    for pattern, _ in RULES:
        assert any(re.search(pattern, path) for path in paths), pattern


SCRIPT = """
import json, sys
import jax, numpy as np, optax
from tests.support.runs import tiny_config
from icar_jax import pytree
from icar_jax.config import MeshConfig
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.parallel.mesh import make_mesh
from icar_jax.parallel.rules import shardings
from icar_jax.training.optimizer import make_optimizer
from icar_jax.training.step import init_state, make_step, put_batch
from icar_jax.training.tasks.kinds import kind_of

def keep_gradient():
    # Passes updates on as they are; its state is the last gradient.
    zeros = lambda tree: jax.tree.map(jax.numpy.zeros_like, tree)
    return optax.GradientTransformation(zeros, lambda grads, state, params=None: (grads, grads))

assert jax.device_count() == 8
tokenizer = Tokenizer.train(["a red circle", "two squares"], 300)
data = np.random.default_rng(0)
batches = [data.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8) for _ in range(3)]
captions = [" ".join(data.choice(["red", "blue", "a", "circle", "left", "two", "star", "big"], 8)) for _ in range(16)]
config = tiny_config(batch_size=16)
results, start, expected = {}, None, None
for shape in [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]:
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    task = kind_of(config).task(tokenizer, mesh)
    tokens = tokenizer(captions, task.context_length)
    optimizer = optax.chain(keep_gradient(), make_optimizer(config.optim, 4))
    start = start or jax.device_get(jax.jit(task.init)(jax.random.key(0)))
    state = init_state(task, optimizer, mesh, config, jax.device_put(start, shardings(task.shapes, mesh)))
    kernel = state["params"]["vision"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
    pieces = len({str(s.index) for s in kernel.addressable_shards})
    step = make_step(task, optimizer, mesh, config)
    losses = []
    for image in batches:
        state, metrics = step(state, put_batch({"image": image, "tokens": tokens}, task.fields, mesh), {})
        losses.append(float(metrics["loss"]))
        if len(losses) == 1:
            gradient = {p: np.asarray(g) for p, g in pytree.flatten(state["opt_state"][0]).items()}
    expected = expected or gradient
    off = {p: float(np.linalg.norm(g - expected[p]) / np.linalg.norm(expected[p])) for p, g in gradient.items()}
    worst = max(off, key=off.get)
    results[str(shape)] = {"losses": losses, "pieces": pieces, "worst": [worst, off[worst]], "leaves": len(off)}
print(json.dumps(results))
"""


@pytest.mark.check
def test_eight_devices_equal_one():
    """The losses of three steps, and the gradient of the first one leaf by leaf, relative to the leaf's norm."""
    results = on_eight_devices(SCRIPT)
    single = results["(1, 1, 1)"]["losses"]
    for shape, found in results.items():
        assert found["losses"] == pytest.approx(single, rel=1e-5), shape
        assert found["worst"][1] <= 1e-5 and found["leaves"] > 60, (shape, found["worst"])
    assert {shape: found["pieces"] for shape, found in results.items()} == {
        "(1, 1, 1)": 1, "(8, 1, 1)": 1, "(2, 4, 1)": 4, "(2, 2, 2)": 4,
    }  # fmt: skip


RESUME = """
import json, sys
from tests.support.runs import tiny_config
from icar_jax.config import MeshConfig
from icar_jax.training.loop import train

for steps, shape in ((1, (8, 1, 1)), (3, (2, 2, 2))):
    config = tiny_config()
    config.mesh = MeshConfig(*shape)
    train(config, sys.argv[1], stop_after=steps)
print(json.dumps({}))
"""


@pytest.mark.check
def test_a_run_continues_on_other_meshes(tmp_path):
    """A step on (8, 1, 1), two on (2, 2, 2), one on one device: the losses of four on one device, to 1e-5."""
    on_eight_devices(RESUME, str(tmp_path / "moved"))
    for name in ("moved", "stayed"):
        train(tiny_config(), tmp_path / name)
    moved, stayed = (programs.curve(tmp_path / name) for name in ("moved", "stayed"))
    assert [line["step"] for line in moved] == [1, 2, 3, 4]
    for a, b in zip(moved, stayed, strict=True):
        assert {k: a[k] for k in a if "loss" in k} == pytest.approx({k: b[k] for k in b if "loss" in k}, rel=1e-5)
