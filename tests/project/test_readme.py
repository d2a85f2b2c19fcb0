"""The Python examples of the README run as they stand there, in order, on a tiny bundle where the demo's would be."""

import re

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import checkpoint
from icar_jax.data.sources.files import ImagePaths
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.inference.budgets import counted_costs, pack_quantiles
from icar_jax.inference.files.embedding import embed_files
from icar_jax.models.variants import CLIP
from tests.support.places import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run(clip_folder, complexity_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(name)
    make_bundle(clip_folder, complexity_folder, "workdir/demo/bundle", thresholds=(0.3, 0.6))
    model = icar_jax.load("workdir/demo", batch_size=8)
    routing = model.description["routing"] | {"scores": pack_quantiles(rng.random(100))}
    checkpoint.amend("workdir/demo/bundle", {"routing": routing})
    embed_files(model, ImagePaths(["a.jpg", "b.png"]), "workdir/corpus")
    # A tower of tests costs little beside any complexity model, so no budget below 1 could be met.
    lowest = counted_costs(model.arch, model.scorer.complexity.arch).lowest_budget
    small = lambda block: block.replace("budget=0.7", "budget=1.0") if lowest > 0.7 else block

    examples = [block for block in BLOCKS if "variants[" not in block]
    assert len(examples) == 2 and all(block.startswith(("import", "from")) for block in examples)
    names: dict = {}
    for block in examples:
        exec(compile(small(block), "README.md", "exec"), names)
    assert names["image"].shape == names["cheap"].shape == (2, 24) and names["score"].shape == (2,)
    assert capsys.readouterr().out.strip().endswith((str(tmp_path / "a.jpg"), str(tmp_path / "b.png")))


@pytest.mark.check
def test_the_example_of_modules_runs():
    (example,) = [block for block in BLOCKS if "variants[" in block]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["embeds"].shape == names["same"].shape == (1, CLIP["vit_b32"].vision.embed_dim)
    assert np.abs(names["embeds"] - names["same"]).max() > 0, "the changed activation counts"
