"""The short examples run, and do what they say."""

import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import icar_jax
from tests.support.places import FIXTURES, ROOT

EXAMPLES = ROOT / "examples"
SHORT = sorted(file.name for file in EXAMPLES.glob("*.py") if file.name != "demo.py")


def main(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of pictures, dark and light."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, base in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for i in range(6):
            noise = rng.integers(-30, 30, (32, 32, 3))
            Image.fromarray((base + noise).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_each_fits_on_a_page():
    assert len(SHORT) == 7
    assert all(len((EXAMPLES / name).read_text().splitlines()) < 60 for name in SHORT)


def test_encode_ranks(clip_folder, pictures):
    files = [str(file) for file in sorted(pictures.glob("*/*.png"))]
    ranking = main("encode.py")(clip_folder, "a red circle", *files)
    scores = [score for _, score in ranking]
    assert scores == sorted(scores, reverse=True) and {name for name, _ in ranking} == set(files)


def test_route(pictures):
    bundle = FIXTURES / "format_1" / "bundle_complexity"
    files = [str(file) for file in sorted(pictures.glob("*/*.png"))]
    routed = main("route.py")(Namespace(bundle=bundle, pictures=files, budget=None))
    np.testing.assert_array_equal(routed.exits, icar_jax.load(bundle).route(files).exits)


def test_lora_learns():
    losses = main("lora.py")(steps=6)
    assert losses[-1] < losses[0] - 0.05


def test_an_own_exit_head_counts():
    clip, embeds = main("own_exit_head.py")()
    assert list(embeds) == [2, 4, 6] and embeds[2].shape == (4, clip.arch.vision.embed_dim)
    images = jax.random.normal(jax.random.key(0), (4, 64, 64, 3))
    plain = icar_jax.Clip(clip.arch, rngs=nnx.Rngs(0)).encode_image_exits(images)
    assert np.abs(plain[2] - embeds[2]).max() > 1e-2
    np.testing.assert_allclose(plain[4], embeds[4], atol=1e-5)


def test_an_own_attention_counts():
    plain, other, local = main("own_attention.py")()
    np.testing.assert_allclose(plain, other, atol=1e-5)
    assert np.abs(plain - local).max() > 1e-4


def test_gradients_find_the_pixel(clip_folder, pictures, capsys):
    saliency, along = main("gradients.py")(clip_folder, "a red circle", str(pictures / "dark" / "0.png"))
    assert saliency.shape == (32, 32) and saliency.max() > 0 and np.isfinite(along)
    assert "curvature" in capsys.readouterr().out


def test_a_linear_probe_separates_dark_from_light(clip_folder, pictures):
    assert main("linear_probe.py")(clip_folder, pictures) == 1.0


@pytest.mark.check
def test_the_notebook_runs_in_a_jupyter_kernel_and_shows_progress(tmp_path):
    notebook = ROOT / "docs" / "quickstart.ipynb"
    assert not any(cell.get("outputs") for cell in json.loads(notebook.read_text())["cells"]), "it is kept without outputs"
    command = ["jupyter", "nbconvert", "--to", "notebook", "--execute", str(notebook), "--output-dir", str(tmp_path)]
    env = {**os.environ, "JUPYTER_PLATFORM_DIRS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=500, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    cells = [c for c in json.loads((tmp_path / "quickstart.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    text = ["".join("".join(o.get("text", "")) for o in cell["outputs"]) for cell in cells]
    assert "20/20" in text[0] and "the best of 12 pictures is number" in text[1] and "(12, 48, 48, 3)" in text[3]
    assert float(text[2].split("changed by")[1]) > 1e-4
