"""Labels are joined by URL or name, never by number; distractors that are also queries are refused."""

import json

import numpy as np
import pytest

from icar_jax.config import ConfigError, DataConfig, DistractorConfig
from icar_jax.data.distractors import distractor_source, require_apart, source_urls
from icar_jax.data.ratings.labels import merge_labels, read_labels
from icar_jax.data.records import Source, Subset


def write(path, value):
    path.write_text(json.dumps(value) if not isinstance(value, str) else value)
    return path


def test_labels_join_by_url_name_and_last_part(tmp_path):
    table = {"http://a/1.jpg": ["cat"], "val/2.jpg": {"categories": ["dog", 7]}, "3.jpg": ["sky"], "9.jpg": ["none"]}
    table = read_labels(write(tmp_path / "labels.json", table))
    names, urls = ["x/1.jpg", "val/2.jpg", "val/3.jpg", "val/4.jpg"], ["http://a/1.jpg", None, None, None]
    labels, note = merge_labels(names, urls, table, "labels.json")
    assert labels == [("cat",), ("dog", "7"), ("sky",), ()]
    assert note == "labels.json: 3 of 4 images have labels; 1 entries match no image"
    # A failed download does not shift the labels of other images.
    assert merge_labels(names[1:], urls[1:], table, "")[0] == labels[1:]
    assert merge_labels(names[1:], None, table, "")[0] == labels[1:]


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        (["a/1.jpg", "b/1.jpg"], {"1.jpg": ("x",)}, r"'1.jpg' matches 2 images.*'a/1.jpg'"),
        (["a.jpg"], {"0": ("x",), "laion_00000001": ("x",)}, r"none of its 2 entries \(first: '0'\).*a.jpg.*Running numbers"),
        (["a.jpg"], {"b.jpg": ("x",)}, r"none of its 1 entries.*first: 'a.jpg'\)\.$"),
        (["a.jpg"], {}, r"none of its 0 entries"),
    ],
)
def test_labels_that_cannot_be_joined_are_named(names, table, message):
    with pytest.raises(ConfigError, match=message):
        merge_labels(names, None, table, "labels.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "found a list"),
        ("{", "not valid JSON"),
        ('{"a": "cat"}', r"entry 'a': expected a list of labels.*'cat'"),
        ('{"a": {"labels": []}}', r"entry 'a'"),
        (None, "cannot be read: No such file"),
    ],
)
def test_bad_label_files_are_named(tmp_path, text, message):
    path = tmp_path / "labels.json"
    if text is not None:
        write(path, text)
    with pytest.raises(ConfigError, match=message):
        read_labels(path)


class Named(Source):
    """A source with names and optional URLs."""

    def __init__(self, name, names, urls=None):
        self.name, self.names = name, names
        if urls is not None:
            self.urls = lambda: urls

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        raise AssertionError("no record is read")


class Sharded(Source):
    """A source of shards."""

    def __init__(self, name, paths, urls=None):
        self.name, self.paths = name, paths
        self.urls = lambda: urls or [None, None]

    def __len__(self):
        return 2

    def __getitem__(self, i):
        raise AssertionError("no record is read")


def apart(base, far):
    return require_apart(base, far, source_urls(base), source_urls(far))


def test_shared_images_are_refused():
    base = Named("coco/test", ["a.jpg", "b.jpg"], ["http://x/a.jpg", None])
    with pytest.raises(ConfigError, match=r"1 names of web are also in the evaluated coco/test.*b.jpg"):
        apart(base, Named("web", ["b.jpg", "c.jpg"]))
    with pytest.raises(ConfigError, match=r"1 URLs of laion .*http://x/a.jpg"):
        apart(base, Sharded("laion", ["/s/0.tar"], ["http://x/a.jpg", "http://y/z.jpg"]))
    shards = Sharded("laion", ["/s/0.tar", "/s/1.tar"])
    with pytest.raises(ConfigError, match=r"1 shard files of laion .*/s/1.tar"):
        apart(shards, Subset(Sharded("laion", ["/s/1.tar"]), [0], "laion"))
    compared = ["no distractor is also in coco/test (compared: names)"]
    assert apart(base, Named("web", ["c.jpg"])) == compared
    # Only the records of a subset count.
    assert apart(base, Subset(Named("web", ["c.jpg", "b.jpg"]), [0], "web")) == [
        "no distractor is also in coco/test (compared: names)"
    ]
    assert source_urls(Subset(Sharded("laion", [], ["http://1", "http://2"]), [1], "laion")) == ["http://2"]


def test_what_cannot_be_checked_is_reported():
    base = Named("coco/test", ["val/a.jpg", "b.jpg"])
    (note,) = apart(base, Sharded("laion", ["/s/0.tar"], ["http://x/a.jpg?w=3", "http://y/z.jpg"]))
    assert note.startswith("1 distractors have URLs that end in the name of an image of coco/test (http://x/a.jpg?w=3)")
    (note,) = apart(base, Sharded("laion", ["/s/0.tar"]))
    assert "could not check whether" in note
    (note,) = apart(base, Sharded("laion", ["/s/0.tar"], ["http://y/y.jpg", None]))
    assert note == "no distractor is also in coco/test (compared: file names in URLs)"


def test_scenes_as_distractors():
    far = distractor_source(DistractorConfig("scenes", split="test", size=6), DataConfig(scenes_pixels=32))
    base = distractor_source(DistractorConfig("scenes", split="val", size=4), DataConfig(scenes_pixels=32))
    assert len(far) == 6 and far[0].name.startswith("scenes/test") and far[0].labels
    assert apart(base, far) == ["no distractor is also in scenes/val (compared: names)"]
    with pytest.raises(ConfigError, match="1 names of scenes/val are also in the evaluated scenes/val"):
        apart(base, base)


def test_folder_as_distractors(tmp_path):
    from PIL import Image

    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"file": f"{i}.png", "caption": f"grey {i}", "split": "ab"[i % 2]} for i in range(4)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DistractorConfig("folder", root=str(tmp_path))
    assert len(distractor_source(config, DataConfig())) == 4
    config.size = 3
    assert distractor_source(config, DataConfig()).names == ["0.png", "1.png", "2.png"]
    config.split = "b"
    with pytest.raises(ConfigError, match=r"distractors.size=3, but .*/b holds 2 images"):
        distractor_source(config, DataConfig())
