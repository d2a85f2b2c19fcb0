"""Addresses of buckets and of the web are refused wherever a path of this machine is meant, before anything is written."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from icar_jax import checkpoint, cli
from icar_jax import config as cfg
from icar_jax.data.images import ImageError, decode
from icar_jax.data.sources.files import ImagePaths
from icar_jax.evaluation.complexity.evaluate import evaluate_complexity
from icar_jax.evaluation.evaluate import evaluate
from icar_jax.inference.files.corpus import CorpusWriter
from icar_jax.training.loop import train
from tests.support.runs import tiny_config

ADDRESSES = ["s3://b/run", "gs://b/run", "https://host/run", "file:///run", "hf://owner/name", Path("s3://b/run")]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a new folder, which must be as empty afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_told_from_a_path(address):
    assert cfg.not_local(address) is not None
    with pytest.raises(cfg.ConfigError, match=r"^--out: \w+:/.*is an address.*mount the bucket"):
        cfg.require_local("--out", address)


@pytest.mark.parametrize(
    "path", ["run", "/mnt/s3/run", "./s3:/run", "a:b", "C:/pictures", "2024:/x", "", "folder/http:/x", b"run"]
)
def test_a_path_is_no_address(path):
    assert cfg.not_local(path) is None


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("run", [train, evaluate, evaluate_complexity])
def test_a_workdir_is_a_folder_of_this_machine(run, address):
    with pytest.raises(cfg.ConfigError, match=r"--workdir: .*is an address"):
        run(tiny_config("complexity" if run is evaluate_complexity else "clip"), address)


@pytest.mark.parametrize(
    "field",
    [
        "data.root", "data.ratings", "data.scenes_kept", "data.tokenizer", "complexity.clip", "train.init", "eval.complexity",
        "eval.static", "eval.labels", "eval.distractors.root", "eval.distractors.labels",
    ],
)  # fmt: skip
def test_a_field_that_names_a_place_is_checked(field):
    config = tiny_config()
    *groups, name = field.split(".")
    node = config
    for group in groups:
        node = getattr(node, group)
    setattr(node, name, "s3://b/x")
    with pytest.raises(cfg.ConfigError, match=rf"config\.{field}: s3://b/x is an address"):
        cfg.validate(config)


def test_every_field_that_looks_like_a_place_is_among_them():
    """A new text field is either a place, and checked, or it is named here."""
    no_places = {
        "task", "variant", "pool", "exit_start", "exit_head", "temperature", "head", "class_weights", "target", "regret",
        "pooled_norm", "source", "train_split", "dataset", "image_column", "caption_column", "resize", "interpolation",
        "normalise", "mu_dtype", "direction", "kind", "dtype", "remat", "eval_split", "split", "score_calibration", "reduce",
        "cross_form", "projection", "categories", "readout", "fit",
    }  # fmt: skip

    def texts(node, prefix):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from texts(value, f"{prefix}.{field.name}")
            elif isinstance(value, str) and field.name not in no_places:
                yield f"{prefix}.{field.name}", node, field.name

    config = cfg.ExperimentConfig()
    found = list(texts(config, "config"))
    assert len(found) == 18
    for name, node, field in found:
        setattr(node, field, "gs://b/x")
        with pytest.raises(cfg.ConfigError, match=rf"{name}: gs://b/x is an address"):
            cfg.validate(config)
        setattr(node, field, "")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["embed", "pictures", "--checkpoint", "c", "--out", "s3://b/x"], "--out"),
        (["embed", "pictures", "--checkpoint", "gs://b/x", "--out", "x"], "--checkpoint"),
        (["embed", "https://host/a.jpg", "--checkpoint", "c", "--out", "x"], "PATHS"),
        (["score", "pictures", "--checkpoint", "c", "--out", "s3://b/x.csv"], "--out"),
        (["score", "pictures", "--checkpoint", "c", "--out", "x.csv", "--sheet=s3://b/x.png"], "--sheet"),
        (["index", "s3://b/pictures", "--store", "s3://b/store", "--checkpoint", "c"], "PATHS"),
        (["index", "pictures", "--store", "s3://b/store", "--checkpoint", "s3://b/c"], "--checkpoint"),
        (["index", "pictures", "--store", "s", "--captions", "s3://b/c.json"], "--captions"),
        (["search", "--image", "https://host/a.jpg", "--store", "s"], "--image"),
        (["serve", "--store", "s", "--checkpoint", "s3://b/c"], "--checkpoint"),
        (["convert", "https://host/owner/name", "x"], "SOURCE"),
        (["convert", "file.pt", "hf://owner/name"], "DEST"),
        (["convert", "file.pt", "s3://b/x"], "DEST"),
        (["export", "s3://b/c", "--to", "hf"], "CHECKPOINT"),
        (["bundle", "--clip", "a", "--complexity", "b", "--out", "gs://b/x"], "--out"),
        (["calibrate", "b", "--budget", "0.7", "--images", "pictures", "gs://b/x"], "--images"),
        (["scenes", "s3://b/x.png"], "OUT"),
    ],
)
def test_a_command_refuses_before_it_reads_or_writes(words, option, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert f"error: {option}: " in (said := capsys.readouterr().err) and "is an address" in said


def test_the_library_refuses_too():
    with pytest.raises(checkpoint.CheckpointError, match="s3://b/c is an address"):
        checkpoint.find("s3://b/c")
    with pytest.raises(checkpoint.CheckpointError, match="s3:/b/c is an address"):
        checkpoint.write(Path("s3://b/c"), "clip", {}, {"x": np.zeros(1, np.float32)})
    with pytest.raises(cfg.ConfigError, match="s3://b/c is an address"):
        CorpusWriter("s3://b/c", {})
    with pytest.raises(ImageError, match="https://host/a.jpg is an address"):
        decode("https://host/a.jpg")
    with pytest.raises(cfg.ConfigError, match="https://host/a.jpg is an address"):
        ImagePaths(["https://host/a.jpg"])
