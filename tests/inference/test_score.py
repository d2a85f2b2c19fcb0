"""icar score: table formats, unusable files, exit status, order, static shapes and interrupted runs."""

import csv
import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import icar_jax
from icar_jax import cli
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError
from icar_jax.data.sources.files import ImagePaths
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.inference.files import score_table, scoring
from icar_jax.inference.files.score_table import write_scores
from icar_jax.inference.files.scoring import BadFile, ScoreRow, score_files
from icar_jax.inference.forward import count_compilations
from icar_jax.inference.router import assign

BAD = {"broken.jpg": "not an image", "gone.png": "no such image file", "short.png": "cannot decode", "huge.png": "too many"}


@pytest.fixture(scope="module")
def bundle(clip_folder, complexity_folder, tmp_path_factory):
    return make_bundle(clip_folder, complexity_folder, tmp_path_factory.mktemp("bundle") / "bundle", thresholds=(0.35, 0.55))


@pytest.fixture(scope="module")
def model(complexity_folder):
    return icar_jax.load(complexity_folder, batch_size=8)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(13):
        height, width = rng.integers(20, 60, size=2)
        array = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 6))
        Image.fromarray(array).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def bad_pictures(pictures, monkeypatch):
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    (pictures / "short.png").write_bytes((pictures / "00.png").read_bytes()[:200])
    Image.new("RGB", (300, 300)).save(pictures / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    return pictures


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return json.loads(path.read_text())
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    kinds = {"file": str, "score": float, "exit": int, "milliseconds": float}
    return [{key: kinds[key](value) if value else None for key, value in row.items()} for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_format_holds_the_scores_of_the_model_in_order(suffix, model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(score_table, "ROW_GROUP", 5)
    awkward = pictures / '03, "b"\nü.png'
    (pictures / "03.png").rename(awkward)
    out = tmp_path / f"scores{suffix}"
    done = write_scores(model, ImagePaths([str(pictures)]), out)
    rows = read(out)
    files = [row["file"] for row in rows]
    assert files == [str(pictures / name) for name in sorted(p.name for p in pictures.iterdir())] and str(awkward) in files
    np.testing.assert_allclose(np.float32([row["score"] for row in rows]), model.score(files), atol=1e-6)
    np.testing.assert_array_equal(np.float32([row["score"] for row in rows]), done.scores)
    assert all(list(row) == list(score_table.COLUMNS) and row["exit"] is None and row["milliseconds"] > 0 for row in rows)
    if suffix == ".parquet":
        assert pq.ParquetFile(out).num_row_groups == 3
        assert [str(f.type) for f in pq.read_schema(out)] == ["string", "float", "int32", "double"]
    assert [p.name for p in tmp_path.iterdir() if p.name != "pictures"] == [out.name], "no list of bad files, no leftovers"


def test_a_bundle_says_which_exit_its_thresholds_select(bundle, pictures, tmp_path):
    routed = icar_jax.load(bundle, batch_size=8)
    done = write_scores(routed, ImagePaths([str(pictures)]), tmp_path / "s.csv")
    exits = [row["exit"] for row in read(tmp_path / "s.csv")]
    assert exits == assign(done.scores, routed.exits, routed.thresholds).tolist()
    assert sum(done.exits.values()) == 13 and set(done.exits) <= set(routed.exits)


def test_bad_files_keep_their_place_and_their_reasons(model, bad_pictures):
    paths = [*sorted(map(str, bad_pictures.iterdir())), str(bad_pictures / "gone.png")]
    items = list(score_files(model, paths))
    assert [item.file for item in items] == paths
    reasons = {item.file.rsplit("/", 1)[1]: item.reason for item in items if isinstance(item, BadFile)}
    assert reasons.keys() == BAD.keys()
    assert all(BAD[name] in reason and name not in reason for name, reason in reasons.items())
    good = [item for item in items if isinstance(item, ScoreRow)]
    np.testing.assert_allclose([row.score for row in good], model.score([row.file for row in good]), atol=1e-6)


def test_names_that_no_table_can_hold_are_bad(model, pictures):
    (item,) = score_files(model, ["caf\udce9.png"])
    assert isinstance(item, BadFile) and "UTF-8" in item.reason and item.file.isascii()


def test_paths_are_read_only_a_little_ahead(model, pictures):
    read_so_far = 0

    def endless():
        nonlocal read_so_far
        while True:
            read_so_far += 1
            yield str(pictures / "00.png")

    rows = score_files(model, endless())
    for _ in range(20):
        next(rows)
    rows.close()
    assert read_so_far <= 20 + 4 * model.batch_size


def test_only_the_batch_shapes_compile(complexity_folder, pictures):
    fresh = icar_jax.load(complexity_folder, batch_size=8)
    files = sorted(map(str, pictures.iterdir()))
    with count_compilations() as compiled:
        for n in (13, 8, 3, 1, 9, 12):
            rows = list(score_files(fresh, files[:n]))
            assert len(rows) == n
        assert compiled() <= len(fresh.scorer.forward.buckets)
    # Times exclude compilation: a tiny model scores small images in a fraction of that.
    assert max(row.milliseconds for row in list(score_files(fresh, files))) < 10_000


def test_a_score_that_is_not_finite_is_an_error(model, pictures, monkeypatch):
    monkeypatch.setattr(scoring, "_timed", lambda forward, pixels: (np.full(len(pixels), np.nan, np.float32), 0.0))
    with pytest.raises(ValueError, match="00.png is not finite"):
        list(score_files(model, [str(pictures / "00.png")]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_stopped_run_leaves_what_was_there_before(error, model, bad_pictures, tmp_path, monkeypatch):
    out = tmp_path / "s.csv"
    out.write_text("old")

    def stops(*args, **kwargs):
        yield BadFile("x", "y")
        yield ScoreRow("a.png", 0.5, None, 1.0)
        raise error

    monkeypatch.setattr(score_table, "score_files", stops)
    with pytest.raises(error):
        write_scores(model, ImagePaths([str(bad_pictures)]), out, overwrite=True)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "s.csv"]


def test_what_may_be_written_is_known_before_anything_is_scored(model, pictures, tmp_path):
    paths = ImagePaths([str(pictures)])
    with pytest.raises(ConfigError, match=r"--out .*s.xls must end in .csv, .json, .jsonl, .parquet"):
        write_scores(model, paths, tmp_path / "s.xls")
    (tmp_path / "s.csv").write_text("old")
    with pytest.raises(ConfigError, match="--overwrite"):
        write_scores(model, paths, tmp_path / "s.csv")
    (tmp_path / "t.csv.bad.csv").write_text("old")
    with pytest.raises(ConfigError, match="t.csv.bad.csv exists"):
        write_scores(model, paths, tmp_path / "t.csv")
    write_scores(model, paths, tmp_path / "t.csv", overwrite=True)
    assert not (tmp_path / "t.csv.bad.csv").exists(), "an old list would tell of files that are good now"


def run(*words):
    try:
        cli.main(["score", *map(str, words)])
    except SystemExit as end:
        return end.code
    return 0


def test_the_exit_status(complexity_folder, bad_pictures, tmp_path, capsys):
    out = tmp_path / "s.csv"
    good = bad_pictures / "00.png"
    assert run(good, good, "--checkpoint", complexity_folder, "--out", out) == 0
    assert "1 duplicate paths; each image was scored once" in capsys.readouterr().err
    assert run(bad_pictures, "--checkpoint", complexity_folder, "--out", out, "--overwrite") == 1
    said = capsys.readouterr()
    assert "3 images could not be scored" in said.err and "broken.jpg: not an image" in said.err
    assert "Scored 13 images" in said.out and len(read(out)) == 13
    assert len(list(csv.reader((tmp_path / "s.csv.bad.csv").open()))) == 4
    assert run(bad_pictures, "--checkpoint", complexity_folder, "--out", out, "--overwrite", "--skip-bad") == 0
    alone = tmp_path / "alone.csv"
    assert "none of the 1 images" in run(tmp_path / "gone.png", "--checkpoint", complexity_folder, "--out", alone)
    assert not alone.exists() and (tmp_path / "alone.csv.bad.csv").exists()


def test_mistakes_end_in_clear_errors(clip_folder, complexity_folder, pictures, tmp_path, capsys):
    out = tmp_path / "s.csv"
    assert run(tmp_path / "pictures/*.webp", "--checkpoint", complexity_folder, "--out", out) == 2
    assert "no image file found" in capsys.readouterr().err
    assert run(pictures, "--checkpoint", clip_folder, "--out", out) == 2
    assert "icar bundle" in capsys.readouterr().err
    assert run(pictures, "--checkpoint", complexity_folder, "--out", out, "--sheet", tmp_path / "s.pdf") == 2
    assert "--sheet" in capsys.readouterr().err
    assert run(pictures, "--checkpoint", complexity_folder, "--out", out, "--explain", pictures) == 2
    assert "not empty" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(CheckpointError, match="cannot score"):
        next(score_files(icar_jax.load(clip_folder), ["a.png"]))


def test_a_list_on_standard_input(complexity_folder, pictures, tmp_path, monkeypatch, capsys):
    listed = "\n".join([str(pictures / "01.png"), "", str(pictures)]) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    assert run("-", "--checkpoint", complexity_folder, "--out", tmp_path / "s.jsonl") == 0
    assert [row["file"][-6:] for row in read(tmp_path / "s.jsonl")][:3] == ["01.png", "00.png", "02.png"]
    assert "Scored 13 images" in capsys.readouterr().out
