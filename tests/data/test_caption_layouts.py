"""Captions as people have them: Karpathy's JSON elsewhere, tables of any separator, Flickr30k's files, texts beside images."""

import json
import logging

import pytest

from icar_jax import cli
from icar_jax import config as cfg
from icar_jax.config import ConfigError, DataConfig, DistractorConfig, EvalConfig
from icar_jax.data import configured
from icar_jax.data.distractors import distractor_source, source_urls
from icar_jax.data.records import record_names
from icar_jax.data.sources.caption_files import Columns
from icar_jax.data.sources.folders import CaptionFolder, read_captions
from icar_jax.errors import DataError
from icar_jax.search.captions import Captions
from tests.support.image_folders import put_images, put_karpathy


def captions_of(source):
    return {source[i].name: source[i].captions for i in range(len(source))}


@pytest.fixture
def photos(tmp_path):
    put_images(tmp_path / "photos", ["a.png", "b.png", "c.png"])
    return tmp_path / "photos"


def test_karpathy_with_a_byte_order_mark(photos):
    put_karpathy(photos, [("a.png", "test", ["one"], {})])
    file = photos / "dataset_tiny.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert captions_of(CaptionFolder(photos, "test")) == {"a.png": ("one",)}


def test_karpathy_apart_from_its_images(photos, tmp_path):
    (tmp_path / "notes").mkdir()
    put_karpathy(tmp_path / "notes", [("a.png", "test", ["one"], {})], "dataset_coco.json")
    put_karpathy(tmp_path / "notes", [("b.png", "test", ["two"], {})], "mine.json")
    for root, file in ((photos, tmp_path / "notes" / "mine.json"), ("", tmp_path / "notes" / "mine.json")):
        data = DataConfig(source="folder", root=str(root), json=str(file), images=str(photos))
        assert captions_of(configured.eval_source(data, EvalConfig(split="test"))) == {"b.png": ("two",)}
    assert captions_of(CaptionFolder(tmp_path / "notes", "test", images=photos)) == {"a.png": ("one",)}
    with pytest.raises(
        FileNotFoundError, match=r"config\.data\.json='no\.json' not found; .* has dataset_coco\.json, mine\.json"
    ):
        CaptionFolder(tmp_path / "notes", "test", captions="no.json", images=photos)


def test_a_caption_file_is_for_folders_only(photos):
    for name, config in (
        ("config.data.json", cfg.ExperimentConfig(data=DataConfig(source="webdataset", root="x", json="y"))),
        ("config.eval.distractors.images", cfg.ExperimentConfig(
            eval=EvalConfig(distractors=DistractorConfig(source="parquet", root="x", images="y")))),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name}='y' is for .*source='folder' only"):
            cfg.validate(config)
    apart = DataConfig(source="folder", json="a.json", images="b")
    assert cfg.validate(cfg.ExperimentConfig(data=apart)).data.root == ""


SEPARATORS = {",": '"red, and blue"', "\t": "red, and blue", ";": "red, and blue", "|": "red, and blue"}


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv", "captions.txt"])
def test_tables_of_any_separator(photos, separator, name):
    header = separator.join(["\ufeffimage", " caption", "split"])
    (photos / name).write_text(f"{header}\na.png{separator}{SEPARATORS[separator]}{separator}test\n", encoding="utf-8")
    assert captions_of(CaptionFolder(photos, "test")) == {"a.png": ("red, and blue",)}


def test_columns_of_other_names(photos):
    (photos / "captions.csv").write_text("filepath\ttitle\tcaption\na.png\tone\tx\n")
    assert captions_of(CaptionFolder(photos, columns=Columns("filepath", "title"))) == {"a.png": ("one",)}
    data = DataConfig(source="folder", root=str(photos), image_column="filepath", caption_column="title")
    assert captions_of(configured.open_split(data, None)) == {"a.png": ("one",)}
    assert read_captions(photos / "captions.csv", Columns("filepath", "title"))[1] == {"a.png": ("one",)}
    with pytest.raises(DataError, match=r"file or image, and caption, .*found filepath, title, caption \(separated by tabs\).*"
                       r"config\.data\.image_column.*--caption-column"):  # fmt: skip
        CaptionFolder(photos)
    (photos / "captions.csv").unlink()
    (photos / "captions.jsonl").write_text(json.dumps({"file": "a.png", "text": ["one", "two"]}) + "\n")
    assert captions_of(CaptionFolder(photos, columns=Columns(caption="text"))) == {"a.png": ("one", "two")}
    with pytest.raises(DataError, match="`file` or `image`, and `caption`, found"):
        CaptionFolder(photos)


def test_captions_of_a_store(photos):
    (photos / "mine.csv").write_text("filepath;title\na.png;one\n")
    (photos / "b.txt").write_text("two\n")
    path = str(photos / "a.png")
    assert Captions(photos / "mine.csv", [str(photos)], Columns("filepath", "title")).get(path) == "one"
    assert Captions(photos, [str(photos)]).get(str(photos / "b.png")) == "two"


def test_index_names_the_columns(photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["index", str(photos), "--store", str(tmp_path / "store"), "--caption-column", "title"])
    assert "--image-column and --caption-column without --captions" in capsys.readouterr().err


FLICKR = {
    "results_20130124.token": 'a.png#0\tA " big " dog\na.png#1\tOne | two\nb.png#0\tThree , four\n',
    "results.csv": "image_name| comment_number| comment\n"
    'a.png| 0| A " big " dog\na.png| 1   One | two\nb.png| 0| Three , four\n',
}


@pytest.mark.parametrize("name", FLICKR)
@pytest.mark.parametrize("images", ["flickr30k_images", "flickr30k-images", "."])
def test_flickr30k_as_it_is_released(tmp_path, name, images):
    put_images(tmp_path / images, ["a.png", "b.png"])
    (tmp_path / name).write_text(FLICKR[name])
    expected = {"a.png": ('A " big " dog', "One | two"), "b.png": ("Three , four",)}
    assert captions_of(CaptionFolder(tmp_path)) == expected
    assert read_captions(tmp_path / name)[1] == expected
    put_karpathy(tmp_path, [("a.png", "test", ["one"], {})], "dataset_flickr30k.json")  # which then counts
    assert captions_of(CaptionFolder(tmp_path, "test")) == {"a.png": ("one",)}


def test_a_wrong_line_of_flickr30k_is_named(photos):
    (photos / "x.token").write_text("a.png#0\tone\nb.png two\n")
    with pytest.raises(DataError, match=r"x\.token, line 2: expected `NAME\.jpg#0<tab>caption`"):
        CaptionFolder(photos)


@pytest.fixture
def downloaded(tmp_path):
    """What img2dataset writes with --output_format files."""
    put_images(tmp_path / "00000", ["000000000.png", "000000001.png", "000000002.png"])
    for i in range(2):
        (tmp_path / "00000" / f"00000000{i}.txt").write_text(f"picture {i}\nof two lines")
        described = {"url": f"https://example.org/{i}.jpg", "caption": "x", "status": "success"}
        (tmp_path / "00000" / f"00000000{i}.json").write_text(json.dumps(described))
    (tmp_path / "00000" / "000000002.json").write_text(json.dumps({"caption": "picture 2", "url": None}))
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    return tmp_path


def test_files_of_img2dataset(downloaded):
    source = CaptionFolder(downloaded)
    assert captions_of(source) == {
        "00000/000000000.png": ("picture 0\nof two lines",),
        "00000/000000001.png": ("picture 1\nof two lines",),
        "00000/000000002.png": ("picture 2",),
    }
    assert source.urls() == ["https://example.org/0.jpg", "https://example.org/1.jpg", None]
    far = distractor_source(DistractorConfig(source="folder", root=str(downloaded), size=2), DataConfig())
    assert record_names(far) == ["00000/000000000.png", "00000/000000001.png"]
    assert source_urls(far) == ["https://example.org/0.jpg", "https://example.org/1.jpg"]


def test_a_text_beside_each_image(photos, caplog):
    (photos / "a.txt").write_text("one\n\n two \n", encoding="utf-8-sig")
    (photos / "b.txt").write_bytes("café".encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        source = CaptionFolder(photos)
    assert captions_of(source) == {"a.png": ("one", "two")} and source.uncaptioned == ["b.png", "c.png"]
    assert "1 texts beside images cannot be used: b.txt: 'utf-8' codec" in caplog.text
    assert read_captions(photos)[1] == {"a.png": ("one", "two")}
    assert set(captions_of(CaptionFolder(photos, "train+val" if "val" in source.splits else "train"))) <= {"a.png"}


def test_folders_of_splits(tmp_path):
    put_images(tmp_path, ["train/a.png", "val/b.png", "test/c.png"])
    for name in ("train/a", "val/b", "test/c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert captions_of(CaptionFolder(tmp_path, "test")) == {"test/c.png": ("test/c",)}
    assert CaptionFolder(tmp_path, "train").splits == {"train": 1, "val": 1, "test": 1}
