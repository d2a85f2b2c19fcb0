"""`icar calibrate`: thresholds from a budget, from shares and from labels, and where they are stored."""

import dataclasses
import hashlib
import json
import os
import sys

import numpy as np
import pytest

import icar_jax
from icar_jax import checkpoint, cli, workdir
from icar_jax.data.images import Preprocess
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation.routing.calibration import bundle_costs, calibrate, make_bundle
from icar_jax.inference.router import assign
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXtArch
from tests.support import drawn
from tests.support.places import ROOT
from tests.support.runs import tiny_config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 image files, some in a subfolder, and one file that is not an image."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "more").mkdir()
    for i, record in enumerate(Scenes("test", 40)):
        record.image().save(root / ("more" if i % 4 == 0 else "") / f"{i:02d}.png")
    (root / "broken.jpg").write_bytes(b"no picture")
    return root


@pytest.fixture
def bundle(clip_folder, complexity_folder, tmp_path):
    """A bundle with exits after 1, 2 and 3 blocks and arbitrary thresholds."""
    return make_bundle(clip_folder, complexity_folder, tmp_path / "bundle", thresholds=(0.3, 0.6))


@pytest.fixture(scope="module")
def classifier_weights(tmp_path_factory):
    arch = ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8)), "classification", 32)
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    params = drawn.params(ComplexityModel.graph(arch).shapes, 2)
    params["head"]["fc"]["kernel"] = params["head"]["fc"]["kernel"] * 2
    return arch, description, params


@pytest.fixture
def classifier(classifier_weights, tmp_path):
    _, description, params = classifier_weights
    return checkpoint.write(tmp_path / "classifier", "complexity", description, params)


def run(*arguments):
    cli.main(["calibrate", *map(str, arguments)])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.safetensors")}


def readable(root):
    return sorted(p for p in root.rglob("*.png"))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_budget_is_met_and_recorded(bundle, pictures, capsys, share):
    costs = bundle_costs(bundle)
    budget = costs.lowest_budget + share * (1 - costs.lowest_budget)
    before = digest(bundle)
    run(bundle, "--budget", budget, "--images", pictures)
    printed = capsys.readouterr().out
    assert "mean counted cost" in printed and "1 more could not be read" in printed
    assert digest(bundle) == before
    routing = checkpoint.describe(bundle)["routing"]
    found = routing["found"]
    assert (found["method"], found["budget"], found["images"], found["unreadable"]) == ("budget", budget, 40, 1)
    assert found["cost"] <= budget + 1e-9 and len(found["names_sha256"]) == 64
    # The bundle loads and routes these images as recorded.
    model = icar_jax.load(bundle)
    scores = model.score(readable(pictures))
    exits = assign(scores, model.exits, model.thresholds)
    assert {str(e): pytest.approx(np.mean(exits == e)) for e in model.exits} == found["reached"]
    assert costs.share_of_full({e: np.mean(exits == e) for e in model.exits}) == pytest.approx(found["cost"])


def test_costs_count_the_router(bundle):
    model = icar_jax.load(bundle)
    costs = bundle_costs(bundle)
    from icar_jax.models.flops import complexity_flops, vision_flops

    assert costs.router == complexity_flops(model.scorer.complexity.arch)
    assert costs.full == vision_flops(model.arch.vision)
    assert costs.share_of_full({1: 0, 2: 0, 3: 1}) == pytest.approx(1 + costs.router / costs.full)


def test_shares(bundle, pictures):
    run(bundle, "--share", 0.5, 0.25, "--images", pictures / "*.png", pictures / "more")
    found = checkpoint.describe(bundle)["routing"]["found"]
    assert found["method"] == "shares" and found["shares"] == {"1": 0.5, "2": 0.25, "3": 0.25}
    assert found["reached"] == {"1": 0.5, "2": 0.25, "3": 0.25} and found["images"] == 40


def test_a_threshold_from_labels(classifier, pictures, tmp_path, capsys):
    model = icar_jax.load(classifier)
    files = readable(pictures)
    scores = model.score(files)
    assert np.ptp(scores) > 0.2
    limit = float(np.sort(scores)[25])
    labels = {str(p.relative_to(pictures)): int(s > limit) for p, s in zip(files, scores)}
    labels[next(iter(labels))] = -1
    (tmp_path / "annotations.json").write_text(json.dumps(labels))
    run(classifier, "--metric", "f1", "--labels", tmp_path / "annotations.json", "--root", pictures)
    description = checkpoint.describe(classifier)
    found = description["threshold_found"]
    used = np.array([s for s, label in zip(scores, labels.values()) if label >= 0], np.float32)
    above = used[used > limit].min()
    assert found["value"] == 1.0 and found["images"] == 39 and found["complex"] == found["called_complex"]
    assert limit - 0.001 <= description["threshold"] < above  # the highest grid point that separates the classes
    printed = capsys.readouterr().out
    assert "1 undecided" in printed and "so it is optimistic" in printed
    grid = ("--threshold-grid", 0, 1, 0.25)
    run(classifier, "--metric", "f1", "--labels", tmp_path / "annotations.json", "--root", pictures, *grid)
    description = checkpoint.describe(classifier)
    assert description["threshold"] in (0, 0.25, 0.5, 0.75, 1) and description["threshold_found"]["grid"] == [0, 1, 0.25]


def test_a_bundle_of_one_exit_takes_a_metric(clip_folder, classifier, pictures, tmp_path):
    source = checkpoint.read(clip_folder, "clip")
    description = json.loads(json.dumps(source.description))
    description["arch"]["vision"]["exits"] = [2]
    params = json_free(source.params, drop="1")
    two = checkpoint.write(tmp_path / "clip", "clip", description, params, source.tokenizer)
    bundle = make_bundle(two, classifier, tmp_path / "b", thresholds=(0.9,))
    scores = icar_jax.load(classifier).score(readable(pictures))
    lines = [f"{p.relative_to(pictures)},{int(s > np.median(scores))}" for p, s in zip(readable(pictures), scores)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,score", *lines]))
    run(bundle, "--metric", "youden", "--labels", tmp_path / "labels.csv", "--root", pictures)
    found = checkpoint.describe(bundle)["routing"]["found"]
    assert found["metric"] == "youden" and found["value"] == 1 and found["reached"] == {"2": 0.5, "3": 0.5}


def json_free(params, drop):
    vision = {**params["vision"], "exits": {k: v for k, v in params["vision"]["exits"].items() if k != drop}}
    scales = {k: v for k, v in params["exit_logit_scale"].items() if k != drop}
    return {**params, "vision": vision, "exit_logit_scale": scales}


def test_the_workdir_names_the_calibration_images(classifier_weights, tmp_path):
    arch, description, params = classifier_weights
    config = tiny_config("complexity")
    config.complexity.head = "classification"
    workdir.save_config(tmp_path, config)
    checkpoint.write(tmp_path / "model", "complexity", description, params)
    for path in (tmp_path, tmp_path / "model"):
        run(path, "--metric", "accuracy")
        found = checkpoint.describe(tmp_path / "model")["threshold_found"]
        assert found["calibration"] == "scenes/calibration" and found["images"] == 40
        assert found["boundary"] == config.complexity.threshold
    run(tmp_path, "--metric", "accuracy", "--boundary", "0.7")
    again = checkpoint.describe(tmp_path / "model")["threshold_found"]
    assert again["boundary"] == 0.7 and again["complex"] < found["complex"]


def test_a_config_names_the_calibration_images(bundle, monkeypatch):
    words = ["--budget", "0.9", "--config", str(ROOT / "configs/demo.py:clip"), "--config.data.calibration_size=36"]
    monkeypatch.setattr(sys, "argv", ["icar", "calibrate", str(bundle), *words])  # config overrides are read from here
    cli.main()
    assert checkpoint.describe(bundle)["routing"]["found"]["images"] == 36


def test_a_killed_writer_leaves_the_old_description(bundle, pictures, monkeypatch):
    before = (bundle / checkpoint.DESCRIPTION).read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit) as stop:
        run(bundle, "--budget", 0.9, "--images", pictures)
    assert stop.value.code == 130
    assert (bundle / checkpoint.DESCRIPTION).read_bytes() == before
    assert sorted(p.name for p in bundle.iterdir()) == ["clip", "complexity", checkpoint.DESCRIPTION]


def test_mistakes_of_routing(bundle, complexity_folder, clip_folder, pictures, tmp_path, capsys):
    before = (bundle / checkpoint.DESCRIPTION).read_bytes()
    lowest = bundle_costs(bundle).lowest_budget
    images = ["--images", pictures]
    assert f"at least {np.ceil(lowest * 1e4) / 1e4:g}" in fails(capsys, bundle, "--budget", lowest - 0.01, *images)
    assert "must lie in (0, 1]" in fails(capsys, bundle, "--budget", 1.2, *images)
    assert "pass 2 numbers" in fails(capsys, bundle, "--share", 0.5, *images)
    assert "is not in a workdir" in fails(capsys, bundle, "--budget", 0.9)
    assert "no image file" in fails(capsys, bundle, "--budget", 0.9, "--images", tmp_path / "none*.png")
    config = ["--config", ROOT / "configs/demo.py:clip"]
    assert "use --budget or --share" in fails(capsys, bundle, "--metric", "f1", *config)
    assert "cannot choose a threshold" in fails(capsys, bundle, "--metric", "auc", *config)
    assert "pass one of them" in fails(capsys, bundle, "--share", 0.5, *images, *config)
    assert "overrides a field of --config" in fails(capsys, bundle, "--budget", 0.9, "--config.data.threads=1")
    assert "is a complexity model without a CLIP" in fails(capsys, complexity_folder, "--budget", 0.9, *images)
    assert "no checkpoint of kind bundle or complexity" in fails(capsys, clip_folder, "--budget", 0.9, *images)
    assert "not allowed with" in fails(capsys, bundle, "--budget", 0.9, "--share", 0.5)
    assert (bundle / checkpoint.DESCRIPTION).read_bytes() == before


def test_images_that_were_trained_on_are_counted(classifier, pictures, tmp_path, capsys):
    """Training images are recognised by name, and by folder to exclude other images with equal names."""
    names = [str(p.relative_to(pictures)) for p in readable(pictures)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,score", *(f"{name},{i % 2}" for i, name in enumerate(names))]))
    labels = "--metric", "f1", "--labels", tmp_path / "labels.csv", "--root", pictures
    run(classifier, *labels)
    assert "training images" not in capsys.readouterr().out
    config = tiny_config("complexity")
    splits = {name: ("train", "train", "val")[i % 3] for i, name in enumerate(names)} | {"other.png": "train"}
    workdir.write_text(tmp_path / workdir.SPLITS, json.dumps({"splits": splits}))
    for root, words in (
        (pictures, "27 of 40 images are training images"),
        (tmp_path, "27 of 40 images have the names of training images"),
    ):
        config.data.root = str(root)
        workdir.save_config(tmp_path, config)
        run(classifier, *labels)
        out = capsys.readouterr().out
        assert f"Note: {words} of the model" in out
    workdir.write_text(tmp_path / workdir.SPLITS, json.dumps({"how": "scenes", "counts": {}}))
    run(classifier, *labels)
    assert "training images" not in capsys.readouterr().out


def test_mistakes_of_labels(classifier, complexity_folder, pictures, tmp_path, capsys):
    names = [str(p.relative_to(pictures)) for p in readable(pictures)]

    def labels(values, name="labels.csv"):
        lines = [f"{n},{v}" for n, v in zip(names, values)]
        (tmp_path / name).write_text("\n".join(["file,score", *lines]))
        return "--metric", "f1", "--labels", tmp_path / name, "--root", pictures

    assert "is a regression model" in fails(capsys, complexity_folder, *labels([0, 1] * 20))
    assert "belong to class simple" in fails(capsys, classifier, *labels([0] * 40))
    assert "pass --boundary" in fails(capsys, classifier, *labels([0.2, 0.7] * 20))
    assert "no such image" in fails(capsys, classifier, *labels([0, 1] * 20)[:-1], tmp_path.parent)
    assert "--root" in fails(capsys, classifier, *labels([0, 1] * 20)[:-2])
    assert "do not have" in fails(capsys, classifier, "--metric", "f1", "--images", pictures)
    assert "threshold" not in checkpoint.describe(classifier)
    run(classifier, *labels([0.2, 0.7] * 20), "--boundary", 0.5)
    assert checkpoint.describe(classifier)["threshold_found"]["boundary"] == 0.5


def test_exactly_one_method_must_be_given(bundle):
    for wrong in ({}, {"budget": 0.9, "shares": (0.5, 0.2)}, {"budget": 0.9, "metric": "f1"}):
        with pytest.raises(icar_jax.config.ConfigError, match="exactly one of"):
            calibrate(bundle, Scenes("calibration", 4), **wrong)


def test_amending_keeps_the_rest(bundle):
    before = checkpoint.describe(bundle)
    checkpoint.amend(bundle, {"note": "mine"})
    assert checkpoint.describe(bundle) == {**before, "note": "mine"}
    with pytest.raises(ValueError, match="kind describe the weights"):
        checkpoint.amend(bundle, {"kind": "clip"})


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--share", 0.5, "--images", ".", "--root", "."), "--root applies to --labels"),
        (("--share", 0.5, "--images", ".", "--boundary", 0.5), "--boundary needs --metric"),
        (("--budget", 0.7, "--images", ".", "--bad-share", 0.1), "--bad-share 0.1 must lie in [0, 1] and needs --labels"),
        (("--metric", "f1", "--labels", "x.json", "--root", ".", "--bad-share", 2), "--bad-share 2 must lie in"),
        (("--share", 0.5, "--images", ".", "--threshold-grid", 0, 1, 0.1), "a threshold grid needs a metric"),
        (("--share", 0.5, "--images", ".", "--batch-size", 0), "at least 1, found '0'"),
    ],
)
def test_unused_flags_are_refused(bundle, capsys, flags, message):
    assert message in fails(capsys, bundle, *flags)
