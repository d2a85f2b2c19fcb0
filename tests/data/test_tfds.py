"""TFDS data sets as ArrayRecord: no TensorFlow, random access, nested captions, overlapping splits, damage."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from icar_jax.config import ConfigError, DataConfig, EvalConfig
from icar_jax.data import configured
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.batches import train_batches
from icar_jax.data.sources import shards
from icar_jax.data.sources.shards import ShardError
from icar_jax.data.sources.tfds import Tfds
from tests.support.shardfiles import picture, write_array_records

CAPTIONS = "captions.text"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_array_records(tmp_path_factory.mktemp("tfds"), "tiny_captions", {"train": [6, 5], "val": [4]})


def test_every_example_in_any_order(root):
    source = Tfds("tiny_captions", str(root), "train", "image", CAPTIONS)
    assert len(source) == 11 and source.name == "tiny_captions/train"
    for i in [*range(11), *reversed(range(11))]:
        record = source[i]
        assert record.captions == (f"picture {i}", f"number {i}")[: 1 + i % 2]
        assert record.name == f"tiny_captions-train.array_record-{i // 6:05}-of-00002/{i % 6}"
        assert (np.asarray(record.image()) == np.asarray(Image.open(io.BytesIO(picture(i))))).all()
    with pytest.raises(IndexError):
        source[11]


def test_parts_of_splits(root):
    make = lambda split: Tfds("tiny_captions", str(root), split, "image", CAPTIONS)
    both, late = make("train+val"), make("train[50%:]")
    assert [both[i].captions[0] for i in range(15)] == [f"picture {i}" for i in range(15)]
    early = make("train[:50%]")
    assert len(early) + len(late) == 11 and late[0].captions[0] == f"picture {len(early)}"
    assert not early.overlaps(late) and early.overlaps(make("train")) and not make("val").overlaps(make("train"))
    assert late[0].name == make("train")[len(early)].name
    assert len({*early.shards.labels, *late.shards.labels}) == len(early.shards.labels) + len(late.shards.labels)


def test_no_tensorflow(root):
    code = (
        "import sys\n"
        "from icar_jax.data.sources.tfds import Tfds\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"print(Tfds('tiny_captions', {str(root)!r}, 'val', 'image', 'captions.text')[1].image().size)\n"
        "print(sorted({'tensorflow', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(16, 12)\n[]\n", done.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "other"}, "no prepared data set at .*other .the root contains tiny_captions.*tfds build other"),
        ({"dataset": "tiny_captions:9.9.9"}, "cannot be opened: .*; available: tiny_captions/1.0.0"),
        ({"split": "test"}, r"no split 'test'; it has train \(11\), val \(4\)"),
        (
            {"image_column": "picture"},
            "image_column='picture': .*expected one of captions.id, captions.text, image, image/filename",
        ),
        ({"caption_column": "captions.raw"}, "caption_column='captions.raw': .*expected one of"),
    ],
)
def test_missing_data_sets_splits_and_features(root, options, message):
    wanted = {"dataset": "tiny_captions", "root": str(root), "split": "train", "caption_column": CAPTIONS} | options
    with pytest.raises(ConfigError, match=message):
        Tfds(**wanted)


def test_formats_without_random_access_are_refused(tmp_path):
    write_array_records(tmp_path, "tiny", {"train": [1]})
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord", 1))
    with pytest.raises(ConfigError, match="stored as tfrecord, .*--file_format=array_record"):
        Tfds("tiny", str(tmp_path), "train", "image", CAPTIONS)


def test_missing_and_damaged_files_are_retried_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FIRST_PAUSE_S", 0.0)
    write_array_records(tmp_path, "tiny", {"train": [3, 2]})
    source = Tfds("tiny", str(tmp_path), "train", "image", CAPTIONS)
    second = next((tmp_path / "tiny" / "1.0.0").glob("*-00001-of-*"))
    aside = second.rename(second.with_suffix(".aside"))
    assert source[0].captions
    with shards.retrying(2) as retried, pytest.raises(ShardError, match=r"00001-of-00002: .*No such file.*3 tries"):
        source[4]
    assert [name for name, _ in retried] == [str(second)] * 2
    aside.rename(second)
    assert source[4].captions == ("picture 4",)  # the readers are reopened


def test_a_configuration(root):
    data = DataConfig(source="tfds", dataset="tiny_captions", root=str(root), caption_column=CAPTIONS, calibration_size=3)
    source = configured.train_source(data)
    assert len(source) == 8 and len(configured.calibration_source(data)) == 3
    assert len(configured.eval_source(data, EvalConfig(split="val"))) == 4
    assert configured.fingerprint(source) == configured.fingerprint(configured.train_source(data))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i].name for i in range(8)] == [source[i].name for i in range(8)]


@pytest.mark.check
def test_workers_change_nothing(root):
    source = Tfds("tiny_captions", str(root), "train", "image", CAPTIONS)
    streams = []
    for workers in (0, 2):
        with train_batches(source, Preprocess(8), None, batch_size=3, seed=2, num_workers=workers) as batches:
            streams.append([next(batches) for _ in range(5)])
    for a, b in zip(*streams, strict=True):
        assert all(a[key].tolist() == b[key].tolist() for key in a)


@pytest.mark.parametrize(
    "train, held_out", [("train", "train[:10%]"), ("train[:60%]", "train[50%:]"), ("train", "val+train[3:4]")]
)
def test_overlapping_parts_are_refused(root, train, held_out):
    data = DataConfig(source="tfds", dataset="tiny_captions", root=str(root), train_split=train, caption_column=CAPTIONS)
    with pytest.raises(ConfigError, match="not held out"):
        configured.eval_source(data, EvalConfig(split=held_out))


def test_parts_that_do_not_overlap_are_accepted(root):
    data = DataConfig(
        source="tfds", dataset="tiny_captions", root=str(root), train_split="train[:50%]", caption_column=CAPTIONS
    )
    assert len(configured.eval_source(data, EvalConfig(split="train[50%:]"))) in (5, 6)
