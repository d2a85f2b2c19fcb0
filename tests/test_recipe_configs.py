"""The configs that follow docs/recipe.md: what was measured is what they train, and their parts fit each other."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
from drawn import params

from icar_jax import checkpoint
from icar_jax.models import registry
from icar_jax.models.clip import Clip
from icar_jax.training import initial

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import recipes  # noqa: E402

CHEAPER = [("demo.py", "cheaper", "router"), *(("vit_l14_finetune.py", n, f"{n},router") for n in ("coco", "flickr30k"))]


def config(file, argument):
    return runpy.run_path(str(ROOT / "configs" / file))["get_config"](argument)


def test_the_demo_trains_what_was_measured(tmp_path):
    sizes = recipes.SETTINGS["small"]["scenes"]
    measured, found = recipes.clip_config("combined_gently", "scenes", sizes, 1, "", tmp_path), config("demo.py", "cheaper")
    for group, names in {
        "clip": ("variant", "exits", "exit_head", "merge", "temperature"), "loss": ("exit_weights", "distill_init"),
        "optim": ("lr", "exit_lr", "warmup_steps"), "train": ("steps", "batch_size"),
    }.items():  # fmt: skip
        for name in names:
            assert getattr(getattr(found, group), name) == getattr(getattr(measured, group), name), name
    head = recipes.head_config("regret", "scenes", sizes, 1, "", tmp_path, 4, tmp_path)
    router = config("demo.py", "router")
    assert (router.complexity.blocks, router.train.steps) == (head.complexity.blocks, head.train.steps)


@pytest.mark.parametrize("file, argument, router", CHEAPER)
def test_the_router_reads_below_the_exit_and_the_merging(file, argument, router):
    cheaper, head = config(file, argument), config(file, router)
    merging = next(i for i, patches in enumerate(cheaper.clip.merge, 1) if patches)
    assert 1 <= head.complexity.blocks <= min(cheaper.clip.exits[0], merging)
    assert cheaper.eval.complexity == f"{head.complexity.clip}/router" and len(cheaper.eval.early_share) == 1


def test_the_demos_clip_can_be_gone_on_from(tmp_path):
    arch, said = registry.clip_arch(config("demo.py", "clip").clip), []
    cheaper = registry.clip_arch(config("demo.py", "cheaper").clip)
    random = params(Clip(arch).shapes(), 0)
    folder = checkpoint.write(tmp_path / "model", "clip", {"arch": dataclasses.asdict(arch)}, random)
    shapes = Clip(cheaper).shapes()
    initial.load_params(folder, "clip", cheaper, shapes, lambda: params(shapes, 1), said.append)
    assert any("exits 2 are left out" in line for line in said) and any("exits 4 start from" in line for line in said)
