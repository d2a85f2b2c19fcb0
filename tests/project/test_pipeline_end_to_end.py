"""From training to metrics.json: a tiny run in every test run, the demo as printed in the README in `make check`."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import checkpoint, cli
from icar_jax.config import ConfigError, DistractorConfig
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation.evaluate import evaluate
from icar_jax.evaluation.metrics.retrieval import ranks
from icar_jax.evaluation.records.plain import plain
from icar_jax.training.loop import train
from tests.support.keys import require_known_keys
from tests.support.places import ROOT
from tests.support.runs import tiny_config

DIRECTIONS = ("text_to_image", "image_to_text")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A CLIP and a complexity model trained for four steps each."""
    root = tmp_path_factory.mktemp("runs")
    train(tiny_config("clip"), root / "clip")
    train(tiny_config("complexity"), root / "complexity")
    return root


@pytest.fixture(scope="module")
def bundled(runs):
    cli.main(
        ["bundle", "--clip", str(runs / "clip"), "--complexity", str(runs / "complexity"),
         "--out", str(runs / "clip" / "bundle"), "--share", "0.6"]
    )  # fmt: skip
    return runs / "clip"


@pytest.fixture(scope="module")
def metrics(bundled):
    config = tiny_config("clip")
    config.eval.folds = 4
    evaluate(config, bundled, save_embeddings=True)
    return json.loads((bundled / "metrics.json").read_text())


def check_schema(metrics, exits, images):
    assert metrics["gallery"]["images"] == images and metrics["gallery"]["captions"] >= images
    names = {"full", "routed", "random", "oracle", "lossless", *(f"exit_{e}" for e in exits[:-1])}
    assert set(metrics["runs"]) == names
    for name, run in metrics["runs"].items():
        for direction in DIRECTIONS:
            assert 0 <= run[direction]["r1"] <= run[direction]["r5"] <= run[direction]["r10"] <= 100
        assert run["flops_per_image"] > 0, name
        assert (run["images_per_s"] is None) == (name in ("oracle", "lossless")), name
        assert sum(run["share"].values()) == pytest.approx(1)
    routed = metrics["runs"]["routed"]
    assert set(routed["share"]) == {str(e) for e in exits}
    assert metrics["runs"]["random"]["share"] == metrics["runs"]["oracle"]["share"] == routed["share"]
    assert {"value", "low", "high", "includes_zero"} <= metrics["comparisons"]["routed_minus_random"].keys()


def test_metrics_hold_every_run(metrics):
    check_schema(metrics, (2, 3), 30)
    require_known_keys(metrics, "retrieval")
    assert "colour histograms alone" in " ".join(metrics["notes"])


def test_saved_embeddings_give_the_same_metrics(bundled, metrics, tmp_path):
    saved, config = bundled / "embeddings", tiny_config("clip")
    exits = [f"images_{name}.npz" for name in metrics["runs"] if name.startswith("exit_")]
    assert {file.name for file in saved.iterdir()} == {"images.npz", "images_routed.npz", "texts.npz", "labels.json", *exits}
    for run, name in (("full", "images"), ("routed", "images_routed")):
        arguments = ["evaluate-embeddings", str(saved / f"{name}.npz"), str(saved / "texts.npz")]
        arguments += ["--labels", str(saved / "labels.json")]
        cli.main([*arguments, "--out", str(tmp_path / run), "--folds", "4", "--bootstrap", str(config.eval.bootstrap)])
        found, expected = json.loads((tmp_path / run / "metrics.json").read_text()), metrics["runs"][run]
        for direction in DIRECTIONS:
            assert found[direction] == expected[direction] and found[direction].keys() > {"r1", "median_rank", "map10"}
            assert found["intervals"][direction]["r5"] == expected["intervals"][direction]["r5"]["value"]
        assert found["folds"] == expected["folds"] and len(found["folds"]["each"]) == 4
    assert metrics["runs"]["random"].get("folds") is None
    assert any("full, mean R@1, 5, 10 of 4 folds" in note for note in metrics["notes"])


def test_figures_are_written(bundled, metrics):
    for name in ("retention.png", "complexity.png"):
        assert Image.open(bundled / name).size[0] > 500


def test_flops_count_the_router(metrics):
    runs, routing = metrics["runs"], metrics["routing"]
    share = runs["routed"]["share"]
    towers = share["2"] * runs["exit_2"]["flops_per_image"] + share["3"] * runs["full"]["flops_per_image"]
    assert runs["random"]["flops_per_image"] == pytest.approx(towers)
    assert runs["routed"]["flops_per_image"] == pytest.approx(towers + routing["router_flops"])
    assert routing["router_flops"] > 0


def test_thresholds_come_from_the_calibration_images(bundled):
    routing = checkpoint.describe(bundled / "bundle")["routing"]
    assert routing["found"]["method"] == "shares" and routing["found"]["calibration"] == "scenes/calibration"
    assert routing["found"]["images"] == 40 and routing["found"]["reached"]["2"] == pytest.approx(0.6, abs=0.03)
    scores = np.sort(icar_jax.load(bundled).score([r.image() for r in Scenes("calibration", 40)]))
    assert scores[23] <= routing["thresholds"][0] <= scores[24]


def test_the_routed_recall_is_that_of_the_public_api(bundled, metrics):
    """What evaluate.py reports is what a user gets from icar_jax.load."""
    model = icar_jax.load(bundled)
    records = list(Scenes("val", 30))
    owner = np.repeat(np.arange(30), [len(r.captions) for r in records])
    texts = model.encode_text([c for r in records for c in r.captions])
    found = ranks(model.encode_image([r.image() for r in records]), texts, owner)
    assert 100 * np.mean(found.text_to_image <= 5) == pytest.approx(metrics["runs"]["routed"]["text_to_image"]["r5"], abs=1.2)


def test_category_metrics_and_intervals_are_there(metrics):
    for name, run in metrics["runs"].items():
        for direction in DIRECTIONS:
            found = run["intervals"][direction]
            assert set(found) == set(run[direction]) >= {"r5", "median_rank", "map10", "map100_standard"}
            for metric, value in run[direction].items():
                assert found[metric]["value"]["value"] == pytest.approx(value), (name, metric)
                assert found[metric]["value"]["low"] <= value <= found[metric]["value"]["high"]
        assert run["intervals"]["mean"]["r5"]["retention"] == pytest.approx(run["retention"])
    assert metrics["runs"]["full"]["intervals"]["mean"]["r1"]["difference"] == {"value": 0, "low": 0, "high": 0}


@pytest.mark.check
def test_distractors_fill_the_galleries(bundled, metrics, tmp_path):
    config = tiny_config("clip")
    config.eval.distractors = DistractorConfig("scenes", split="test", size=25)
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({record.name: list(record.labels) for record in Scenes("test", 5)}))
    config.eval.distractors.labels = str(file)
    found = evaluate(config, bundled)
    captions = sum(len(record.captions) for record in Scenes("test", 25))
    before = metrics["gallery"]
    assert plain(found.gallery) == before | {
        "images": 55, "captions": before["captions"] + captions, "distractors": "scenes/test", "queries": before["queries"],
    }  # fmt: skip
    assert any("no distractor is also in scenes/val" in note for note in found.notes)
    assert any("5 of 25 images have labels" in note for note in found.notes)
    for name, run in found.runs.items():
        for direction in DIRECTIONS:
            alone, among = metrics["runs"][name][direction], run.metrics(direction)
            assert among["mean_rank"] > alone["mean_rank"] and among["r10"] <= alone["r10"], (name, direction)
            assert among["map10"] < alone["map10"]
    config.eval.distractors = DistractorConfig("scenes", split="val", size=25)
    with pytest.raises(ConfigError, match="are also in the evaluated scenes/val"):
        evaluate(config, bundled)


@pytest.mark.check
def test_budgets_and_a_smaller_model_stand_beside_the_rest(bundled, metrics):
    config = tiny_config("clip")
    config.eval.budgets = (0.95,)
    config.eval.static = str(bundled / "model")  # the same model: its run must be that of full depth
    found = evaluate(config, bundled)
    require_known_keys(plain(found), "retrieval")
    assert set(found.runs) == {*metrics["runs"], "budget_0.95", "static"}
    budget, runs = found.runs["budget_0.95"], found.runs
    assert budget.found["calibration"] == "scenes/calibration" and budget.found["cost"] <= 0.95
    assert budget.images_per_s > 0 and sum(budget.share.values()) == pytest.approx(1)
    assert dataclasses.replace(runs["static"], images_per_s=runs["full"].images_per_s) == runs["full"]
    for part in ("decode_ms", "preprocess_ms", "router_ms", "text_ms", "compile_s"):
        assert getattr(found.timing, part) > 0, part
    assert set(found.timing.tower_ms) == {2, 3} and found.timing.padding.rows >= 0
    full = next(p for p in found.frontier if p.share[3] == 1.0)
    assert full.kept == pytest.approx(100) and full.cost["counted"] > 1, "the sweep counts the router"
    assert all(p.cost["measured"] > 0 for p in found.frontier)


@pytest.mark.check
def test_evaluation_bundles_with_the_configured_complexity_model(runs, tmp_path):
    config = tiny_config("clip")
    train(config, tmp_path)
    config.eval.complexity = str(runs / "complexity")
    assert "routed" in evaluate(config, tmp_path).runs
    assert checkpoint.find(tmp_path) == tmp_path / "bundle"


@pytest.mark.check
def test_without_a_complexity_model_the_report_says_so(tmp_path):
    config = tiny_config("clip")
    train(config, tmp_path)
    config.eval.complexity = str(tmp_path / "nowhere")
    found = evaluate(config, tmp_path)
    assert set(found.runs) == {"full", "exit_2", "lossless"} and found.frontier is None
    page = (tmp_path / "report/index.html").read_text()
    assert "not routed" in page and "lossless" in page and "Rank change by exit" in page
    assert any("not routed" in note and "nowhere" in note for note in found.notes)


def test_a_stale_bundle_is_refused(bundled, metrics, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundled, copy)
    description = json.loads((copy / "model" / checkpoint.DESCRIPTION).read_text())
    description["hashes"][checkpoint.WEIGHTS] = "0" * 64
    (copy / "model" / checkpoint.DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(checkpoint.CheckpointError, match="a different clip model"):
        evaluate(tiny_config("clip"), copy)


@pytest.mark.check
def test_another_complexity_model_than_the_bundled_one_is_refused(bundled, metrics, complexity_folder):
    config = tiny_config("clip")
    config.eval.complexity = str(complexity_folder)
    with pytest.raises(checkpoint.CheckpointError, match="a different complexity model.*--config.eval.complexity="):
        evaluate(config, bundled)
    config.eval.complexity = ""
    assert "routed" in evaluate(config, bundled).runs


def test_other_shares_than_the_bundled_ones_are_refused(bundled, metrics):
    config = tiny_config("clip")
    config.eval.early_share = (0.3,)
    with pytest.raises(ConfigError, match=r"early_share=\(0.3,\), but the thresholds"):
        evaluate(config, bundled)


@pytest.mark.parametrize("field, value", [("calibration_size", 60), ("train_split", "val"), ("scenes_size", 10)])
def test_evaluation_needs_the_data_of_the_training_run(bundled, metrics, field, value):
    """Else images that were trained on could end up in the gallery or in the calibration set."""
    config = tiny_config("clip")
    setattr(config.data, field, value)
    if field == "train_split":
        config.eval.split = "test"
    with pytest.raises(ConfigError, match=f"config.data.{field} was"):
        evaluate(config, bundled)


def test_evaluating_before_training(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        evaluate(tiny_config("clip"), tmp_path / "w")


def test_a_bundle_does_not_replace_a_trained_model(runs, capsys):
    command = ["bundle", "--clip", str(runs / "clip"), "--complexity", str(runs / "complexity")]
    with pytest.raises(SystemExit):
        cli.main([*command, "--out", str(runs / "clip" / "model")])
    assert "is a checkpoint of kind 'clip', not 'bundle'" in capsys.readouterr().err
    icar_jax.load(runs / "clip" / "model")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--share", "0.5", "0.4"], "pass 1 numbers"),
        (["--share", "0.5", "--thresholds", "0.5"], "exclude each other"),
        (["--thresholds", "0.5", "0.6"], "need 1 thresholds"),
    ],
)
def test_bundle_mistakes(runs, arguments, message, tmp_path, capsys):
    command = ["bundle", "--clip", str(runs / "clip"), "--complexity", str(runs / "complexity"), "--out"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.check
def test_a_clip_without_exits_cannot_be_bundled(runs, tmp_path):
    from icar_jax.evaluation.routing.calibration import make_bundle

    config = tiny_config("clip", steps=1)
    config.clip.exits = ()
    train(config, tmp_path / "w")
    with pytest.raises(ConfigError, match="no early exit"):
        make_bundle(tmp_path / "w", runs / "complexity", tmp_path / "out", thresholds=())


def test_describe_prints_the_bundle(bundled, capsys):
    cli.main(["describe", str(bundled)])
    assert json.loads(capsys.readouterr().out)["kind"] == "bundle"


@pytest.mark.check
@pytest.mark.alone
def test_the_demo_reaches_its_numbers(tmp_path):
    """`make demo` with nothing shortened."""
    demo = tmp_path / "demo"
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "examples/demo.py", str(demo)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    metrics = json.loads((demo / "metrics.json").read_text())
    model = icar_jax.load(demo)
    check_schema(metrics, model.exits, 500)
    full, routed = metrics["runs"]["full"], metrics["runs"]["routed"]
    # What README.md prints, less two points for other processors, which round otherwise.
    for run, floors in ((full, (85.3, 90.6)), (routed, (83.6, 88.8))):
        assert all(run[direction]["r5"] >= floor for direction, floor in zip(DIRECTIONS, floors, strict=True))
    assert full["text_to_image"]["r1"] >= 2 * metrics["colour_baseline"]["text_to_image"]["r1"]
    assert full["image_to_text"]["r1"] >= 2 * metrics["colour_baseline"]["image_to_text"]["r1"]
    assert routed["retention"]["value"] >= 95
    assert routed["flops_per_image"] <= 0.8 * full["flops_per_image"]
    assert min(routed["share"].values()) >= 0.2
    # It says at its start what it will do, and ends with the table, the figure and one search.
    said = done.stdout
    order = ["minutes on two CPU cores", "Retrieval in a gallery of 500 images", "rank cosine", "retention.png"]
    assert [said.index(part) for part in order] == sorted(said.index(part) for part in order)
    assert Image.open(demo / "retention.png").size[0] > 500
    words = ["search", "A small red circle on a yellow background.", "--json", "--store", str(demo / "store"), "-k", "5"]
    command = [sys.executable, "-m", "icar_jax.cli", *words]
    search = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert search.returncode == 0, search.stderr[-3000:]
    found = json.loads(search.stdout)
    assert sum("red" in hit["caption"] for hit in found["hits"]) >= 3, found["hits"]
    # The score is worth its name: held-out scenes are ranked by their known complexity.
    scenes = Scenes("test", 300)
    scores = model.score([r.image() for r in scenes])
    assert np.corrcoef(scores, [r.complexity for r in scenes])[0, 1] >= 0.9
