"""Sharding rules by path, and one step on eight fake devices against one device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P

from icar_jax import pytree
from icar_jax.models import registry
from icar_jax.models.clip import Clip
from icar_jax.parallel.rules import RULES, spec_for

ROOT = Path(__file__).parent.parent
SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("vision/blocks/3/attn/qkv/kernel", (64, 192), P("fsdp", "tensor")),
        ("vision/blocks/3/attn/out/kernel", (64, 64), P("tensor", "fsdp")),
        ("text/blocks/0/mlp/fc1/bias", (256,), P("tensor")),
        ("vision/exits/3/proj/kernel", (64, 33), P("fsdp", None)),
        ("vision/blocks/3/ln1/scale", (64,), P()),
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
    shapes = pytree.flatten(Clip(registry.CLIP["vit_l14"]).shapes())
    whole = [p for p, leaf in shapes.items() if spec_for(p, leaf.shape, SHAPE) == P() and leaf.size >= 1 << 20]
    assert whole == []


def test_every_rule_is_used():
    config = registry.cfg.ClipConfig(variant="vit_l14", exits=(12,))
    paths = list(pytree.flatten(Clip(registry.clip_arch(config)).shapes()))
    for pattern, _ in RULES:
        assert any(re.search(pattern, path) for path in paths), pattern


SCRIPT = """
import json, sys
import jax, numpy as np
sys.path.insert(0, "tests")
from conftest import tiny_config
from icar_jax import pytree
from icar_jax.config import MeshConfig
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.parallel.mesh import make_mesh
from icar_jax.training.optimizer import make_optimizer
from icar_jax.training.step import init_state, make_step, put_batch
from icar_jax.training.tasks import make_task

assert jax.device_count() == 8
tokenizer = Tokenizer.train(["a red circle", "two squares"], 300)
rng = np.random.default_rng(0)
results = {}
for shape in [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]:
    config = tiny_config(batch_size=16)
    task = make_task(config, tokenizer)
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = make_mesh(MeshConfig(*shape), devices)
    optimizer = make_optimizer(config.optim, 4)
    state = init_state(task, optimizer, mesh, 0)
    kernel = state["params"]["vision"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
    pieces = len({str(s.index) for s in kernel.addressable_shards})
    step = make_step(task, optimizer, mesh, 0)
    data = np.random.default_rng(0)
    losses = []
    for _ in range(3):
        batch = {
            "image": data.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8),
            "tokens": tokenizer([f"a red circle {i}" for i in range(16)], task.context_length),
        }
        state, metrics = step(state, put_batch(batch, task.fields, mesh))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    results[str(shape)] = {"losses": losses, "pieces": pieces}
print(json.dumps(results))
"""


@pytest.mark.check
def test_eight_devices_equal_one():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    single = results["(1, 1, 1)"]["losses"]
    for shape, found in results.items():
        for step, expected in zip(found["losses"], single, strict=True):
            assert step == pytest.approx(expected, rel=1e-4), shape
    assert {shape: found["pieces"] for shape, found in results.items()} == {
        "(1, 1, 1)": 1, "(8, 1, 1)": 1, "(2, 4, 1)": 4, "(2, 2, 2)": 4,
    }  # fmt: skip
