"""Budget search by recall drop and by measured cost; counted FLOPs compared with the compiler's."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import checkpoint, cli
from icar_jax.config import ConfigError
from icar_jax.data.images import Preprocess
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation.metrics.retrieval import ranks, recall
from icar_jax.evaluation.report.calibration_table import print_calibration, sentences
from icar_jax.evaluation.report.report_figures import write_budget_search
from icar_jax.evaluation.routing import timing
from icar_jax.evaluation.routing.calibration import bundle_costs, calibrate, make_bundle
from icar_jax.inference.router import assign
from icar_jax.models.clip import Clip
from icar_jax.models.flops import vision_flops
from icar_jax.models.variants import CLIP


@pytest.fixture
def bundle(clip_folder, complexity_folder, tmp_path):
    return make_bundle(clip_folder, complexity_folder, tmp_path / "bundle", thresholds=(0.3, 0.6))


def mean_r5(model, records, exits=None):
    """Uses the public API: routed, or all images at one exit."""
    images = [record.image() for record in records]
    owner = np.repeat(np.arange(len(records)), [len(r.captions) for r in records])
    texts = model.encode_text([caption for r in records for caption in r.captions])
    rows = model.encode_image(images) if exits is None else model.encode_image(images, exit=exits)
    return sum(recall(ranks(rows, texts, owner), 5).values()) / 2


def test_a_recall_drop(bundle, tmp_path):
    source = Scenes("calibration", 40)
    before = checkpoint.read(bundle / "clip", "clip").description["hashes"]
    description = calibrate(
        bundle, source, max_recall_drop=6.0, batch_size=8, draw=lambda tried: write_budget_search(tried, tmp_path / "f.png")
    )
    found = description["routing"]["found"]
    assert (found["method"], found["cost_by"], found["search"]) == ("max_recall_drop", "measured", "exhaustive")
    assert found["images"] == 40 and found["captions"] == sum(len(r.captions) for r in source)
    assert found["drop"]["value"] <= 6.0 + 1e-9 and found["drop"]["low"] <= found["drop"]["value"] <= found["drop"]["high"]
    assert found["full_recall"] - found["recall"] == pytest.approx(found["drop"]["value"])
    assert set(found["measured"]["exit_ms"]) == {"1", "2", "3"} and found["measured"]["cost"] > 0
    assert checkpoint.describe(bundle) == description and description["routing"]["exits"] == [1, 2, 3]
    assert checkpoint.read(bundle / "clip", "clip").description["hashes"] == before
    # The public API reproduces the recorded values.
    model = icar_jax.load(bundle, batch_size=8)
    records = list(source)
    assert mean_r5(model, records) == pytest.approx(found["recall"], abs=1.3)
    assert mean_r5(model, records, 3) == pytest.approx(found["full_recall"], abs=1.3)
    taken = assign(model.score([r.image() for r in records]), model.exits, model.thresholds)
    assert {str(e): pytest.approx(np.mean(taken == e)) for e in model.exits} == found["reached"]
    assert np.asarray(Image.open(tmp_path / "f.png").convert("L")).std() > 5


def test_a_bound_that_allows_everything_takes_the_first_exit(bundle, tmp_path, capsys):
    (tmp_path / "config.py").write_text(
        "from icar_jax.config import DataConfig, ExperimentConfig\n"
        "def get_config():\n"
        "    return ExperimentConfig(data=DataConfig(source='scenes', scenes_size=60, calibration_size=24))\n"
    )
    flags = ["--max-recall-drop", "100", "--cost", "counted", "--batch-size", "8", "--config", str(tmp_path / "config.py")]
    cli.main(["calibrate", str(bundle), *flags])
    found = checkpoint.describe(bundle)["routing"]["found"]
    assert found["reached"] == {"1": 1.0, "2": 0.0, "3": 0.0} and found["cost_by"] == "counted"
    assert found["exit_alone"]["exit"] == 1, "without a router that costs less"
    assert (bundle.parent / "bundle_frontier.png").is_file()
    capsys.readouterr()
    print_calibration(checkpoint.describe(bundle), bundle_costs(bundle))
    rows = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [(exit.strip(), scores.strip()) for exit, scores in rows[-3:]] == [("1", "all"), ("2", "none"), ("3", "none")]
    lines = " ".join(sentences(found, bundle_costs(bundle)))
    assert "exits not used: 2, 3" in lines and "so it is optimistic" in lines and "routing gains nothing here" in lines


def test_the_best_recall_within_a_budget(bundle, tmp_path, capsys):
    costs = bundle_costs(bundle)
    budget = (costs.lowest_budget + 1) / 2
    description = calibrate(bundle, Scenes("calibration", 40), budget=budget, best_recall=True, cost="counted", batch_size=8,
                            draw=lambda tried: write_budget_search(tried, tmp_path / "f.png"))  # fmt: skip
    found = description["routing"]["found"]
    assert (found["method"], found["chosen_by"], found["cost_by"]) == ("budget", "recall", "counted")
    assert found["cost"] <= budget + 1e-9 and found["budget"] == budget
    assert np.asarray(Image.open(tmp_path / "f.png").convert("L")).std() > 5
    model = icar_jax.load(bundle, batch_size=8)
    assert mean_r5(model, list(Scenes("calibration", 40))) == pytest.approx(found["recall"], abs=1.3)
    lines = " ".join(sentences(found, costs))
    assert "highest mean R@5 of" in lines and f"within {100 * budget:.1f}% of full depth's counted cost" in lines
    calibrate(bundle, Scenes("calibration", 40), budget=budget, batch_size=8)
    even = mean_r5(icar_jax.load(bundle, batch_size=8), list(Scenes("calibration", 40)))
    assert even <= found["recall"] + 1.3, "on a grid, so an even spread between its points may be a caption better"
    with pytest.raises(ConfigError, match="cannot be met.*at least"):
        calibrate(bundle, Scenes("calibration", 40), budget=0.01, best_recall=True, cost="counted", batch_size=8)
    for flags, message in (
        (["--share", "0.5", "0.2", "--best-recall"], "needs a --budget"),
        (["--budget", "0.9", "--best-recall", "--images", "."], "--best-recall needs captions"),
        (["--budget", "0.9", "--plot", "x.png"], "--plot needs --max-recall-drop or --best-recall"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["calibrate", str(bundle), *flags])
        assert message in capsys.readouterr().err


def test_a_measured_budget(bundle, monkeypatch):
    costs = timing.Costs({1: 1.0, 2: 2.0, 3: 4.0}, 0.2)
    monkeypatch.setattr(timing, "measured_costs", lambda *_: costs)
    description = calibrate(bundle, Scenes("calibration", 40), budget=0.6, cost="measured", batch_size=8)
    found = description["routing"]["found"]
    reached = {int(e): share for e, share in found["reached"].items()}
    assert found["measured"]["cost"] == pytest.approx(costs.share_of_full(reached)) and found["measured"]["cost"] <= 0.6
    assert found["measured"]["exit_ms"]["3"] == 4000.0 and found["measured"]["images"] == 40
    with pytest.raises(ConfigError, match="budget 0.2 cannot be met"):
        calibrate(bundle, Scenes("calibration", 8), budget=0.2, cost="measured", batch_size=8)


def test_measured_costs_are_positive(bundle):
    model = icar_jax.load(bundle, batch_size=8)
    pixels = np.zeros((16, 32, 32, 3), np.uint8)
    costs = timing.measured_costs(model, timing.Sample(pixels, pixels))
    assert set(costs.exits) == {1, 2, 3} and min(costs.exits.values()) > 0 and costs.router >= 0


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", *map(str, words)])
    assert stop.value.code != 0
    return capsys.readouterr().err


def test_mistakes(bundle, complexity_folder, tmp_path, capsys):
    source = Scenes("calibration", 8)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    before = (bundle / checkpoint.DESCRIPTION).read_bytes()
    for wrong, message in (
        ({"max_recall_drop": 1.0, "budget": 0.9}, "exactly one of"), ({"max_recall_drop": -1.0}, "must lie in"),
        ({"max_recall_drop": 1.0, "cost": "guessed"}, "use one of counted, measured"),
        ({"shares": (0.5, 0.2), "cost": "measured"}, "applies only to a budget or a recall drop"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            calibrate(bundle, source, **wrong)
    with pytest.raises(ConfigError, match="complexity model without a CLIP"):
        calibrate(complexity_folder, source, max_recall_drop=1.0)
    images = ["--images", tmp_path / "a.png"]
    assert "needs captions" in fails(capsys, bundle, "--max-recall-drop", 1, *images)
    assert "--plot needs" in fails(capsys, bundle, "--budget", 0.9, "--plot", "x.png", *images)
    assert (bundle / checkpoint.DESCRIPTION).read_bytes() == before


def test_images_without_captions(bundle, tmp_path):
    from icar_jax.data.sources.files import ImageFiles

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="1 of 1 images .* have no caption"):
        calibrate(bundle, ImageFiles([str(tmp_path / "a.png")]), max_recall_drop=1.0, batch_size=8)


def test_counted_flops_are_those_of_the_compiler(bundle):
    """XLA counts norms, activations and softmax too: a few percent more in such a narrow tower, never less."""
    model = icar_jax.load(bundle)
    for exit in model.exits:
        counted = vision_flops(model.arch.vision, exit)
        for optimised in (False, True):
            compiler = timing.compiler_flops(model, exit, optimised=optimised)
            assert counted <= compiler <= 1.25 * counted, (exit, optimised, counted, compiler)


@pytest.mark.parametrize("variant", ["vit_b32", "vit_b16"])
def test_real_towers_agree_within_two_percent(variant):
    model = SimpleNamespace(preprocess=Preprocess(224, "squash"), graph=None)
    for exit in (3, 12):
        vision = dataclasses.replace(CLIP[variant].vision, exits=(3,))
        model.graph = Clip.graph(dataclasses.replace(CLIP[variant], vision=vision))
        counted = vision_flops(vision, exit)
        assert counted <= timing.compiler_flops(model, exit) <= 1.02 * counted
