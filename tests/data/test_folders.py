"""Folder sources: reading, warnings and errors, and splits by name."""

import json

import numpy as np
import pytest

from icar_jax.data.records import Source, Subset, calibration_split, record_names
from icar_jax.data.sources.folders import CaptionFolder
from tests.support.image_folders import put_images, put_karpathy


@pytest.fixture
def karpathy(tmp_path):
    put_images(tmp_path / "images", ["a.png", "b.png", "c.png"])
    put_karpathy(
        tmp_path,
        [("a.png", "train", ["one", "uno "], {}), ("b.png", "train", ["two"], {}), ("c.png", "val", ["three"], {})],
    )
    return tmp_path


def test_karpathy(karpathy):
    train = CaptionFolder(karpathy, "train")
    assert isinstance(train, Source) and len(train) == 2 and train.splits == {"train": 2, "val": 1}
    assert train[0].name == "a.png" and train[0].captions == ("one", "uno") and train.name.endswith("/train")
    assert train[1].image().size == (12, 8)
    assert record_names(CaptionFolder(karpathy, "train+val")) == ["a.png", "b.png", "c.png"]
    assert len(CaptionFolder(karpathy, None)) == 3
    assert not train.missing and not train.uncaptioned
    with pytest.raises(IndexError):
        train[2]
    with pytest.raises(ValueError, match=r"no split 'test'; it has train \(2 images\), val \(1 images\)"):
        CaptionFolder(karpathy, "test")


def test_images_next_to_the_json_and_coco_subfolders(tmp_path):
    put_images(tmp_path, ["val2014/x.jpg", "y.jpg"])
    put_karpathy(tmp_path, [("x.jpg", "val", ["x"], {"filepath": "val2014"}), ("y.jpg", "val", ["y"], {"filepath": "val2014"})])
    assert record_names(CaptionFolder(tmp_path, "val")) == ["val2014/x.jpg", "y.jpg"]


def test_missing_and_uncaptioned_files_are_counted(karpathy):
    put_images(karpathy / "images", ["extra.png"])
    put_karpathy(
        karpathy,
        [
            ("a.png", "train", ["one"], {}),
            ("gone.png", "train", ["?"], {}),
            ("b.png", "train", [" "], {}),
            ("c.png", "val", ["3"], {}),
        ],
    )
    source = CaptionFolder(karpathy, "train")
    assert source.names == ["a.png"] and source.missing == ["gone.png"] and source.uncaptioned == ["b.png", "extra.png"]


def test_all_files_missing_is_an_error(karpathy):
    put_karpathy(karpathy, [("no.png", "train", ["one"], {})])
    with pytest.raises(FileNotFoundError, match=r"none of the 1 captioned files.*no\.png"):
        CaptionFolder(karpathy, "train")


def test_wrong_folders(tmp_path, karpathy):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CaptionFolder(tmp_path / "absent", None)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="is empty"):
        CaptionFolder(empty, "train")
    (empty / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"expected .*found notes\.txt"):
        CaptionFolder(empty, "train")
    (empty / "captions.csv").write_text("file,caption\na.png,one\n")
    with pytest.raises(FileNotFoundError, match="no image files"):
        CaptionFolder(empty)
    put_karpathy(karpathy, [("a.png", "train", ["one"], {})], "dataset_second.json")
    with pytest.raises(
        ValueError,
        match="several caption files, dataset_second.json, dataset_tiny.json; choose one.*config.data.json=dataset_second.json",
    ):
        CaptionFolder(karpathy, "train")
    assert len(CaptionFolder(karpathy, "train", captions="dataset_second.json")) == 1
    (karpathy / "captions.csv").write_text("file,caption\n")
    with pytest.raises(ValueError, match="several caption files"):
        CaptionFolder(karpathy, "train")


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"images": [{"filename": "a.png"}]}', '{"images": [{"filename": 3, "sentences": []}]}']
)
def test_malformed_karpathy(karpathy, text):
    (karpathy / "dataset_tiny.json").write_text(text)
    with pytest.raises(ValueError, match=r"dataset_tiny\.json"):
        CaptionFolder(karpathy, "train")


@pytest.fixture
def plain(tmp_path):
    put_images(tmp_path, ["a.png", "sub/b.PNG"])
    return tmp_path


def test_csv(plain):
    text = '\ufefffile,caption,split,licence\na.png,"one, first",train,x\n./sub/b.PNG,two,val,x\n'
    text += 'a.png,"second\nline",train,x\n'
    (plain / "captions.csv").write_text(text, encoding="utf-8")
    source = CaptionFolder(plain, None)
    assert isinstance(source, CaptionFolder) and source.names == ["a.png", "sub/b.PNG"]
    assert source[0].captions == ("one, first", "second\nline")
    assert record_names(CaptionFolder(plain, "val")) == ["sub/b.PNG"]


def test_jsonl(plain):
    lines = [
        {"file": "a.png", "caption": "one"},
        {"file": "sub/b.PNG", "caption": ["two", "2"]},
        {"file": "a.png", "caption": "uno"},
    ]
    (plain / "captions.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    source = CaptionFolder(plain)
    assert [source[i].captions for i in range(2)] == [("one", "uno"), ("two", "2")]
    # Without splits the names decide; both of these are in 'train'.
    assert CaptionFolder(plain, "train").names == ["a.png", "sub/b.PNG"]
    with pytest.raises(ValueError, match=r"no split 'val'; it has train \(2 images\)"):
        CaptionFolder(plain, "val")
    (plain / "captions.csv").write_text("file,caption\na.png,x\n")
    with pytest.raises(ValueError, match="several caption files, captions.csv, captions.jsonl; choose one"):
        CaptionFolder(plain)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("captions.csv", "image,text\na.png,one\n", "line 1: expected a header"),
        ("captions.csv", "", "line 1: expected a header"),
        ("captions.csv", "file,caption\n", "contains no captions"),
        ("captions.csv", "file,caption\na.png,one\na.png\n", "line 3: expected 2 columns"),
        ("captions.csv", "file,caption\na.png,one, two\n", "line 2: .*double quotes"),
        ("captions.csv", "file,caption\n,one\n", "line 2: expected a file name"),
        ("captions.csv", 'file,caption\na.png,"one\n', "not readable as UTF-8 CSV"),
        (
            "captions.csv",
            "file,caption,split\na.png,one,train\na.png,two,val\n",
            "line 3: a.png is in split 'val', but in 'train' at line 2",
        ),
        ("captions.jsonl", '{"file": "a.png", "caption": "one"}\n{"file": \n', "line 2: not valid JSON"),
        ("captions.jsonl", '{"file": "a.png"}\n', "line 1: expected an object"),
        ("captions.jsonl", '["a.png", "one"]\n', "line 1: expected an object"),
        ("captions.jsonl", '{"file": "a.png", "caption": 3}\n', "line 1: expected a caption"),
        ("captions.jsonl", '{"file": "a.png", "caption": "x", "split": 3}\n', "line 1: expected a split name"),
    ],
)
def test_malformed_lines_are_named(plain, name, text, message):
    (plain / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        CaptionFolder(plain)


def test_latin_1_text_is_refused(plain):
    (plain / "captions.csv").write_bytes("file,caption\na.png,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        CaptionFolder(plain)


NAMES = [f"{i:04}.jpg" for i in range(1000)]


def test_calibration_split_is_disjoint_and_stable():
    train, calibration = calibration_split(NAMES, size=200, seed=1)
    assert not set(train) & set(calibration) and len(train) + len(calibration) == 1000 and len(calibration) == 200
    assert (calibration_split(NAMES, size=200, seed=1)[1] == calibration).all()
    assert (calibration_split(NAMES, size=200, seed=2)[0][:100] != train[:100]).any()
    chosen = {NAMES[i] for i in calibration}
    backwards = calibration_split(NAMES[::-1], size=200, seed=1)[1]
    assert {NAMES[::-1][i] for i in backwards} == chosen
    more = [*NAMES, *(f"new{i}.jpg" for i in range(50))]
    kept = {more[i] for i in calibration_split(more, size=200, seed=1)[1]} & set(NAMES)
    assert kept <= chosen and len(chosen) - len(kept) <= 50


def test_wrong_splits():
    for size in (0, 1000, -3):
        with pytest.raises(ValueError, match="must lie"):
            calibration_split(NAMES, seed=0, size=size)
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        calibration_split(["a", "b", "a"], seed=0, size=1)


def test_subset(karpathy):
    source = CaptionFolder(karpathy, None)
    subset = Subset(source, np.array([2, 0]), "part")
    assert isinstance(subset, Source) and len(subset) == 2 and record_names(subset) == ["c.png", "a.png"]
    with pytest.raises(IndexError):
        subset[2]
    for wrong in ([], [3], [-1]):
        with pytest.raises(ValueError, match="subset 'part'"):
            Subset(source, wrong, "part")
