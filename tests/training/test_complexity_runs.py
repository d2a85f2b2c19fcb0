"""Runs of the complexity model on ratings: what is evaluated, kept, weighed and written, and when they end."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax import workdir as files
from icar_jax.config import ConfigError, DataConfig, ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.images import Preprocess
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation import during_training
from icar_jax.evaluation.metrics import ratings as ratings_metrics
from icar_jax.models import variants
from icar_jax.models.convnext import ConvNeXt
from icar_jax.training import evaluator
from icar_jax.training.logs import RunLog
from icar_jax.training.loop import train
from icar_jax.training.losses import contrastive
from icar_jax.training.monitor import Monitor
from icar_jax.training.setup import _shared_part, with_length
from icar_jax.training.tasks.kinds import kind_of
from tests.support import ratedfiles
from tests.support.places import ROOT
from tests.support.runs import tiny_config


def config_file(name, *argument):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def small(config, root, ratings=""):
    """A recipe as it is, but for a model, images and batches that take a second."""
    config.complexity.variant, config.complexity.image_size = "convnextv2_demo", 32
    config.data.root, config.data.ratings, config.data.workers = str(root), ratings, 0
    config.train.batch_size, config.train.dtype, config.train.log_every = 8, "float32", 1
    config.eval.batch_size = 8
    return config


def lines(workdir, key):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def evaluators(config):
    return (during_training.evaluator(config),)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """An ImageNet backbone as `icar convert` leaves it."""
    arch = dataclasses.replace(variants.CONVNEXT["convnextv2_demo"], num_classes=0)
    params = ConvNeXt.init(jax.random.key(3), arch)
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    return checkpoint.write(tmp_path_factory.mktemp("timm") / "model", "convnext", description, params)


@pytest.mark.check
def test_the_evaluation_of_a_run_is_that_of_its_finished_model(tmp_path, capsys):
    config = tiny_config("complexity", eval_every=3, keep_best=True)
    config.eval.size, config.eval.batch_size, config.eval.split = 21, 8, "test"  # the last batch is not full
    config.train.eval_split = "val"
    train(config, tmp_path, evaluators=evaluators(config))
    found = lines(tmp_path, "eval/pcc")
    assert [line["step"] for line in found] == [3, 4]
    val = Scenes("val", 21, image_size=64)
    scores = icar_jax.load(tmp_path).score([val[i].image() for i in range(21)])
    rated = np.array([val[i].complexity for i in range(21)])
    expected = {"loss": ((scores - rated) ** 2).mean()}
    expected |= {name: getattr(ratings_metrics, name)(scores, rated) for name in ("pcc", "srcc", "rmse", "rmae")}
    assert {name: found[-1][f"eval/{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)
    best = checkpoint.describe(tmp_path / "best")["evaluation"]
    assert best["pcc"] == max(line["eval/pcc"] for line in found) == best["eval/pcc"]
    assert json.loads((tmp_path / "splits.json").read_text())["counts"] == {"train": 200}
    assert "200 training images, scores in tenths from 0 to 1:" in capsys.readouterr().out


@pytest.mark.check
def test_a_run_ends_when_patience_does_also_after_it_was_cut_off(tmp_path, capsys):
    config = tiny_config("complexity", eval_every=1, keep_best=True, patience=2)
    script = [0.5, 0.3, 0.5]

    def scripted(start):
        values = iter(script[start:])
        return (lambda trained: lambda params: {"eval/pcc": next(values)},)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config, whole, evaluators=scripted(0))
    assert [line["eval/pcc"] for line in lines(whole, "eval/pcc")] == script
    assert "Early stopping: no improvement in 2 evaluations (config.train.patience); step 3 of 4." in capsys.readouterr().out
    assert checkpoint.describe(whole / "model")["source"]["steps"] == 3
    best = checkpoint.describe(whole / "best")["evaluation"]
    assert (best["steps"], best["pcc"], best["eval/pcc"]) == (1, 0.5, 0.5)
    assert train(config, cut, stop_after=2, evaluators=scripted(0)) == cut and not (cut / "model").exists()
    train(config, cut, evaluators=scripted(2))
    assert lines(cut, "eval/pcc") == lines(whole, "eval/pcc")
    models = [pytree.flatten(checkpoint.read(folder / "model", "complexity").params) for folder in (whole, cut)]
    assert all((np.asarray(models[0][path]) == np.asarray(models[1][path])).all() for path in models[0])
    train(config, cut, evaluators=scripted(3))  # it is finished, and stays so
    assert lines(cut, "eval/pcc") == lines(whole, "eval/pcc")


@pytest.mark.check
def test_the_recipe_of_ic9600_from_a_backbone(tmp_path, backbone, capsys):
    """Two epochs: evaluated once an epoch on val, the best by PCC kept, splits and spread written."""
    root, workdir = ratedfiles.ic9600(tmp_path / "IC9600"), tmp_path / "w"
    config = small(config_file("ic9600"), root)
    config.train.epochs, config.train.init = 2, str(backbone)
    config.complexity.dropout = 0.0
    train(config, workdir, evaluators=evaluators(config))
    images = len(configured.train_source(config.data))
    epoch, last = round(images / 8), -(-2 * images // 8)
    found = lines(workdir, "eval/pcc")
    assert [line["step"] for line in found] == sorted({epoch, 2 * epoch, last} & set(range(last + 1)))
    best = checkpoint.describe(workdir / "best")["evaluation"]
    assert best["pcc"] == max(line["eval/pcc"] for line in found) == best["eval/pcc"]
    splits = json.loads((workdir / "splits.json").read_text())
    assert splits["counts"]["test"] == 10 and sum(splits["counts"].values()) == 50 == len(splits["splits"])
    assert "a tenth of train.txt" in splits["how"] and sum(splits["training_ratings"]["counts"]) == images
    said = capsys.readouterr().out
    assert f"{images} training images, scores in tenths" in said and "train.txt: 40 scores of 40 lines" in said
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == last


@pytest.mark.check
def test_the_recipe_of_icc_is_evaluated_on_its_labels(tmp_path):
    root = ratedfiles.annotations(tmp_path / "icc")
    config = small(config_file("icc"), root, str(root / "labels.json"))
    config.train.eval_every, config.train.patience = 2, 0
    config.complexity.class_weights = "balanced"
    workdir = tmp_path / "w"
    train(config, workdir, stop_after=2, evaluators=evaluators(config))
    (found,) = lines(workdir, "eval/loss")
    model, val = icar_jax.load(workdir / "best"), configured.calibration_source(config.data)
    records = [val[i] for i in range(len(val))]
    p = model.score([record.image() for record in records]).astype(np.float64)
    labels = np.array([record.complexity for record in records]) > 0.5
    assert found["eval/loss"] == pytest.approx(-np.mean(np.log(np.where(labels, p, 1 - p))), abs=1e-4)
    assert found["eval/accuracy"] == pytest.approx(np.mean((p > 0.5) == labels))
    assert found["eval/f1"] == pytest.approx(ratings_metrics.f1(p > 0.5, labels))


def trained(config, **more):
    return SimpleNamespace(config=config, kind="complexity", description={}, tokenizer=None, **more)


def history(workdir, values, name="eval/pcc"):
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"step": 10 * i, "loss": 1.0}) + "\n" + json.dumps({"step": 10 * i, name: v}) for i, v in
            enumerate(values, start=1)]  # fmt: skip
    (workdir / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 9999, "eval/p')
    return workdir


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), max_size=12), st.integers(1, 4), st.integers(0, 12),
    st.sampled_from(["regression", "classification"]),
)  # fmt: skip
def test_patience_counts_as_a_plain_loop_does_wherever_the_run_was_cut(tmp_path_factory, values, patience, cut, head):
    config = ExperimentConfig(task="complexity")
    config.train.eval_every, config.train.patience, config.complexity.head = 10, patience, head
    name = "eval/pcc" if head == "regression" else "eval/loss"
    pick = max if head == "regression" else min
    cut = min(cut, len(values))
    workdir = history(tmp_path_factory.mktemp("p") / "w", values, name)
    upcoming = iter(values[cut:])
    evaluation = evaluator.Evaluation(trained(config), workdir, 10 * cut, [lambda params: {name: next(upcoming)}])
    for step in range(cut, len(values) + 1):
        firsts = [values.index(pick(values[:step])) + 1] if step else [0]
        assert evaluation.exhausted == (step - firsts[0] >= patience), (values, step)
        if step < len(values):
            evaluation(10 * (step + 1), {})


def test_what_the_best_is_chosen_by():
    config = ExperimentConfig(task="complexity")
    assert evaluator.criterion(config) is evaluator.CORRELATION and evaluator.CORRELATION.better(0.9, 0.8)
    config.complexity.head = "classification"
    assert evaluator.criterion(config) is evaluator.LOSS and evaluator.LOSS.better(0.1, 0.2)
    assert evaluator.criterion(ExperimentConfig()) is evaluator.RECALL
    with pytest.raises(ValueError, match=r"needs? an evaluator that returns values named '...eval/loss', got"):
        evaluator.LOSS.score({"eval/pcc": 1.0})


def test_class_weights():
    assert contrastive.class_weights("none", (3, 1)) == (1.0, 1.0)
    simple, complex_ = contrastive.class_weights("balanced", (30, 10))
    assert 30 * simple == pytest.approx(10 * complex_) and 30 * simple + 10 * complex_ == pytest.approx(40)
    logits = jnp.array([[0.3, -0.2], [0.1, 0.4], [2.0, 1.0], [0.0, 0.7]])
    rated = jnp.array([0.0, 0.0, 0.0, 1.0])
    each = -jax.nn.log_softmax(logits)[jnp.arange(4), jnp.array([0, 0, 0, 1])]
    weights = contrastive.class_weights("balanced", (3, 1))
    found = contrastive.complexity_loss(logits, rated, "classification", 0.5, weights)
    assert found == pytest.approx(float(each[:3].mean() + each[3]) / 2, rel=1e-6), "each class counts for half"


def test_a_split_that_is_trained_on_is_refused_before_anything_is_written(tmp_path):
    config = tiny_config("complexity", eval_every=1, eval_split="train")
    with pytest.raises(ConfigError, match="config.train.eval_split='train' is not held out: train is used for training"):
        train(config, tmp_path / "w", evaluators=evaluators(config))
    assert not (tmp_path / "w").exists()


def test_a_split_that_is_not_there_is_named_before_anything_is_written(tmp_path):
    config = small(config_file("ic9600"), ratedfiles.ic9600(tmp_path / "IC9600"))
    config.train.eval_split = "dev"
    with pytest.raises(ConfigError, match="no images in split 'dev'; it has test"):
        train(config, tmp_path / "w", evaluators=evaluators(config))
    assert not (tmp_path / "w").exists()
    scenes = tiny_config("complexity", eval_every=1, eval_split="dev")
    with pytest.raises(ValueError, match="unknown split 'dev' of scenes"):
        train(scenes, tmp_path / "w", evaluators=evaluators(scenes))
    assert not (tmp_path / "w").exists()


def test_processes_compare_what_the_ratings_say_and_not_where_they_lie(tmp_path):
    one, two = (ratedfiles.annotations(tmp_path / name) for name in ("one", "two"))
    configs = [small(config_file("icc"), root, str(root / "labels.json")) for root in (one, two)]

    def content():
        return [kind_of(c).survey(configured.train_source(c.data)).content for c in configs]

    assert _shared_part(configs[0]) == _shared_part(configs[1]) and content()[0] == content()[1]
    labels = json.loads((two / "labels.json").read_text())
    held_out = configured.calibration_source(configs[1].data).names[0]
    (two / "labels.json").write_text(json.dumps(labels | {held_out: 1 - labels[held_out]}))
    first, second = content()
    assert first != second, "images that are only evaluated count as well"


def test_speed_is_counted_in_what_is_trained_on(tmp_path):
    for task, unit in (("clip", "pairs"), ("complexity", "images")):
        config = ExperimentConfig(task=task)
        config.train.log_every = 1
        (tmp_path / task).mkdir()
        log = RunLog(tmp_path / task, 3, 0, False, "t")
        monitor = Monitor(kind_of(config), log, lambda: None)
        for step in (1, 2, 3):
            monitor.push(step, {"loss": jnp.ones(())}, [])
        monitor.flush()
        assert f"{unit}/s=" in str(log._bar)
        log.close()
        assert all(set(line) == {"step", "loss", "lr", f"{unit}_per_s"} for line in lines(tmp_path / task, "step")[1:])


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_a_classifier_needs_both_classes(tmp_path, weights):
    root = ratedfiles.annotations(tmp_path / "icc")
    labels = {name: 1 for name in json.loads((root / "labels.json").read_text())}
    (root / "labels.json").write_text(json.dumps(labels))
    config = small(config_file("icc"), root, str(root / "labels.json"))
    config.complexity.class_weights = weights
    with pytest.raises(ConfigError, match="head='classification' needs images of both classes, but of .* 0 are simple"):
        train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_length_in_epochs():
    config = tiny_config("complexity")
    assert with_length(config, 1000).train == config.train
    config.train.epochs, config.train.eval_every, config.train.batch_size = 1.5, -1, 32
    now = with_length(config, 100).train
    assert (now.steps, now.eval_every) == (5, 3) and config.train.eval_every == -1
    assert with_length(config, 6720).train.steps == 315


def test_other_images_are_named_when_a_run_in_epochs_continues(tmp_path):
    root = ratedfiles.ic9600(tmp_path / "IC9600")
    config = small(config_file("ic9600"), root)
    workdir, source = tmp_path / "w", configured.train_source(config.data)
    (workdir / files.CHECKPOINTS / "1").mkdir(parents=True)  # as after a first step
    files.save_config(workdir, with_length(config, len(source)))
    files.save_data(workdir, configured.fingerprint(source))
    (root / "train.txt").write_text("".join((root / "train.txt").read_text().splitlines(keepends=True)[:-9]))
    with pytest.raises(ConfigError, match="the training images changed since the run"):
        train(config, workdir)


def test_ratings_that_are_all_alike_cannot_be_evaluated(tmp_path):
    root = ratedfiles.ic9600(tmp_path)
    (root / "val.txt").write_text("".join(f"{i} a.jpg  0.5\n" for i in range(4)))
    taken = tuple(f"{i} a.jpg  " for i in range(4))
    for name in ("train.txt", "test.txt"):
        kept = [line for line in (root / name).read_text().splitlines(keepends=True) if not line.startswith(taken)]
        (root / name).write_text("".join(kept))
    config = ExperimentConfig(task="complexity", data=DataConfig(source="ratings", root=str(root)))
    config.train.eval_split = "val"
    with pytest.raises(ConfigError, match="all 4 ratings are 0.5, so correlation is undefined"):
        during_training.RatingsEvaluator(trained(config))


def test_a_fresh_head_that_scores_all_alike_has_no_correlation():
    found = during_training._agreement(np.full(3, 0.5), np.array([0.0, 0.5, 1.0]))
    assert found["pcc"] == found["srcc"] == 0.0 and found["loss"] == pytest.approx(1 / 6)
