"""Parquet with image bytes, structs or paths: random access, missing columns, damage, and batches."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icar_jax.config import ConfigError, DataConfig, EvalConfig
from icar_jax.data import configured
from icar_jax.data.images import ImageError, Preprocess
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import train_batches
from icar_jax.data.sources import parquet
from icar_jax.data.sources.parquet import Parquet
from icar_jax.data.sources.shards import ShardError
from tests.support.shardfiles import picture

FILES, ROWS = 2, 9


def write(path, first=0, rows=ROWS, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + rows)
    columns = columns or {"image": [picture(n) for n in numbers], "caption": [f"picture {n}" for n in numbers]}
    pq.write_table(pa.table(columns), path, row_group_size=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parquet")
    for f in range(FILES):
        write(root / "train" / f"{f}.parquet", f * ROWS)
    write(root / "val" / "0.parquet", 100, 3)
    return root


def check(source, i, number=None):
    number = i if number is None else number
    record = source[i]
    assert record.captions == (f"picture {number}",)
    assert np.asarray(record.image()).shape == (12, 16, 3)
    return record


def test_every_row_in_any_order(root):
    source = Parquet(str(root), "train")
    assert len(source) == FILES * ROWS
    for i in [*range(18), *reversed(range(18)), 3, 17, 8, 9]:
        record = check(source, i)
        assert record.name == f"{i // ROWS}.parquet/{i % ROWS}"
    assert (np.asarray(source[5].image()) == np.asarray(Image.open(io.BytesIO(picture(5))))).all()
    with pytest.raises(IndexError):
        source[18]


def test_row_groups_are_kept_in_memory_up_to_a_limit(root, monkeypatch):
    source = Parquet(str(root), "train")
    reads = []
    read = source._read
    monkeypatch.setattr(source, "_read", lambda path, group: (reads.append(group), read(path, group))[1])
    for i in (0, 1, 2, 3, 0, 4):
        source[i]
    assert reads == [0, 1]
    source.cache_bytes = 1
    for i in (8, 8, 0, 0, 8):
        source[i]
    assert reads == [0, 1, 2, 0, 2] and len(source._cache) == 1


def test_forms_of_images_and_captions(tmp_path):
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(picture(n))
    struct = [
        {"bytes": picture(0), "path": None},
        {"bytes": None, "path": "pictures/1.png"},
        {"bytes": picture(2), "path": "x"},
    ]
    write(tmp_path / "0.parquet", image=struct, caption=[["picture 0"], ["picture 1"], ["picture 2"]])
    source = Parquet(str(tmp_path))
    for i in range(3):
        check(source, i)
    paths = pa.array([f"pictures/{n}.png" for n in range(3)]).dictionary_encode()
    nested = [[{"raw": f"picture {n}", "id": n}] for n in range(3)]
    write(tmp_path / "sub" / "0.parquet", file=paths, sentences=nested)  # relative to the root, not to the file's folder
    source = Parquet(str(tmp_path), "sub", "file", "sentences.raw")
    for i in range(3):
        check(source, i)
    write(tmp_path / "several" / "0.parquet", image=[picture(0)], caption=[["one", "", "two"]])
    assert Parquet(str(tmp_path), "several")[0].captions == ("one", "two")


def test_rows_without_image_or_caption_are_replaced_and_named(tmp_path):
    pictures = [picture(n) for n in range(8)] + [b"broken", None, picture(10)]
    write(tmp_path / "0.parquet", image=pictures, caption=[f"p {n}" for n in range(10)] + [None])
    source = Parquet(str(tmp_path))
    with pytest.raises(ImageError, match="0.parquet/9: no image in column 'image'"):
        source[9].image()
    with pytest.raises(ImageError, match="0.parquet/10: no caption in column 'caption'"):
        source[10].image()
    bad = BadFiles()
    with train_batches(source, Preprocess(8), None, batch_size=5, seed=0) as batches:
        for _ in range(8):
            batch = next(batches)
            bad.add(batch)
            assert max(batch["index"]) < 8
    assert set(bad.reasons) == {"0.parquet/8", "0.parquet/9", "0.parquet/10"}
    write(tmp_path / "gone" / "0.parquet", image=["nowhere.png"], caption=["x"])
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        Parquet(str(tmp_path), "gone")[0].image()


@pytest.mark.parametrize(
    "image, caption, message",
    [
        ("jpg", "caption", r"config.data.image_column='jpg': .*0.parquet has no such column; it has image \(binary\), caption"),
        ("image", "text", "config.data.caption_column='text': .*no such column"),
        ("caption", "image.raw", "config.data.caption_column='image.raw' .*expected text"),
        ("number", "caption", "config.data.image_column='number' .*expected bytes.* number"),
        ("image", "number", "config.data.caption_column='number' .*expected text"),
    ],
)
def test_invalid_columns(tmp_path, image, caption, message):
    write(tmp_path / "0.parquet", image=[picture(0)], caption=["x"], number=[1])
    with pytest.raises(ConfigError, match=message):
        Parquet(str(tmp_path), ".", image, caption)


def test_damaged_files_are_named(root, tmp_path):
    raw = (root / "train" / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(raw[:-20])
    with pytest.raises(ShardError, match=r"0\.parquet: not a complete Parquet file"):
        Parquet(str(tmp_path))
    write(tmp_path / "0.parquet", rows=0, image=pa.array([], pa.binary()), caption=pa.array([], pa.string()))
    with pytest.raises(ShardError, match="no rows"):
        Parquet(str(tmp_path))


def test_large_row_groups_are_warned_of(root, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "_LARGE_GROUP", 100)
    with caplog.at_level("WARNING"):
        Parquet(str(root), "train")
    assert "row_group_size=100" in caplog.text


def test_a_configuration(root):
    data = DataConfig(source="parquet", root=str(root), calibration_size=4)
    source = configured.train_source(data)
    assert len(source) == 14 and len(configured.calibration_source(data)) == 4
    assert len(configured.eval_source(data, EvalConfig(split="val"))) == 3
    assert configured.fingerprint(source) == configured.fingerprint(configured.train_source(data))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i].captions for i in range(14)] == [source[i].captions for i in range(14)]


@pytest.mark.check
def test_workers_change_nothing(root):
    source = Parquet(str(root), "train")
    streams = []
    for workers in (0, 2):
        with train_batches(source, Preprocess(8), None, batch_size=5, seed=2, num_workers=workers) as batches:
            streams.append([next(batches) for _ in range(5)])
    for a, b in zip(*streams, strict=True):
        assert all(a[key].tolist() == b[key].tolist() for key in a)
