"""Rated images: joined by name or URL, split without leaks, and stable when images are added."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.config import ConfigError, DataConfig, EvalConfig, ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.ratings.balance import balance
from icar_jax.data.ratings.sources import RatedFolder, by_hash, open_rated
from icar_jax.data.ratings.table import RatingsError
from tests.support import ratedfiles
from tests.support.shardfiles import picture, sample, write_shards, write_tar

TEST = EvalConfig(split="test")


def names(source):
    return [source[i].name for i in range(len(source))]


def parts(data):
    config = ExperimentConfig(task="complexity", data=data, eval=TEST)
    config.train.eval_split = "val"
    return {
        "train": configured.train_source(data),
        "val": configured.validation_source(config),
        "test": configured.eval_source(data, TEST),
        "calibration": configured.calibration_source(data),
    }


def test_ic9600_layout(tmp_path):
    root = ratedfiles.ic9600(tmp_path / "IC9600")
    found = {part: names(source) for part, source in parts(DataConfig(source="ratings", root=str(root))).items()}
    listed = {split: {line.rpartition("  ")[0] for line in (root / f"{split}.txt").read_text().splitlines()}
              for split in ("train", "test")}  # fmt: skip
    assert set(found["test"]) == listed["test"] and set(found["train"]) | set(found["val"]) == listed["train"]
    assert not set(found["train"]) & set(found["val"]) and found["calibration"] == found["val"] and found["val"]
    record = configured.eval_source(DataConfig(source="ratings", root=str(root)), TEST)[0]
    number = int(record.name.split()[0])
    assert record.complexity == pytest.approx(number / 49, abs=1e-6) and record.captions == ()
    assert abs(int(np.asarray(record.image())[0, 0, 0]) - 255 * number / 49) < 3


def test_a_val_file_is_used_where_there_is_one(tmp_path):
    root = ratedfiles.ic9600(tmp_path)
    lines = (root / "train.txt").read_text().splitlines(keepends=True)
    (root / "val.txt").write_text("".join(lines[:7]))
    with pytest.raises(RatingsError, match=r"val.txt: 7 images are also in train.txt, first "):
        open_rated(DataConfig(source="ratings", root=str(root)))
    (root / "train.txt").write_text("".join(lines[7:]))
    assert open_rated(DataConfig(source="ratings", root=str(root))).counts == {"train": 33, "val": 7, "test": 10}


def test_faults_stop_the_run_or_are_skipped(tmp_path):
    root = ratedfiles.ic9600(tmp_path)
    text = (root / "train.txt").read_text()
    (root / "train.txt").write_text(text + "gone.jpg  0.5\n")
    data = DataConfig(source="ratings", root=str(root))
    with pytest.raises(RatingsError, match=r"1 of 41 lines cannot be used \(1 missing image\)[^$]*line 41: gone.jpg: no such"):
        configured.train_source(data)
    data.bad_share = 0.03
    rated = open_rated(data)
    assert len(rated.source) == 50 and "skipped: 1 missing image" in rated.notes[0]


def test_a_broken_link_to_the_data_is_explained(tmp_path):
    ratedfiles.annotations(tmp_path)
    with pytest.raises(ConfigError, match="has no ratings.csv and no train.txt .*--config.data.ratings=FILE"):
        open_rated(DataConfig(source="ratings", root=str(tmp_path)))
    with pytest.raises(ConfigError, match="'labels.json' not found; did you mean .*labels.json"):
        open_rated(DataConfig(source="ratings", root=str(tmp_path), ratings="labels.json"))
    with pytest.raises(FileNotFoundError, match="ratings file .*gone.json not found"):
        open_rated(DataConfig(source="ratings", root=str(tmp_path), ratings="gone.json"))


def test_labels_are_split_by_hash(tmp_path):
    root = ratedfiles.annotations(tmp_path, 100)
    data = DataConfig(source="ratings", root=str(root), ratings=str(root / "labels.json"))
    found = {part: set(names(source)) for part, source in parts(data).items()}
    assert not found["train"] & found["val"] and not found["train"] & found["test"] and not found["val"] & found["test"]
    assert len(found["train"] | found["val"] | found["test"]) == 96, "undecided ones are left out"
    assert 50 < len(found["train"]) < 85 and found["calibration"] == found["val"]
    assert {record.complexity for record in map(configured.train_source(data).__getitem__, range(30))} == {0.0, 1.0}


@settings(max_examples=20, deadline=None)
@given(st.sets(st.text("abcdef", min_size=1, max_size=8), min_size=2, max_size=40), st.integers(1, 20))
def test_adding_images_moves_no_others(found, more):
    before = by_hash(RatedFolder("r", ".", sorted(found), np.zeros(len(found))), ())
    wider = sorted(found | {f"new {i}" for i in range(more)}, reverse=True)
    after = by_hash(RatedFolder("r", ".", wider, np.zeros(len(wider))), ())
    then, now = (dict(zip(r.source.names, r.split_of, strict=True)) for r in (before, after))
    assert then.items() <= now.items()


def test_shares_of_the_hash_split():
    many = by_hash(RatedFolder("r", ".", [f"{i}.jpg" for i in range(20_000)], np.zeros(20_000)), ()).counts
    assert many["train"] / 20_000 == pytest.approx(0.70, abs=0.01)
    assert many["val"] / 20_000 == pytest.approx(0.15, abs=0.01) == many["test"] / 20_000


def test_splits_that_would_leak_or_are_empty_are_refused(tmp_path):
    root = str(ratedfiles.ic9600(tmp_path))
    with pytest.raises(ConfigError, match="config.eval.split='val' is not held out: val is used"):
        configured.eval_source(DataConfig(source="ratings", root=root), EvalConfig(split="val"))
    with pytest.raises(ConfigError, match="config.data.train_split='train.test' trains on test"):
        configured.train_source(DataConfig(source="ratings", root=root, train_split="train+test"))
    with pytest.raises(ConfigError, match=r"no images in split 'heldout'; it has test \(10 images\), train"):
        configured.eval_source(DataConfig(source="ratings", root=root), EvalConfig(split="heldout"))
    config = ExperimentConfig(task="complexity", data=DataConfig(source="ratings", root=root))
    config.train.eval_split = "train"
    with pytest.raises(ConfigError, match="config.train.eval_split='train' is not held out"):
        configured.validation_source(config)


def test_the_fingerprint_follows_names_and_scores(tmp_path):
    root = ratedfiles.ic9600(tmp_path)
    data = DataConfig(source="ratings", root=str(root))
    before = configured.fingerprint(configured.train_source(data))
    assert before == configured.fingerprint(configured.train_source(data)) and set(before) > {"ratings_sha256"}
    first = configured.train_source(data)[0].name
    text = (root / "train.txt").read_text()
    line = next(line for line in text.splitlines() if line.startswith(first + "  "))
    (root / "train.txt").write_text(text.replace(line, f"{first}  0.123"))
    after = configured.fingerprint(configured.train_source(data))
    assert after["names_sha256"] == before["names_sha256"] and after["ratings_sha256"] != before["ratings_sha256"]


def url(n):
    return f"http://example.org/{n:06}"


def scores_file(path, numbers, extra=()):
    rows = "".join(f"{url(n)},{n / 100}\n" for n in numbers)
    path.write_text("url,score\n" + rows + "".join(f"http://gone.org/{n},0.5\n" for n in extra))
    return str(path)


def test_tar_shards_are_joined_by_url(tmp_path):
    write_shards(tmp_path / "shards", 3, 10)
    ratings = scores_file(tmp_path / "r.csv", range(29, 4, -1), extra=range(3))
    data = DataConfig(source="webdataset", root=str(tmp_path / "shards"), ratings=ratings)
    rated = open_rated(data)
    assert len(rated.source) == 25
    assert "30 images, 25 with a score; skipped: 5 images without a score, 3 scores without an image" in rated.notes[1]
    for i in range(25):
        record = rated.source[i]
        number = int(record.name[-6:])
        assert record.name == url(number) and record.complexity == pytest.approx(number / 100)
        expected = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        assert (np.asarray(record.image()) == expected).all(), "the picture is that of the URL"
    found = {part: names(source) for part, source in parts(data).items()}
    assert sorted(found["train"] + found["val"] + found["test"]) == [url(n) for n in range(5, 30)]
    again = pickle.loads(pickle.dumps(configured.train_source(data)))
    assert names(again) == found["train"], "as worker processes get it"


def test_numbers_in_other_shards_change_no_split(tmp_path):
    """The same images downloaded again, in other shards and order."""
    ratings = scores_file(tmp_path / "r.csv", range(20))
    write_shards(tmp_path / "a", 2, 10)
    for s, numbers in enumerate((range(19, 12, -1), range(12, -1, -1))):
        members = [m for k, n in enumerate(numbers) for m in sample_of(f"{s}{k:04}", n)]
        write_tar(tmp_path / "b" / f"{s:05}.tar", members)
    found = [open_rated(DataConfig(source="webdataset", root=str(tmp_path / d), ratings=ratings)) for d in "ab"]
    splits = [dict(zip(r.source.names, zip(r.split_of, r.source.scores.tolist()), strict=True)) for r in found]
    assert splits[0] == splits[1] and len(splits[0]) == 20


def sample_of(key, number):
    described = json.dumps({"url": url(number)}).encode()
    return [(f"{key}.jpg", picture(number)), (f"{key}.json", described)]


def test_samples_without_a_url_and_of_the_same_url(tmp_path):
    members = [*sample_of("a", 1), *sample_of("b", 1), *sample("c", picture(3), "x")]
    members += [("d.jpg", picture(4)), ("d.json", b"not json")]
    write_tar(tmp_path / "s" / "0.tar", members)
    ratings = scores_file(tmp_path / "r.csv", [1])
    rated = open_rated(DataConfig(source="webdataset", root=str(tmp_path / "s"), ratings=ratings))
    assert rated.source.names == [url(1)]
    left_out = "1 images without a score, 1 images without a URL, 1 images with a duplicate URL"
    assert f"skipped: {left_out}" in rated.notes[1]


def test_parquet_is_joined_by_url(tmp_path):
    (tmp_path / "p").mkdir()
    rows = {"image": [picture(n) for n in range(6)], "url": [url(n) for n in range(5)] + [None]}
    pq.write_table(pa.table(rows), tmp_path / "p" / "0.parquet", row_group_size=2)
    ratings = tmp_path / "r.parquet"
    pq.write_table(pa.table({"url": [url(4), url(2)], "score": [0.4, 0.2]}), ratings)
    data = DataConfig(source="parquet", root=str(tmp_path / "p"), ratings=str(ratings))
    source = open_rated(data).source
    assert source.names == [url(2), url(4)] and source.scores.tolist() == pytest.approx([0.2, 0.4])
    expected = np.random.default_rng(4).integers(0, 256, (12, 16, 3), np.uint8)
    assert (np.asarray(source[1].image()) == expected).all()
    pq.write_table(pa.table({"image": rows["image"]}), tmp_path / "p" / "0.parquet")
    with pytest.raises(ConfigError, match="no column 'url', which joins config.data.ratings; it has image"):
        open_rated(data)


def test_loose_files_are_joined_by_url(tmp_path):
    folder = tmp_path / "files" / "00000"
    folder.mkdir(parents=True)
    for n in range(8):
        (folder / f"{n:09}.jpg").write_bytes(picture(n))
        if n != 7:
            (folder / f"{n:09}.json").write_text(json.dumps({"url": url(7 - n)}))
    ratings = scores_file(tmp_path / "r.csv", range(5), extra=[1])
    data = DataConfig(source="ratings", root=str(tmp_path / "files"), ratings=ratings)
    rated = open_rated(data)
    assert rated.source.names == [f"00000/{n:09}.jpg" for n in range(3, 7)]
    assert rated.source.scores.tolist() == pytest.approx([0.04, 0.03, 0.02, 0.01]), "by URL, not by number"
    assert "1 images without a URL" in rated.notes[1] and "2 scores without an image" in rated.notes[1]


def test_shards_joined_by_file_name_or_with_nothing_in_common(tmp_path):
    write_shards(tmp_path / "s", 1, 3)
    (tmp_path / "r.csv").write_text("file,score\n000000,0.5\n")
    data = DataConfig(source="webdataset", root=str(tmp_path / "s"), ratings=str(tmp_path / "r.csv"))
    with pytest.raises(RatingsError, match="joined by URL, never by running number"):
        open_rated(data)
    (tmp_path / "r.csv").write_text("url,score\nhttp://other.org/x,0.5\n")
    with pytest.raises(RatingsError, match="No rated URL belongs to an image; first rated URL: http://other.org/x, first"):
        open_rated(data)


def test_balance():
    even = balance(np.array([0.0, 0.05, 0.1, 0.95, 1.0, 0.5]), "regression", 0.5, 6)
    assert even.counts == (2, 1, 0, 0, 0, 1, 0, 0, 0, 2) and even.larger_share == 0.5 and len(even.lines("none")) == 1
    assert even.lines("none") == [
        "6 training images, scores in tenths from 0 to 1: 2 1 0 0 0 1 0 0 0 2; the larger half of the scale has 50%"
    ]
    twice = balance(np.array([0, 0, 1.0]), "classification", 0.5, 3)
    assert twice.counts == (2, 1) and not twice.skewed
    more = balance(np.array([0, 0, 0, 0, 0, 1.0, 1.0]), "classification", 0.5, 70)
    first = more.lines("none")[0]
    assert more.skewed and first == "7 of 70 training images: 5 simple, 2 complex; the larger class has 71%"
    assert "Imbalance 2.5:1: set config.complexity.class_weights='balanced'" in more.lines("none")[1]
    assert "weights both classes equally" in more.lines("balanced")[1]
    assert balance(np.array([0.3, 0.6]), "classification", 0.7, 2).counts == (2, 0)
