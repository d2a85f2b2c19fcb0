"""The study of two frozen towers, on towers of three blocks and a handful of photographs."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from experiments.frozen_towers import measure, rows, study
from icar_jax.config import ConfigError
from icar_jax.models import flops
from tests.support import small_towers


def photographs(root, count=24):
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    records = []
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(root / "images" / f"{n}.png")
        split = "val" if n % 3 == 0 else "train"
        records.append({"filename": f"{n}.png", "split": split, "sentences": [{"raw": f"a red ball {n}"}, {"raw": "two dogs"}]})
    (root / "dataset.json").write_text(json.dumps({"images": records}))
    return root


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    whole = rows.config

    def small(row, *args):
        config = whole(row, *args)
        clip = dataclasses.replace(
            config.clip, image_size=32, context_length=8, embed_dim=8, projection_width=12, exits=(2,) if row.early else (),
            head_blocks=1 + row.several, text_head_blocks=1 + row.several,
        )  # fmt: skip
        config.loss.exit_weights = (0.2, 1.0) if row.early else (1.0,)
        config.data.calibration_size = 2
        config.optim.warmup_steps, config.train.epochs, config.train.batch_size = 1, 1, 8
        return dataclasses.replace(config, clip=clip)

    monkeypatch.setattr(study, "config", small)
    monkeypatch.setattr(study, "RESAMPLES", 20)
    monkeypatch.setattr(study, "DRAWS", 3)
    image, text = small_towers.write(tmp_path)
    return [
        "--photos", str(photographs(tmp_path / "photos")), "--image", str(image), "--text", str(text),
        "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--seeds", "0", "1",
    ]  # fmt: skip


@pytest.mark.check
def test_rows_are_trained_measured_and_kept(arguments, tmp_path):
    study.main([*arguments, "--rows", "tome_0.8_exits", "tome_0.8_untrained"])
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    found = {(m["row"], m["exit"]): m for m in record["rows"]}
    assert {(row, exit) for row, exit in found} == {
        ("last_block", 3), *((row, exit) for row in ("recipe", "tome_0.8_exits", "tome_0.8_untrained") for exit in (2, 3))
    }  # fmt: skip
    assert found["tome_0.8_exits", 3]["counted"] < 0.9 < 1 < found["recipe", 3]["counted"] < 1.2
    assert found["tome_0.8_exits", 3]["schedule"] and not found["recipe", 3]["schedule"]
    assert found["recipe", 3]["minus_recipe"]["value"] == 0 and found["recipe", 3]["kept"]["value"] == pytest.approx(100)
    kept = np.load(tmp_path / "out/recipe/1/val.npz")
    tower = measure.read(tmp_path / "out/recipe/1/model")
    assert kept["exit_2"].shape == (8, 8) and len(kept["texts"]) == 16
    np.testing.assert_allclose(np.linalg.norm(kept["exit_3"], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(measure.embed_texts(tower, ["a red ball 0"])[0], kept["texts"][0], atol=1e-5)
    assert measure.counted(tower.graph.arch, tower.graph.arch)[3] == 1
    assert flops.vision_flops(
        measure.read(tmp_path / "out/recipe/1/model", rows.rows()["drop_0.8_untrained"]).graph.arch.vision
    )
    assert {m["router"] for m in record["routing"]} == {"confidence", "oracle"}
    assert all(m["minus_random"]["low"] <= m["minus_random"]["value"] <= m["minus_random"]["high"] for m in record["routing"])
    assert set(record["seconds"]) == {"last_block@3", "recipe@2", "recipe@3", "tome_0.8_exits@2", "tome_0.8_exits@3"}
    assert (tmp_path / "out/study.png").stat().st_size > 5000
    table = (tmp_path / "out/study.md").read_text()
    assert "| tome_0.8_untrained | 2 |" in table and "| oracle |" in table
    trained = (tmp_path / "out/recipe/0/model/icar.json").stat().st_mtime_ns
    study.main([*arguments, "--rows", "--untimed"])
    assert (tmp_path / "out/recipe/0/model/icar.json").stat().st_mtime_ns == trained


def test_confidence_is_the_entropy_over_a_bank_of_captions():
    bank = np.eye(3, dtype=np.float32)
    sure, unsure = np.array([1, 0, 0]), np.full(3, 3**-0.5)
    found = study._entropy(np.array([sure, unsure], np.float32), bank, 100.0)
    assert found[0] < 1e-9 and found[1] == pytest.approx(np.log(3), rel=1e-5)


def test_unknown_rows_and_routers_are_named(arguments):
    with pytest.raises(SystemExit):
        study.main([*arguments, "--rows", "tome_0.7"])
    with pytest.raises(ConfigError, match="expected NAME=CHECKPOINT"):
        study._router("workdir/complexity")
