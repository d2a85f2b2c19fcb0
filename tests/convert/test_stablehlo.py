"""icar export --to stablehlo: programs that a process without this package reloads, and that give the model's numbers."""

import json
import subprocess
import sys

import numpy as np
import pytest

import icar_jax
from icar_jax import cli
from icar_jax.checkpoint import CheckpointError
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.stablehlo import export_programs
from icar_jax.evaluation.routing.calibration import make_bundle
from tests.support.programs import environment

READER = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file

folder, inputs, out = Path(sys.argv[1]), np.load(sys.argv[2]), {}
about = json.loads((folder / "icar.json").read_text())
for name, program in about["programs"].items():
    run = export.deserialize((folder / program["file"]).read_bytes())
    weights = load_file(folder / program["weights"])
    for key in inputs:
        if key.startswith(name + "/"):
            out[key] = np.asarray(run.call(weights, inputs[key]))
np.savez(sys.argv[3], **out)
assert not any(module.startswith(("icar_jax", "flax")) for module in sys.modules)
"""


@pytest.fixture(scope="module")
def bundle(clip_folder, complexity_folder, tmp_path_factory):
    return make_bundle(clip_folder, complexity_folder, tmp_path_factory.mktemp("bundle") / "bundle", thresholds=(0.3, 0.6))


@pytest.mark.check
def test_a_process_without_this_package_gets_the_same_numbers(bundle, tmp_path, capsys):
    out = tmp_path / "programs"
    cli.main(["export", str(bundle), str(out), "--to", "stablehlo"])
    assert "image_3.stablehlo" in capsys.readouterr().out
    about = json.loads((out / "icar.json").read_text())
    assert list(about["programs"]) == ["image_1", "image_2", "image_3", "text", "complexity"]
    assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["routing"]["thresholds"] == [0.3, 0.6]
    assert about["programs"]["image_2"] == {
        "file": "image_2.stablehlo", "weights": "clip.safetensors", "exit": 2, "output": "float32 [batch, 24], unit norm",
        "input": "uint8 [batch, 32, 32, 3], prepared pixels, RGB, not normalised",
    }  # fmt: skip

    model = icar_jax.load(bundle, batch_size=8)
    assert about["identity"] == model.identity and about["tokens"]["end_id"] == model.tokenizer.end_id
    rng = np.random.default_rng(0)
    inputs, expected = {}, {}
    for n in (1, 5):  # any batch size
        pixels = rng.integers(0, 256, size=(n, 32, 32, 3), dtype=np.uint8)
        texts = ["a small red circle", "stripes", "", "two blue squares", "a star"][:n]
        tokens, _ = model.tokenizer.encode(texts, 16)
        inputs |= {f"{name}/{n}": tokens if name == "text" else pixels for name in about["programs"]}
        expected |= {f"image_{e}/{n}": model.towers[e](pixels) for e in model.exits}
        expected |= {f"text/{n}": model.encode_text(texts), f"complexity/{n}": model.scorer.forward(pixels)}
    np.savez(tmp_path / "in.npz", **inputs)
    run = subprocess.run(
        [sys.executable, "-c", READER, str(out), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")],
        env=environment(tmp_path / "cache"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = np.load(tmp_path / "out.npz")
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=key)


def test_a_fixed_batch_in_bfloat16_of_a_part_alone(complexity_folder, clip_folder, tmp_path):
    written = export_programs(complexity_folder, tmp_path / "out", batch=4, dtype="bfloat16", platforms=["cpu"])
    assert written.files == ["README.md", "complexity.safetensors", "complexity.stablehlo", "icar.json"]
    about = json.loads((tmp_path / "out" / "icar.json").read_text())
    assert about["programs"]["complexity"]["input"].startswith("uint8 [4, 32, 32, 3]") and "routing" not in about
    assert "text.stablehlo" in export_programs(clip_folder, tmp_path / "clip", platforms=["cpu"]).files


def test_mistakes_leave_nothing(bundle, tmp_path, capsys):
    for options, match in (
        ({"platforms": ["gpu"]}, "cpu, cuda, rocm, tpu"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"batch": 0}, "at least 1"),
    ):
        with pytest.raises(ConvertError, match=match):
            export_programs(bundle, tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match="does not exist"):
        export_programs(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConvertError, match="exists already"):
        export_programs(bundle, tmp_path / "taken")
    with pytest.raises(SystemExit):
        cli.main(["export", str(bundle), str(tmp_path / "out"), "--to", "hf", "--batch", "3"])
    assert "can only be used with --to stablehlo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
