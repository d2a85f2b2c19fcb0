"""Released labels: ids of Karpathy's JSON, of a manifest, and complexity labels by URL, joined and written by `icar labels`."""

import json

import pytest

from icar_jax import cli
from icar_jax.config import ConfigError
from icar_jax.data.ratings.labels import merge_labels, read_labels
from icar_jax.data.ratings.released import join_labels
from icar_jax.data.ratings.table import read_ratings


def put(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def coco(tmp_path):
    images = [
        {"filename": f"COCO_val2014_{cocoid:012}.jpg", "filepath": "val2014", "imgid": imgid, "cocoid": cocoid, "split": split,
         "sentences": [{"raw": "x"}]}
        for imgid, cocoid, split in ((7, 391895, "test"), (8, 522418, "val"), (9, 184613, "test"))
    ]  # fmt: skip
    return put(tmp_path / "dataset_coco.json", {"images": images})


@pytest.mark.parametrize(
    "by, split, keys",
    [("imgid", None, ("7", "9")), ("imgid", "test", ("7", "9")), ("cocoid", "test", ("391895", "000000184613")),
     ("cocoid", None, ("COCO_val2014_000000391895", "184613")), ("index", "test", ("0", "1")), ("index", None, ("0", "2")),
     ("index", None, ("flickr_00000000", "flickr_00000002"))],
)  # fmt: skip
def test_ids_of_karpathys_json(coco, tmp_path, capsys, by, split, keys):
    table = {keys[0]: {"labels": ["cat", "dog"]}, keys[1]: {"categories": []}, "99": ["no image"]}
    released, out = put(tmp_path / "released.json", table), tmp_path / "labels.json"
    arguments = ["labels", str(released), "--captions", str(coco), "--by", by, "--out", str(out)]
    cli.main([*arguments, *(["--split", split] if split else [])])
    said = capsys.readouterr().out
    assert "2 of 3 entries joined with" in said and "1 stand for no image there: 99; 1 of them have no category" in said
    names = ["val2014/COCO_val2014_000000391895.jpg", "val2014/COCO_val2014_000000184613.jpg"]
    assert merge_labels(names, None, read_labels(out), "labels")[0] == [("cat", "dog"), ()]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "exists; pass --overwrite" in capsys.readouterr().err


MANIFESTS = {
    "manifest.tsv": 'laion_00000012\thttps://a.org/x.jpg?a=1\tA "cat\nlaion_00000040\thttps://b.org/y\t\n',
    "manifest2.tsv": "id\turl\tlocal\n3\thttps://a.org/x.jpg?a=1\timages/laion_00000012.jpg\n"
                     "4\thttps://b.org/y\timages/laion_00000040.jpg\n",
    "url_to_local.json": json.dumps(
        {"https://a.org/x.jpg?a=1": "images/laion_00000012.jpg", "https://b.org/y": "laion_00000040"}
    ),
    "local_to_url.json": json.dumps({"laion_00000012": "https://a.org/x.jpg?a=1", "laion_00000040": {"url": "https://b.org/y"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_ids_of_a_manifest(tmp_path, name):
    manifest = put(tmp_path / name, MANIFESTS[name])
    entries = [
        {"id": "laion_00000012", "labels": ["cat"]},
        {"id": "laion_00000040", "labels": [3]},
        {"id": "laion_00000041", "labels": []},
    ]
    joined = join_labels(put(tmp_path / "released.json", entries), manifest=manifest)
    assert json.loads(joined.text) == {"https://a.org/x.jpg?a=1": ["cat"], "https://b.org/y": ["3"]}
    assert "2 of 3 entries joined" in joined.report and "1 stand for no image there: laion_00000041" in joined.report


def test_an_id_with_two_urls(tmp_path):
    manifest = put(tmp_path / "m.tsv", "laion_00000001\thttps://a.org\nlaion_00000001\thttps://b.org\n")
    with pytest.raises(ConfigError, match="laion_00000001 has two URLs, https://a.org and https://b.org"):
        join_labels(put(tmp_path / "l.json", {"laion_00000001": ["cat"]}), manifest=manifest)


def test_complexity_labels_by_url(tmp_path, capsys):
    table = {"https://a.org/1.jpg": 1, "https://a.org/2.jpg": -1, "https://a.org/3.jpg": 0}
    released, out = put(tmp_path / "icc.json", table), tmp_path / "ratings.csv"
    cli.main(["labels", str(released), "--out", str(out)])
    assert "3 of 3 entries joined; 1 undecided (label -1) dropped" in capsys.readouterr().out
    assert out.read_text() == "url,score\nhttps://a.org/1.jpg,1\nhttps://a.org/3.jpg,0\n"
    for file in (out, released):  # and training reads the released file as it is
        ratings = read_ratings(file)
        assert ratings.key == "url" and ratings.scores == {"https://a.org/1.jpg": 1.0, "https://a.org/3.jpg": 0.0}
    assert read_ratings(released).undecided == 1
    with pytest.raises(SystemExit):
        cli.main(["labels", str(released), "--out", str(tmp_path / "x.json")])
    assert "complexity labels are written as .csv" in capsys.readouterr().err
    assert join_labels(put(tmp_path / "f.json", {"a.jpg": 1})).text == "file,score\na.jpg,1\n"


@pytest.mark.parametrize(
    "table, options, message",
    [
        ({"1": ["cat"]}, {"by": "imgid"}, "imgid among|none of its 1 entries .*by imgid; try another --by"),
        ({"7": ["cat"]}, {}, "--captions needs --by"),
        ({"7": ["cat"], "07": ["dog"]}, {"by": "imgid"}, "two entries stand for COCO_val2014_000000391895.jpg"),
        ({"7": "cat"}, {"by": "imgid"}, "expected a list of labels"),
        ({"7": 2, "9": 1}, {"by": "imgid"}, "1 of 2 complexity labels are not 0, 1 or -1, such as 2"),
        ({"7": ["cat"]}, {"by": "imgid", "split": "dev"}, "no images of split 'dev'"),
        ("[1]", {"by": "imgid"}, "entry 0: expected an object with one of id"),
        ("3", {"by": "imgid"}, "or a list of objects, found int"),
        ('{"7": [], "7": []}', {"by": "imgid"}, "a key occurs twice"),
    ],
)  # fmt: skip
def test_wrong_labels(coco, tmp_path, table, options, message):
    with pytest.raises(ConfigError, match=message):
        join_labels(put(tmp_path / "l.json", table), captions=coco, **options)


def test_wrong_manifests(tmp_path):
    labels = put(tmp_path / "l.json", {"laion_00000001": ["cat"]})
    for name, text, message in (
        ("m.tsv", "laion_00000001\tx\n", "found no URL"),
        ("m.txt", "", "expected a manifest as .tsv"),
        ("m2.tsv", "laion_00000009\thttps://a.org\n", "none of its 1 entries"),
    ):
        with pytest.raises(ConfigError, match=message):
            join_labels(labels, manifest=put(tmp_path / name, text))
