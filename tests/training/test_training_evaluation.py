"""Evaluation while a run goes on: when, what is kept of it, and across a resume."""

import os
import shutil
import signal

import numpy as np
import pytest

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError
from icar_jax.data.configured import eval_source
from icar_jax.evaluation.during_training import RetrievalEvaluator
from icar_jax.evaluation.metrics.retrieval import ranks, recall
from icar_jax.training.loop import train
from tests.support.runs import metric_lines as lines
from tests.support.runs import tiny_config


def scripted(values):
    """An evaluator that returns one recall after the other, and the steps it was called for."""
    calls = []

    def make(trained):
        def evaluate(params):
            calls.append({path: np.asarray(leaf) for path, leaf in pytree.flatten(params).items()})
            return {"eval/full_r5": values[len(calls) - 1], "eval/other": 1e9}

        return evaluate

    return make, calls


def test_the_best_model_is_kept_also_across_a_resume(tmp_path):
    config = tiny_config(eval_every=1, keep_best=True)
    make, calls = scripted([10.0, 30.0])
    train(config, tmp_path, stop_after=2, evaluators=(make,))
    make, later = scripted([20.0, 30.0])
    train(config, tmp_path, evaluators=(make,))
    best = checkpoint.read(tmp_path / "best", "clip")
    found = {"steps": 2, "split": ["val", config.eval.size], "mean_r5": 30.0, "eval/full_r5": 30.0, "eval/other": 1e9}
    assert best.description["evaluation"] == found
    for path, leaf in pytree.flatten(best.params).items():
        np.testing.assert_array_equal(leaf, calls[1][path])
    icar_jax.load(tmp_path / "best")
    recalls = [line for line in lines(tmp_path) if "eval/full_r5" in line]
    assert [(line["step"], line["eval/full_r5"]) for line in recalls] == [(1, 10.0), (2, 30.0), (3, 20.0), (4, 30.0)]
    assert len(later) == 2 and [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.check
def test_a_best_model_of_an_earlier_start_is_forgotten(tmp_path):
    config = tiny_config(eval_every=1, keep_best=True)
    train(config, tmp_path, stop_after=1, evaluators=(scripted([90.0])[0],))
    shutil.rmtree(tmp_path / "checkpoints")  # as if the run had been killed before its first checkpoint
    train(config, tmp_path, stop_after=1, evaluators=(scripted([10.0])[0],))
    assert checkpoint.describe(tmp_path / "best")["evaluation"]["mean_r5"] == 10.0


def test_a_best_model_of_another_split_is_not_compared(tmp_path):
    config = tiny_config(eval_every=1, keep_best=True)
    train(config, tmp_path, stop_after=1, evaluators=(scripted([90.0])[0],))
    config.eval.split = "test"
    with pytest.raises(ConfigError, match=r"best was selected on split and size \['val', .*now has \['test'"):
        train(config, tmp_path, stop_after=2, evaluators=(scripted([10.0])[0],))


@pytest.mark.check
def test_a_run_goes_on_without_the_weights_it_started_from(tmp_path):
    first = train(tiny_config(steps=1), tmp_path / "first")
    config = tiny_config(steps=2)
    config.train.init = str(first)
    train(config, tmp_path / "run", stop_after=1)
    first.rename(tmp_path / "moved")
    model = train(config, tmp_path / "run")
    assert checkpoint.describe(model)["source"]["steps"] == 2
    with pytest.raises(ConfigError, match="does not exist"):
        train(config, tmp_path / "another")


def test_evaluation_while_training_needs_an_evaluator(tmp_path):
    with pytest.raises(ConfigError, match="config.train.eval_every needs an evaluator"):
        train(tiny_config(eval_every=2), tmp_path)


@pytest.mark.check
def test_retrieval_while_training_is_that_of_the_finished_model(tmp_path):
    """Every third step and the last; the values of the last are those of the written model, image by image."""
    config = tiny_config(eval_every=3)
    config.eval.size, config.eval.batch_size = 21, 8  # the last batch is not full
    train(config, tmp_path, evaluators=(RetrievalEvaluator,))
    found = [line for line in lines(tmp_path) if "eval/full_r5" in line]
    assert [line["step"] for line in found] == [3, 4]
    model, source = icar_jax.load(tmp_path), eval_source(config.data, config.eval)
    records = [source[i] for i in range(len(source))]
    captions = [caption for record in records for caption in record.captions]
    owner = np.repeat(np.arange(len(records)), [len(record.captions) for record in records])
    texts = model.encode_text(captions)
    for name, exit in (("eval/full_r5", 3), ("eval/exit_2_r5", 2)):
        images = model.encode_image([record.image() for record in records], exit=exit)
        expected = np.mean(list(recall(ranks(images, texts, owner), 5).values()))
        assert found[-1][name] == pytest.approx(expected, abs=1e-9)


@pytest.mark.check
def test_a_signal_stops_the_run_after_the_step_and_saves(tmp_path, capsys):
    """Set while the third step is evaluated; the same command continues with the fourth."""
    config = tiny_config(checkpoint_every=100, eval_every=3)

    def make(trained):
        return lambda params: os.kill(os.getpid(), signal.SIGTERM) or {"eval/full_r5": 0.0}

    assert train(config, tmp_path, evaluators=(make,)) == tmp_path
    assert "Stopped by SIGTERM after step 3 of 4; run the same command to resume." in capsys.readouterr().out
    assert not (tmp_path / "model").exists()
    train(config, tmp_path, evaluators=(scripted([0.0])[0],))
    assert "Resuming" in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4]
