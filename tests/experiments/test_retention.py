"""The retention study: recipes, rows of a run, statistics of the report, and an end-to-end run."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.retention import (
    recipes,
    report,
    study,
    why_exits,
)
from experiments.retention import rows as retention_rows
from icar_jax.architectures import clip_arch
from icar_jax.config import ConfigError
from icar_jax.evaluation.metrics.retrieval import Distractors, ranks, recall
from icar_jax.evaluation.routing.calibration import model_costs
from icar_jax.inference.loading import load
from icar_jax.models.flops import vision_flops
from icar_jax.models.vision import VisionArch
from tests.support.places import ROOT
from tests.support.runs import random_clip, tiny_config

BUDGETS = (0.7, 0.8)


# --- recipes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting,dataset", list(itertools.product(recipes.SETTINGS, recipes.DATASETS)))
def test_every_recipe_is_a_configuration_with_the_same_pairs(setting, dataset, tmp_path):
    sizes = recipes.SETTINGS[setting][dataset]
    found = {n: recipes.clip_config(n, dataset, sizes, 1, str(tmp_path), tmp_path) for n in recipes.RECIPES}
    pretrained = recipes.clip_config("pretrained", dataset, sizes, 0, str(tmp_path), tmp_path)
    assert pretrained.train.init == (str(tmp_path / "scenes/pretrained/0") if dataset == "shaded" else "")
    assert len({(c.train.batch_size, c.train.seed, c.data.calibration_size) for c in found.values()}) == 1
    once = sizes.pretrain_steps + sizes.steps
    begun = {"": 0, "baseline": once} | dict.fromkeys(recipes.PRETRAINED, sizes.pretrain_steps)
    total = {n: begun[recipes.RECIPES[n].init] + c.train.steps for n, c in found.items()}
    assert total == dict.fromkeys(found, once) | dict.fromkeys(("frozen", "frozen_attention"), once + sizes.steps)
    if setting != "tiny":
        cost = {n: vision_flops(clip_arch(c.clip).vision) for n, c in found.items()}
        assert cost["merged"] == cost["merged_first"] == cost["held"] == cost["combined"] < cost["held_gently"]
        assert cost["held_gently"] == cost["combined_gently"] <= recipes.BUDGET * cost["baseline"]
    without = {"baseline", "static", "merged", "merged_first", "held", "held_full", "held_gently"}
    assert {n for n, c in found.items() if not c.clip.exits} == without
    for name, config in found.items():
        clip_arch(config.clip)  # validates exits and image size
        start = {"summed": "", "static": "pretrained_static/0", "merged_first": "pretrained_merged/0"}
        wanted = (start | dict.fromkeys(("frozen", "frozen_attention"), "baseline/1")).get(name, "pretrained/0")
        assert config.train.init == (str(tmp_path / dataset / wanted) if wanted else ""), name
    assert found["exits"].clip.exits == sizes.exits and found["shared"].clip.exits == (sizes.exit,)
    assert found["combined"].clip.exits == (sizes.late,) and found["combined"].loss.exit_weights == (0.05, 1.0)
    assert found["growing"].loss.exit_weights[-1] == 1 and found["growing"].loss.exit_weights[0] < 1


def test_every_recipe_with_exits_has_budgets_below_its_own_cost(tmp_path):
    sizes = recipes.SETTINGS["small"]["scenes"]
    for name, recipe in recipes.RECIPES.items():
        budgets = recipes.budgets_of(name, sizes)
        assert bool(budgets) == recipe.exits, name
        own = [vision_flops(clip_arch(recipes.clip_config(n, "scenes", sizes, 1, "", tmp_path).clip).vision)
               for n in (name, "baseline")]  # fmt: skip
        assert sum(budget < own[0] / own[1] for budget in budgets) >= 2 or not budgets, name


def test_the_ablation_changes_one_option_of_shared(tmp_path):
    sizes = recipes.SETTINGS["small"]["scenes"]
    flat = lambda name: {
        f"{group}.{key}": value
        for group, values in dataclasses.asdict(recipes.clip_config(name, "scenes", sizes, 0, "", tmp_path)).items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    shared = flat("shared")
    for name in ("heads", "adapter", "attention", "cosine", "kl", "mixed", "growing", "light", "dropout", "exits"):
        assert sum(value != shared[key] for key, value in flat(name).items()) == 1, name


@pytest.mark.parametrize("setting", ["small", "large"])
def test_the_shallower_baseline_is_the_deepest_within_the_budget(setting, tmp_path):
    sizes = recipes.SETTINGS[setting]["scenes"]
    full, small = (
        clip_arch(recipes.clip_config(n, "scenes", sizes, 0, "", tmp_path).clip).vision for n in ("baseline", "static")
    )
    assert small.width == full.width
    cost = lambda depth: vision_flops(dataclasses.replace(full, depth=depth)) / vision_flops(full)
    assert cost(small.depth) <= recipes.BUDGET < cost(small.depth + 1)


def test_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match="exit_hed"):
        recipes.with_changes(tiny_config(), {"clip.exit_hed": "adapter"})


def test_reference_runs_come_first(tmp_path):
    _, plan = study.parse(["--out", str(tmp_path), "--setting", "tiny", "--seeds", "1", "2", "--recipes", "shared"])
    todo = study.make_jobs(plan)
    order = [job.of[1] if job.of else job.run.name for job in todo]
    begin = ["ConvNeXt-IC", "scenes/pretrained", "scenes/pretrained_static"]
    assert order == [*begin, "baseline", "static", "baseline", "static", "shared", "shared"]
    assert [len(job.heads) for job in todo] == [0] * 7 + [3, 3]


def test_shaded_scenes_fine_tune_the_towers_of_scenes(tmp_path):
    arguments = ["--out", str(tmp_path), "--setting", "tiny", "--seeds", "1", "--recipes", "shared", "summed"]
    _, plan = study.parse([*arguments, "--dataset", "shaded", "--photos", str(tmp_path)])
    names = [job.run.name for job in study.make_jobs(plan)]
    begin = [f"{dataset}/{name}" for dataset in ("scenes", "shaded") for name in ("pretrained", "pretrained_static")]
    assert names == ["ConvNeXt-IC", *begin, *(f"shaded/{name}/seed 1" for name in ("baseline", "static", "shared"))]
    (sentence,) = study.skipped_recipes(plan)
    assert "shaded/summed is skipped: it starts from scratch" in sentence


@pytest.mark.parametrize("setting", recipes.SETTINGS)
def test_heads_on_a_tower_are_configurations(setting, tmp_path):
    for dataset, router in itertools.product(recipes.DATASETS, ("regret", "gallery", "blocks")):
        sizes = recipes.SETTINGS[setting][dataset]
        config = recipes.head_config(router, dataset, sizes, 0, str(tmp_path), tmp_path / "clip", sizes.exit, tmp_path)
        assert config.complexity.blocks <= sizes.exit and config.complexity.clip
        assert (config.data.source == "folder") == (dataset != "scenes" and router != "blocks")
        assert (config.complexity.target == "regret") == (router != "blocks")
        assert (config.complexity.blocks == sizes.exit) >= (router == "gallery")


def test_datasets_by_name_or_several_at_once(tmp_path):
    asked = lambda *names: study.parse(["--out", str(tmp_path), "--photos", str(tmp_path), "--dataset", *names])[1].datasets
    assert asked("photos") == ("photos",) and asked("both") == ("scenes", "photos")
    assert asked("both", "shaded") == asked("all") == recipes.DATASETS and asked("scenes", "both") == asked("both")


def test_unknown_recipes_and_missing_photos_are_refused(tmp_path, capsys):
    for more in (["--recipes", "sharred"], ["--dataset", "photos"]):
        with pytest.raises(SystemExit):
            study.parse(["--out", str(tmp_path), *more])
    assert "sharred" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.parse(["--out", str(tmp_path), "--seeds", "0", "1"])
    assert "pretraining" in capsys.readouterr().err


def test_an_empty_report_is_refused_and_needs_no_photographs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["retention.py", "--out", str(tmp_path), "--dataset", "shaded", "--report-only"])
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)
    monkeypatch.setattr(study.os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 2 and f"{tmp_path} holds no evaluated baseline of shaded" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- rows and report ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A random CLIP with exits after 1, 2 and 3 blocks; a small router is cheap in comparison."""
    return random_clip(tmp_path_factory.mktemp("tower") / "model", VisionArch(64, 8, 48, 3, 4, 192, 24, exits=(1, 2)))


@pytest.fixture(scope="module")
def out(tmp_path_factory, tower, complexity_folder):
    """An output folder of study.py: one random tower as the runs of three recipes, routed by a random model."""
    out = tmp_path_factory.mktemp("retention")
    first = out / "scenes" / "baseline" / "0"
    config = tiny_config()
    asked_for = retention_rows.make_request(
        config, first, {"complexity": complexity_folder}, calibration=40, distractors=16, budgets=(0.05, *BUDGETS), draws=4
    )
    first.mkdir(parents=True)
    (first / "model").symlink_to(tower)
    assert not retention_rows.is_evaluated(asked_for)
    retention_rows.evaluate_run(asked_for)
    assert retention_rows.is_evaluated(asked_for)
    assert not retention_rows.is_evaluated(asked_for | {"draws": 5})
    for recipe, seed in (("baseline", 1), ("shared", 0), ("shared", 1), ("static", 0)):
        (out / "scenes" / recipe).mkdir(exist_ok=True)
        (out / "scenes" / recipe / str(seed)).symlink_to(first)
    return out


def test_retrained_models_are_evaluated_again(out, monkeypatch):
    asked_for = json.loads((out / "scenes" / "baseline" / "0" / retention_rows.ROWS).read_text())["asked"]
    assert retention_rows.is_evaluated(asked_for)
    describe = retention_rows.checkpoint.describe
    changed = lambda folder: describe(folder) | {"hashes": {"params.safetensors": "0" * 64}}
    monkeypatch.setattr(retention_rows.checkpoint, "describe", changed)
    assert not retention_rows.is_evaluated(asked_for)


def test_rows_are_those_of_the_galleries(out, tower):
    record, hits, arrays = retention_rows.read_rows(out / "scenes" / "baseline" / "0")
    rows = record["rows"]
    images = retention_rows.select_images(tiny_config(), 40, 16)
    model = load(tower, batch_size=8)
    embedded = [
        (model.encode_image([source[i].image() for i in range(len(source))], exit=2),
         model.encode_text([c for i in range(len(source)) for c in source[i].captions]),
         np.repeat(np.arange(len(source)), [len(source[i].captions) for i in range(len(source))]))
        for source in (images.queries, images.far)
    ]  # fmt: skip
    found = ranks(*embedded[0], distractors=Distractors(*embedded[1]))
    for k in (1, 5, 10):
        for direction, value in recall(found, k).items():
            assert rows["exit_2"]["recall"][f"{direction}_r{k}"] == pytest.approx(value, abs=100 / 30)  # near-ties
    match, other = retention_rows.mean_cosines(*embedded[0])
    scores = embedded[0][0] @ embedded[0][1].T
    own = embedded[0][2] == np.arange(30)[:, None]
    np.testing.assert_allclose(match, [s[o].mean() for s, o in zip(scores, own)], atol=1e-5)
    np.testing.assert_allclose(other, [s[~o].mean() for s, o in zip(scores, own)], atol=1e-5)
    np.testing.assert_allclose(arrays["match_2"], match, atol=1e-4)
    assert record["gallery"]["images"] == 46 and record["gallery"]["queries"] == 30
    assert len(hits) == len(rows)


def test_routed_rows_have_random_routing_and_an_oracle_at_the_same_shares(out, complexity_folder):
    record, hits, _ = retention_rows.read_rows(out / "scenes" / "baseline" / "0")
    rows = record["rows"]
    assert any("the first exit and the router alone cost" in note for note in record["notes"]) and "complexity@0.05" not in rows
    model, router = load(out / "scenes" / "baseline" / "0" / "model"), load(complexity_folder)
    cost = model_costs(model.arch, router.scorer.complexity.arch)
    for budget in BUDGETS:
        name = f"complexity@{budget:.2f}"
        routed, random, oracle = rows[name], rows[f"{name} random"], rows[f"{name} oracle"]
        assert routed["share"] == random["share"] == pytest.approx(oracle["share"])
        assert routed["counted"] - random["counted"] == pytest.approx(cost.router / cost.full)
        share = {int(e): part for e, part in routed["share"].items()}
        assert routed["counted"] == pytest.approx(cost.share_of_full(share))
        assert routed["measured"] > 0 and oracle["measured"] is None
    assert rows["full"]["counted"] == 1 and rows["exit_1"]["counted"] < rows["exit_2"]["counted"] < 1
    assert all(rows[f"complexity@{budget:.2f} random"]["measured"] > 0 for budget in BUDGETS)


def test_the_report_compares_seed_by_seed(out, tmp_path):
    about = {"setting": "tiny", "seeds": [0, 1], "datasets": ["scenes", "photos"], "recipes": ["baseline", "static", "shared"]}
    report.write_report(tmp_path / "unused", about | {"datasets": []}, [], [], 10)
    record = report.write_report(out, about, about["recipes"], (0, 1), 50)
    rows = {(row["recipe"], row["row"]): row for row in record["datasets"]["scenes"]["rows"]}
    same = rows["shared", "full"]
    assert same["retention"] == {"value": 100, "low": 100, "high": 100} and same["seeds"] == [0, 1]
    assert rows["static", "full"]["seeds"] == [0]
    assert rows["baseline", "exit_1"]["minus_shared"] == {"value": 0, "low": 0, "high": 0} and same["minus_shared"] is None
    early = rows["shared", "exit_1"]
    assert early["retention"]["value"] == pytest.approx(100 * early["mean_recall"]["value"] / same["mean_recall"]["value"])
    routed = rows["shared", "complexity@0.70"]
    random = rows["shared", "complexity@0.70 random"]
    expected = routed["mean_recall"]["value"] - random["mean_recall"]["value"]
    assert routed["minus_random"]["value"] == pytest.approx(expected)
    cheap = sorted((row for row in rows.values() if row["recipe"] == "shared" and row["kind"] in ("exit", "random", "full")),
                   key=lambda row: row["counted"])  # fmt: skip
    at = np.interp(routed["counted"], [r["counted"] for r in cheap], [r["mean_recall"]["value"] for r in cheap])
    assert routed["minus_random_flops"]["value"] == pytest.approx(routed["mean_recall"]["value"] - at)
    assert len(routed["measured_by_seed"]) == 2 and np.median(routed["measured_by_seed"]) == routed["measured"]
    assert "fewer than 3 seeds" in routed["lacks"]
    assert "does not significantly pay" in report.depth_sentence("scenes", record["datasets"]["scenes"])
    text = (out / "retention.md").read_text()
    # One budget is listed: the most expensive within the target time, or the cheapest; measured times vary with load.
    listed = [budget for budget in BUDGETS if f"| shared | complexity@{budget:.2f} |" in text]
    assert len(listed) == 1
    cost = {budget: rows["shared", f"complexity@{budget:.2f}"]["measured"] for budget in BUDGETS}
    within = [budget for budget in BUDGETS if cost[budget] <= report.BUDGET]
    assert listed == [max(within) if within else min(BUDGETS, key=cost.get)]
    assert json.loads((out / "retention.json").read_text())["datasets"].keys() == {"scenes"}
    assert (out / "retention.png").read_bytes()[:4] == b"\x89PNG"


def test_why_exits_of_the_same_runs(out):
    about = {"setting": "tiny", "seeds": [0, 1], "datasets": ["scenes"], "recipes": ["baseline", "shared"]}
    report.write_report(out, about, about["recipes"], (0, 1), 50)
    why_exits.main(["--out", str(out)])
    (first, second) = json.loads((out / "why_exits.json").read_text())["datasets"]["scenes"]
    assert first["flips"] == second["flips"]
    for by_direction in first["flips"].values():
        for shares in by_direction.values():
            assert sum(each["value"] for each in shares.values()) == pytest.approx(100)
    assert first["cosines"]["3"]["match_offset"] == {"value": 0, "low": 0, "high": 0}
    _, _, arrays = retention_rows.read_rows(out / "scenes" / "baseline" / "0")
    lost = why_exits.recall_regret(arrays, 1, 3)
    assert first["images_that_lose"]["value"] == pytest.approx(100 * np.mean(lost > 0))
    assert set(first["routers"]) == {"complexity"} and "captured" in first["routers"]["complexity"]
    assert first["routers"]["complexity"]["budget"] in BUDGETS
    assert (out / "why_exits.png").read_bytes()[:4] == b"\x89PNG" and "scenes" in (out / "why_exits.md").read_text()


def test_why_exits_names_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        why_exits.main(["--out", str(tmp_path)])
    assert "experiments.retention.study" in capsys.readouterr().err


@pytest.mark.check
def test_end_to_end_and_resumed(tmp_path):
    command = [sys.executable, "-m", "experiments.retention.study", "--setting", "tiny", "--seeds", "1"]
    command += ["--recipes", "combined", "--routers", "regret", "--jobs", "2", "--out", tmp_path]
    quick = "--xla_backend_optimization_level=0"  # compilation takes longer than these steps
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "run 1 of 6: scenes/pretrained (" in first.stdout and "Finished" in (tmp_path / "scenes/static/1.log").read_text()
    assert "== run 6 of 6: scenes/combined/seed 1, router regret (" in first.stdout and "left\n" in first.stdout
    record = json.loads((tmp_path / "retention.json").read_text())
    rows = {(r["recipe"], r["row"]) for r in record["datasets"]["scenes"]["rows"]}
    assert {("baseline", "full"), ("static", "full"), ("combined", "full"), ("combined", "exit_2")} <= rows
    assert {("combined", "regret@0.90"), ("combined", "regret@0.90 random")} <= rows
    weights = tmp_path / "scenes/combined/1/model/params.safetensors"
    before = weights.stat().st_mtime_ns
    (tmp_path / "scenes/static/1/rows.json").unlink()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "== run" not in again.stdout and again.stdout.count("-- evaluate") == 1
    assert weights.stat().st_mtime_ns == before
