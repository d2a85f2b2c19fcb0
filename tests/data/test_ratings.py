"""Rating files: every layout; every fault is named with its place and counted."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icar_jax.data.ratings.table import RatingsError, read_ratings

WHOLE = {"a b.jpg": 0.25, "c.png": 1.0, "d/e.jpg": 0.0}


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def table(rows, key="file"):
    return f"{key},score\n" + "".join(f'"{name}",{score}\n' for name, score in rows)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_every_layout_gives_the_same(tmp_path, bom):
    files = [
        write(tmp_path / "r.txt", bom + "".join(f"{name}  {score}\r\n" for name, score in WHOLE.items()) + "\n"),
        write(tmp_path / "r.csv", bom + table(WHOLE.items())),
    ]
    # as written by `icar score`, with other columns
    rows = "".join(f"{name},{score},13,2.5\n" for name, score in WHOLE.items())
    files.append(write(tmp_path / "more.csv", "file,score,exit,milliseconds\n" + rows))
    pq.write_table(pa.table({"file": list(WHOLE), "score": list(WHOLE.values())}), tmp_path / "r.parquet")
    for path in [*files, tmp_path / "r.parquet"]:
        found = read_ratings(path).check(0.0)
        assert (found.key, found.scores, found.labels, found.lines) == ("file", WHOLE, False, 3), path
    scores = {"a": 0.5, "b": 0.25, "c": 0.1}
    assert read_ratings(write(tmp_path / "s.json", bom + json.dumps(scores))).scores == scores


@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}( [a-z0-9]{1,4}){0,2}\.jpg", fullmatch=True), st.floats(0, 1), min_size=1))
def test_text_round_trip(tmp_path_factory, scores):
    path = write(tmp_path_factory.mktemp("r") / "r.txt", "".join(f"{n}  {s!r}\n" for n, s in scores.items()))
    assert read_ratings(path).check(0.0).scores == scores


def test_labels(tmp_path):
    path = write(tmp_path / "labels.json", json.dumps({"a": 1, "b": 0, "c": -1, "d": 1}))
    found = read_ratings(path).check(0.0)
    assert found.labels and found.scores == {"a": 1.0, "b": 0.0, "d": 1.0} and found.undecided == 1
    assert "1 undecided (label -1) dropped" in found.summary()
    wrong = read_ratings(write(tmp_path / "w.json", json.dumps({"a": 1, "b": 0, "c": 2, "d": 0.5, "e": 1})))
    assert wrong.counts == {"wrong label": 2}
    assert "key 'c': c: expected the label 0, 1 or -1, found 2" in map(str, wrong.faults)


TEXT_FAULTS = {
    "a.jpg 0.5": ("malformed line", "line 2: expected `name<two spaces>score`"),
    "a.jpg\t0.5": ("malformed line", "line 2: "),
    "a.jpg  high": ("malformed line", "line 2: a.jpg: expected a number, found 'high'"),
    "a.jpg  1.01": ("score outside [0, 1]", "line 2: a.jpg: score 1.01 is not in [0, 1]"),
    "a.jpg  -0.1": ("score outside [0, 1]", "line 2: a.jpg: score -0.1"),
    "a.jpg  nan": ("score outside [0, 1]", "line 2: a.jpg: score nan"),
    "a.jpg  inf": ("score outside [0, 1]", "line 2: a.jpg: score inf"),
    "first.jpg  0.5": ("duplicate", "line 2: first.jpg was already rated at line 1"),
    "gone.jpg  0.5": ("missing image", "line 2: gone.jpg: not here"),
}


@pytest.mark.parametrize("line", TEXT_FAULTS)
def test_faults_of_a_line(line, tmp_path):
    kind, reason = TEXT_FAULTS[line]
    path = write(tmp_path / "r.txt", f"first.jpg  0.5\n{line}\nlast.jpg  0.25\n")
    found = read_ratings(path, lambda name: None if name == "gone.jpg" else name, "not here")
    assert found.counts == {kind: 1} and str(found.faults[0]).startswith(reason), found.faults
    assert found.scores == {"first.jpg": 0.5, "last.jpg": 0.25}
    with pytest.raises(RatingsError) as error:
        found.check(0.33)
    assert reason in str(error.value) and f"1 {kind}" in str(error.value) and "config.data.bad_share=0.33" in str(error.value)
    assert found.check(0.34) is found


@pytest.mark.parametrize("rows, kind, place", [
    ('a,0.5,1\n', "malformed line", "line 2"), ('a\n', "malformed line", "line 2"), ('a,\n', "malformed line", "line 2"),
    ('"b\nc",0.5\na,7\n', "score outside [0, 1]", "line 4"), ('a,0.5\na,0.5\n', "duplicate", "line 3"),
    (',0.5\n', "malformed line", "line 2"),
])  # fmt: skip
def test_faults_of_a_table(rows, kind, place, tmp_path):
    found = read_ratings(write(tmp_path / "r.csv", "file,score\n" + rows + "z,0.5\n"))
    assert [(f.kind, f.place) for f in found.faults] == [(kind, place)]


def test_names_that_are_not_utf8_and_duplicate_keys(tmp_path):
    (tmp_path / "r.txt").write_bytes(b"a\xff.jpg  0.5\nb.jpg  0.5\n")
    assert [str(f) for f in read_ratings(tmp_path / "r.txt").faults] == [r"line 1: the name is not UTF-8: 'a\udcff.jpg'"]
    found = read_ratings(write(tmp_path / "r.json", '{"a": 0.5, "b": "0.5", "c": true, "d": {"x": 1}, "a": 0.6, "e": NaN}'))
    assert [f.kind for f in found.faults] == ["malformed line"] * 3 + ["duplicate", "score outside [0, 1]"]
    assert found.scores == {"a": 0.5}


@pytest.mark.parametrize("name, content, message", [
    ("r.xlsx", "", "r.xlsx: expected ratings in a .txt, .json, .csv, .parquet file"),
    ("r.json", "[1]", "r.json: expected an object {file: score}, found list"),
    ("r.json", "{", "r.json: not valid JSON"),
    ("r.csv", "name,score\n", "header: expected the columns score and either file or url, found name, score"),
    ("r.csv", "file,url,score\n", "either file or url"),
    ("r.csv", "", "found nothing"),
    ("r.csv", 'file,score\n"a,0.5\n', "not readable as CSV"),
    ("r.parquet", "no", "not a complete Parquet file"),
])  # fmt: skip
def test_unreadable_files(name, content, message, tmp_path):
    with pytest.raises(RatingsError) as error:
        read_ratings(write(tmp_path / name, content))
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / name))


def test_missing_and_empty_files(tmp_path):
    write(tmp_path / "other.csv", "")
    with pytest.raises(FileNotFoundError, match="r.txt not found; .* has other.csv"):
        read_ratings(tmp_path / "r.txt")
    with pytest.raises(RatingsError, match="contains no ratings"):
        read_ratings(write(tmp_path / "r.txt", "\n")).check(1.0)
    only = read_ratings(write(tmp_path / "l.json", '{"a": -1}'))
    with pytest.raises(RatingsError, match="contains no ratings; 1 undecided"):
        only.check(1.0)


def test_the_first_twenty_faults_are_listed(tmp_path):
    path = write(tmp_path / "r.txt", "".join(f"{i}.jpg  7\n" for i in range(30)) + "a.jpg  0.5\n")
    with pytest.raises(RatingsError) as error:
        read_ratings(path).check(0.01)
    listed = str(error.value).splitlines()
    assert sum(line.startswith("  line ") for line in listed) == 20 and "  and 10 more" in listed
    assert "30 of 31 lines cannot be used (30 score outside [0, 1])" in listed[0]


@given(st.lists(st.one_of(st.floats(), st.sampled_from(["x", "", "0.5"])), max_size=30), st.floats(0, 1))
def test_every_line_is_used_or_counted(tmp_path_factory, values, share):
    path = tmp_path_factory.mktemp("r") / "r.txt"
    path.write_text("".join(f"{i}.jpg  {v}.\n" if v == "x" else f"{i}.jpg  {v}\n" for i, v in enumerate(values)))
    found = read_ratings(path)
    good = {f"{i}.jpg": float(v) for i, v in enumerate(values) if v not in ("x", "") and 0 <= float(v) <= 1}
    assert found.scores == good and len(good) + len(found.faults) == found.lines == len(values)
    assert all(math.isfinite(v) for v in found.scores.values())
    if good and len(found.faults) <= share * len(values):
        found.check(share)
    else:
        with pytest.raises(RatingsError):
            found.check(share)
