"""The configs of docs/recipe.md train what was measured, and their parts are compatible."""

import dataclasses
import runpy

import pytest

from experiments.retention import recipes
from icar_jax import architectures, checkpoint
from icar_jax.models.clip import Clip
from icar_jax.models.flops import vision_flops
from icar_jax.training import init_weights
from tests.support.drawn import params
from tests.support.places import ROOT

SMALL = [("demo.py", "scenes"), ("photos.py", "photos")]
CHEAPER = [
    *((file, "cheaper", "router") for file, _ in SMALL),
    *(("vit_l14_finetune.py", name, f"{name},router") for name in ("coco", "flickr30k")),
]


def config(file, argument):
    return runpy.run_path(str(ROOT / "configs" / file))["get_config"](argument)


@pytest.mark.parametrize("file, dataset", SMALL)
def test_what_was_measured_is_what_is_trained(file, dataset, tmp_path):
    sizes = recipes.SETTINGS["small"][dataset]
    measured = recipes.clip_config("combined_gently", dataset, sizes, 1, str(tmp_path), tmp_path)
    head = recipes.head_config("gallery", dataset, sizes, 1, str(tmp_path), tmp_path, 4, tmp_path)
    data = ("source", "crop_scale", "flip", "vocabulary")
    same(measured, config(file, "cheaper"), {
        "clip": ("variant", "exits", "exit_head", "merge", "temperature"), "loss": ("exit_weights", "distill_init"),
        "data": (*data, "resize"), "optim": ("lr", "exit_lr", "weight_decay", "warmup_steps"),
        "train": ("steps", "batch_size"),
    })  # fmt: skip
    same(head, config(file, "router"), {
        "complexity": ("variant", "blocks", "target", "regret", "rivals", "pooled_norm", "dropout"), "data": data,
        "optim": ("lr", "warmup_steps"), "train": ("steps", "batch_size", "dtype"),
    })  # fmt: skip


def same(one, other, names):
    for group, fields in names.items():
        for name in fields:
            assert getattr(getattr(one, group), name) == getattr(getattr(other, group), name), f"{group}.{name}"


@pytest.mark.parametrize("file, argument", [each[:2] for each in CHEAPER])
def test_full_depth_cost_matches_the_docs(file, argument):
    vision = architectures.clip_arch(config(file, argument).clip).vision
    share = vision_flops(vision) / vision_flops(dataclasses.replace(vision, merge=()))
    assert round(share, 2) == (0.68 if file == "vit_l14_finetune.py" else 0.69)


@pytest.mark.parametrize("file, argument, router", CHEAPER)
def test_the_router_reads_at_the_exit(file, argument, router):
    cheaper, head = config(file, argument), config(file, router)
    assert (head.complexity.blocks,) == cheaper.clip.exits
    assert cheaper.eval.complexity == f"{head.complexity.clip}/router" and len(cheaper.eval.early_share) == 1


@pytest.mark.parametrize("file, exit", [("demo.py", 2), ("photos.py", 3)])
def test_the_trained_clip_can_be_fine_tuned(file, exit, tmp_path):
    arch, said = architectures.clip_arch(config(file, "long" if file == "demo.py" else "clip").clip), []
    cheaper = architectures.clip_arch(config(file, "cheaper").clip)
    random = params(Clip.graph(arch).shapes, 0)
    folder = checkpoint.write(tmp_path / "model", "clip", {"arch": dataclasses.asdict(arch)}, random)
    shapes = Clip.graph(cheaper).shapes
    init_weights.load_params(folder, "clip", cheaper, shapes, lambda: params(shapes, 1), said.append)
    assert any(f"exits {exit} are dropped" in line for line in said)
    assert any("exits 4 are initialised from" in line for line in said)
