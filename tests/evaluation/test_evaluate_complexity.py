"""evaluate.py on complexity models: metrics, comparisons and errors."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import icar_jax
from icar_jax import checkpoint, cli, workdir
from icar_jax.config import ConfigError, DataConfig
from icar_jax.data import configured
from icar_jax.data.images import Preprocess
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation.complexity import agreement, baselines
from icar_jax.evaluation.complexity.agreement import Predictions
from icar_jax.evaluation.complexity.evaluate import NUISANCES, evaluate_complexity
from icar_jax.evaluation.metrics import ratings as m
from icar_jax.evaluation.records.complexity import Margin
from icar_jax.evaluation.records.plain import plain
from icar_jax.evaluation.report import complexity_table
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.flops import complexity_flops
from tests.support import drawn, ratedfiles
from tests.support.keys import require_known_keys
from tests.support.runs import tiny_config


def finished_run(folder, head):
    """A finished workdir of train.py, with a random model."""
    config = tiny_config("complexity")
    config.complexity.head = head
    config.eval.size = 60
    arch = ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8)), head, 32)
    params = drawn.params(ComplexityModel.graph(arch).shapes, 2)
    last = params["head"]["fc3" if head == "regression" else "fc"]
    last["kernel"] = last["kernel"] * 10
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    workdir.save_config(folder, config)
    workdir.save_data(folder, configured.fingerprint(configured.train_source(config.data)))
    checkpoint.write(folder / "model", "complexity", description, params)
    return config


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regression")
    config = finished_run(folder, "regression")
    return config, folder, evaluate_complexity(config, folder)


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification")
    config = finished_run(folder, "classification")
    with pytest.raises(checkpoint.CheckpointError, match="without a threshold.*icar calibrate .*--metric f1"):
        evaluate_complexity(config, folder)  # no default threshold
    cli.main(["calibrate", str(folder), "--metric", "youden", "--batch-size", "8"])
    return config, folder, evaluate_complexity(config, folder)


def known(config):
    return np.array([r.complexity for r in Scenes("val", config.eval.size)], np.float32)


def test_a_regression_is_reported_with_every_baseline(regression):
    config, folder, record = regression
    assert json.loads((folder / "metrics.json").read_text()) == plain(record)
    require_known_keys(plain(record), "complexity")
    assert list(record.runs) == ["model", *baselines.MEASURES, baselines.COMBINED]
    scores = icar_jax.load(folder, batch_size=8).score([r.image() for r in Scenes("val", config.eval.size)])
    for metric in m.OF_RATINGS:
        found = record.runs["model"][metric]
        assert found.value == pytest.approx(m.value(metric, scores, known(config)), abs=1e-5)
        assert found.low <= found.value <= found.high
    for name in ("scores.png", "nuisance.png"):
        assert Image.open(folder / name).size[0] > 500


def test_baselines_are_fitted_on_calibration_images(regression):
    config, _, record = regression
    calibration, held_out = Scenes("calibration", 40), Scenes("val", config.eval.size)
    pixels = lambda source: np.stack([baselines.PREPROCESS.resize(r.image()) for r in source])
    measures = [baselines.classical_measures(pixels(source)) for source in (calibration, held_out)]
    fits = baselines.fit_baselines(measures[0], np.array([r.complexity for r in calibration]))
    for name, fit in fits.items():
        assert record.runs[name]["rmse"].value == pytest.approx(m.rmse(fit(measures[1]), known(config)), abs=1e-5)
    best = max(fits, key=lambda name: m.pcc(fits[name](measures[1]), known(config)))
    assert record.margin.over == best and record.margin.metric == "pcc"
    apart = record.runs["model"]["pcc"].value - record.runs[best]["pcc"].value
    assert record.margin.value == pytest.approx(apart, abs=1e-6)


def test_cost_is_counted_and_timed(regression):
    _, folder, record = regression
    arch = icar_jax.load(folder).scorer.complexity.arch
    cost = record.cost["model"]
    assert cost.flops_per_image == cost.routing_flops == complexity_flops(arch)
    assert cost.share_of_vit_l14 == pytest.approx(complexity_flops(arch) / 162.03e9, rel=1e-3)  # from the table in the paper
    assert all(run.ms_per_image > 0 for run in record.cost.values())


def test_nuisances_are_split_into_thirds(regression):
    record = regression[2]
    assert set(record.nuisance) == set(NUISANCES)
    for name, levels in record.nuisance.items():
        assert [part.images for part in levels.values()] == [20, 20, 20]
        values = np.array([getattr(Scenes("val", 60).scene(i).nuisance, name) for i in range(60)])
        assert levels["low"].from_ == values.min() and levels["high"].to == values.max()
        assert levels["low"].to <= levels["mid"].from_ <= levels["mid"].to <= levels["high"].from_


def test_a_classifier_decides_by_its_stored_threshold(classification):
    config, folder, record = classification
    threshold = checkpoint.describe(folder / "model")["threshold"]
    scores = icar_jax.load(folder, batch_size=8).score([r.image() for r in Scenes("val", config.eval.size)])
    labels = known(config) > config.complexity.threshold
    require_known_keys(plain(record), "complexity")
    assert record.threshold == threshold
    decided = scores > threshold
    assert record.confusion == m.confusion(decided, labels)
    for metric in m.OF_DECISIONS:
        assert record.runs["model"][metric].value == pytest.approx(m.value(metric, decided, labels))
    for metric in m.OF_SCORES:
        assert record.runs["model"][metric].value == pytest.approx(m.value(metric, scores, labels), abs=1e-4)
    assert record.margin.metric == "roc_auc"


def test_the_best_model_of_the_run_is_evaluated(tmp_path):
    config = finished_run(tmp_path, "regression")
    shifted = checkpoint.read(tmp_path / "model", "complexity")
    shifted.params["head"]["fc3"]["bias"] = shifted.params["head"]["fc3"]["bias"] + 3
    checkpoint.write(tmp_path / "best", "complexity", shifted.description, shifted.params)
    record = evaluate_complexity(config, tmp_path)
    scores = icar_jax.load(tmp_path / "best", batch_size=8).score([r.image() for r in Scenes("val", config.eval.size)])
    assert record.runs["model"]["rmse"].value == pytest.approx(m.rmse(scores, known(config)), abs=1e-5)
    assert f"model: {tmp_path / 'best'}" in record.notes


@pytest.mark.parametrize("part, field, value", [("complexity", "threshold", 0.7), ("data", "calibration_size", 9)])
def test_evaluation_needs_the_configuration_of_the_run(regression, part, field, value):
    config = tiny_config("complexity")
    config.complexity.head = "regression"
    setattr(getattr(config, part), field, value)
    with pytest.raises(ConfigError, match=f"config.{part}.{field} was"):
        evaluate_complexity(config, regression[1])


def rated_run(folder, root):
    """A finished run on the rated images of `root`, with their label file next to them."""
    config = finished_run(folder, "regression")
    config.data = DataConfig(source="ratings", root=str(root), ratings=str(root / "labels.json"))
    config.eval.split = "test"
    workdir.save_config(folder, config)
    workdir.save_data(folder, configured.fingerprint(configured.train_source(config.data)))
    return config


def test_the_images_may_move_but_must_be_those_of_the_run(tmp_path):
    then = ratedfiles.annotations(tmp_path / "then", 80)
    for picture, scene in zip(sorted(then.glob("*.jpg")), Scenes("test", 80)):
        scene.image().save(picture)  # images of one colour have equal scores
    config = rated_run(tmp_path / "w", then)
    moved = then.rename(tmp_path / "now")
    labels = (moved / "labels.json").rename(tmp_path / "elsewhere.json")
    config.data.root, config.data.ratings = str(moved), str(labels)
    record = evaluate_complexity(config, tmp_path / "w")
    assert record.images == len(configured.eval_source(config.data, config.eval))
    # Names determine the splits, so after renaming some training images are in `test`.
    renamed = {f"new {name}": label for name, label in json.loads(labels.read_text()).items()}
    for name in renamed:
        (moved / name.removeprefix("new ")).rename(moved / name)
    labels.write_text(json.dumps(renamed))
    with pytest.raises(ConfigError, match="training images changed since .*, or pass --workdir=.*model to evaluate"):
        evaluate_complexity(config, tmp_path / "w")
    assert evaluate_complexity(config, tmp_path / "w" / "model").images > 0


def test_a_clip_is_refused_as_a_complexity_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / checkpoint.DESCRIPTION).write_text(json.dumps({"format": checkpoint.FORMAT, "kind": "clip"}))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of kind complexity.*clip"):
        evaluate_complexity(tiny_config("complexity"), tmp_path)


def printed(record):
    console = Console(width=124, record=True, file=open("/dev/null", "w"))
    complexity_table.print_results(record, console)
    return console.export_text()


def test_what_is_printed(regression, classification):
    text = printed(regression[2])
    assert "PCC" in text and "gradient" in text and "contrast high" in text and "% of the counted FLOPs" in text
    text = printed(classification[2])
    assert "Youden's J" in text and "decisions: score >" in text


@pytest.mark.parametrize(
    "low, high, words", [(0.1, 0.3, "the model beats them"), (-0.1, 0.1, "not shown"), (-0.3, -0.1, "numpy do better")]
)
def test_verdicts(regression, low, high, words):
    margin = Margin("pcc", "jpeg_bytes", (low + high) / 2, low, high, low <= 0 <= high)
    assert words in complexity_table.verdicts(dataclasses.replace(regression[2], margin=margin))[0]


def test_levels_of_a_nuisance_and_undefined_values():
    truth = np.linspace(0, 1, 30)
    same = Predictions(truth.copy())
    only_low = Predictions(np.where(np.arange(30) < 10, truth, 0.5))
    found = agreement.by_level({"same": same, "low": only_low}, truth, {"noise": np.arange(30.0)}, 50)["noise"]
    assert [found[level].pcc["same"].value for level in agreement.LEVELS] == pytest.approx([1, 1, 1])
    assert found["low"].pcc["low"].value == pytest.approx(1)
    assert found["mid"].pcc["low"] is None and found["high"].pcc["low"] is None


def test_a_row_without_an_interval_keeps_its_value():
    labels = np.array([1] + [0] * 9)
    row = agreement.rows({"a": Predictions(np.linspace(1, 0, 10), 0.5)}, labels, ("roc_auc",), 100)["a"]["roc_auc"]
    assert row == m.Estimate(1.0)


def test_a_margin_without_an_interval_keeps_its_value(regression):
    labels = np.array([1] + [0] * 9)
    model, other = Predictions(np.linspace(1, 0, 10), 0.5), Predictions(np.linspace(0, 1, 10), 0.5)
    margin = agreement.margin("roc_auc", model, {"jpeg_bytes": other}, labels, 100)
    assert margin == Margin("roc_auc", "jpeg_bytes", 1.0, None, None, None)
    assert "too few images" in complexity_table.verdicts(dataclasses.replace(regression[2], margin=margin))[0]
