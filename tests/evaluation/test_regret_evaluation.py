"""Regret on held-out pairs: compared with the plain definition, during training, and in evaluate.py."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import icar_jax
from icar_jax import checkpoint
from icar_jax.config import ConfigError
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation import during_training
from icar_jax.evaluation.complexity import regret
from icar_jax.evaluation.complexity.evaluate import evaluate_complexity
from icar_jax.evaluation.records.plain import plain
from icar_jax.evaluation.report import complexity_table
from icar_jax.models.exit_regret import loss_regret
from icar_jax.training.loop import train
from tests.support.keys import require_known_keys
from tests.support.regret import plain_regret, unit
from tests.support.runs import metric_lines, regret_config


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.sampled_from([1.0, 20.0]), st.integers(0, 2**32 - 1))
def test_with_one_caption_per_image_it_equals_the_training_regret(n, scale, seed):
    rng = np.random.default_rng(seed)
    exit, full, text = (unit(rng, n, 5) for _ in range(3))
    for kind, weighed in (("loss", False), ("kl", True)):
        found = regret.regrets(exit, full, text, np.arange(n), scale, kind)
        np.testing.assert_allclose(found, plain_regret(exit, full, text, scale, weighed), atol=1e-4 * scale)
        np.testing.assert_allclose(found, loss_regret(exit, full, text, scale, weighed=weighed), atol=1e-4 * scale)


@pytest.mark.parametrize("seed", range(4))
def test_several_captions_are_averaged_and_are_not_negatives_of_each_other(seed, monkeypatch):
    monkeypatch.setattr(regret, "_ROWS", 3)  # several chunks
    rng = np.random.default_rng(seed)
    n, scale = 6, 9.0
    owner = np.concatenate([rng.permutation(n), rng.integers(0, n, 5)])
    exit, full, texts = unit(rng, n, 4), unit(rng, n, 4), unit(rng, len(owner), 4)
    found = regret.regrets(exit, full, texts, owner, scale)
    for i in range(n):
        each = []
        for c in np.flatnonzero(owner == i):
            terms = []
            for z in (exit[i], full[i]):
                rivals = np.exp(scale * texts[owner != i] @ z).sum()
                images = np.exp(scale * np.delete(full, i, axis=0) @ texts[c]).sum()
                own = np.exp(scale * texts[c] @ z)
                terms.append(-np.log(own / (own + rivals)) / 2 - np.log(own / (own + images)) / 2)
            each.append(terms[0] - terms[1])
        assert found[i] == pytest.approx(np.mean(each), abs=1e-4)
    np.testing.assert_allclose(regret.regrets(exit, full, texts, owner, scale, "cosine"), 1 - (exit * full).sum(1), atol=1e-6)
    assert regret.regrets(full, full, texts, owner, scale) == pytest.approx(0, abs=1e-6)
    lone = regret.regrets(exit[:1], full[:1], texts[:1], np.zeros(1, int), scale)
    assert lone == pytest.approx(0), "without rivals nothing can be lost"


def test_records_carry_the_ranks_of_readable_images():
    source = Scenes("val", 4, image_size=32)
    judged = regret.Regrets(source, np.array([0, 2, 3]), np.array([5.0, -1.0, 2.0])).as_source()
    assert [judged[i].complexity for i in (0, 2, 3)] == [1.0, 0.0, 0.5] and np.isnan(judged[1].complexity)
    assert judged[0].captions == source[0].captions and len(judged) == 4


@pytest.fixture(scope="module")
def run(clip_folder, tmp_path_factory):
    """(config, workdir) of a run with evaluation during training."""
    folder = tmp_path_factory.mktemp("regret") / "run"
    config = regret_config(clip_folder, steps=2, eval_every=1)
    config.complexity.exit, config.eval.size = 2, 21  # the last batch is not full
    train(config, folder, evaluators=(during_training.evaluator(config),))
    return config, folder


def test_a_run_is_evaluated_by_the_regrets_of_the_held_out_images(run, clip_folder):
    config, folder = run
    clip = icar_jax.load(clip_folder, batch_size=8)
    source = Scenes("val", 21, image_size=32)
    found = regret.measure_regrets(config, clip, {"kind": "loss", "exit": 2}, source)
    pictures = [source[i].image() for i in range(21)]
    texts = clip.encode_text([c for i in range(21) for c in source[i].captions])
    owner = np.repeat(np.arange(21), [len(source[i].captions) for i in range(21)])
    early, full = (clip.encode_image(pictures, exit=e) for e in (2, 3))
    expected = regret.regrets(early, full, texts, owner, min(clip.temperature, 100.0))
    np.testing.assert_allclose(found.values, expected, atol=1e-3)
    scores = icar_jax.load(folder / "model", batch_size=8).score(pictures)
    line = [line for line in metric_lines(folder) if "eval/srcc" in line][-1]
    assert line["eval/srcc"] == pytest.approx(spearmanr(scores, expected).statistic, abs=1e-3)
    assert line["eval/loss"] == pytest.approx(np.mean((scores - regret.unit_ranks(expected)) ** 2), abs=1e-4)


@pytest.mark.check
def test_evaluate_reports_correlations_and_the_true_complexity(run, clip_folder, tmp_path):
    config, folder = run
    record = evaluate_complexity(config, folder)
    assert json.loads((folder / "metrics.json").read_text()) == plain(record)
    require_known_keys(plain(record), "complexity")
    assert list(record.runs)[:2] == ["model", "known_complexity"] and record.images == 21
    source = Scenes("val", 21, image_size=32)
    clip = icar_jax.load(clip_folder, batch_size=8)
    values = regret.measure_regrets(config, clip, {"kind": "loss", "exit": 2}, source).values
    scores = icar_jax.load(folder / "model", batch_size=8).score([r.image() for r in source])
    known = np.array([r.complexity for r in source])
    assert record.runs["model"]["srcc"].value == pytest.approx(spearmanr(scores, values).statistic, abs=1e-6)
    assert abs(record.runs["known_complexity"]["srcc"].value) == pytest.approx(
        abs(spearmanr(known, values).statistic),
        abs=0.05,  # the fitted line is clipped to [0, 1] and may have a negative slope
    )
    assert record.regret.pcc["model"].value == pytest.approx(np.corrcoef(scores, values)[0, 1], abs=1e-5)
    assert record.regret.pcc["known_complexity"].value == pytest.approx(np.corrcoef(known, values)[0, 1], abs=1e-5)
    assert record.regret.exit == 2 and record.over_known.over == "known_complexity"
    assert record.margin.over != "known_complexity", "that is no classical measure"
    told = " ".join(complexity_table.verdicts(record))
    assert "regret: mean" in told and "known complexity" in told
    assert (folder / "scores.png").is_file() and (folder / "nuisance.png").is_file()


def test_regret_and_ratings_models_are_not_confused(run, clip_folder, tmp_path):
    config, folder = run
    about = checkpoint.describe(folder / "model")
    rating = dataclasses.replace(config.complexity, target="rating", exit=0, clip=str(clip_folder))
    with pytest.raises(
        ConfigError, match="the model was trained on regret at exit 2 of .*pass --config.complexity.target=regret"
    ):
        evaluate_complexity(dataclasses.replace(config, complexity=rating), folder / "model")
    with pytest.raises(ConfigError, match="but the model was trained on ratings"):
        regret.load_routed_clip(config, {})
    with pytest.raises(ConfigError, match="is not the CLIP the regret model was trained with"):
        regret.load_routed_clip(config, {"regret": about["regret"] | {"sha256": "0" * 64}})
