"""icar embed: files on disk, unusable images, resuming after a kill, errors, and reading the corpus."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import icar_jax
from icar_jax import cli
from icar_jax.data.sources.files import ImagePaths, NoImages
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.evaluation.routing.thresholds import thresholds_for_shares
from icar_jax.inference.files import corpus as corpus_module
from icar_jax.inference.files.corpus import CorpusError, CorpusWriter, open_corpus
from icar_jax.inference.files.embedding import embed_files
from tests.support.programs import environment


@pytest.fixture(scope="module")
def bundle(clip_folder, complexity_folder, tmp_path_factory):
    scores = icar_jax.load(complexity_folder, batch_size=8).score(sorted(draw(tmp_path_factory.mktemp("drawn"), 23).iterdir()))
    thresholds = thresholds_for_shares(scores, (0.3, 0.3, 0.4))
    return make_bundle(clip_folder, complexity_folder, tmp_path_factory.mktemp("bundle") / "bundle", thresholds=thresholds)


@pytest.fixture(scope="module")
def model(bundle):
    return icar_jax.load(bundle, batch_size=8)


def draw(folder, n, seed=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        height, width = rng.integers(20, 60, size=2)
        array = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 6))
        Image.fromarray(array).save(folder / f"{seed}_{i:03}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    return draw(tmp_path / "pictures", 23)


def embed(model, folder, out, **options):
    return embed_files(model, ImagePaths([str(folder)]), out, **{"shard_rows": 10, **options})


def content(out):
    """Everything except the times."""
    opened = open_corpus(out)
    return opened[:], opened.rows(["path", "sha256", "complexity", "exit"]).to_pylist()


def test_a_corpus_holds_what_the_model_gives_in_order(model, pictures, tmp_path):
    done = embed(model, pictures, tmp_path / "out")
    files = sorted(map(str, pictures.iterdir()))
    opened, routed = open_corpus(tmp_path / "out"), model.route(files)
    rows = opened.rows().to_pylist()
    assert len(opened) == done.images == 23 and opened.complete and [len(s) for s in opened.shards] == [10, 10, 3]
    assert [row["path"] for row in rows] == files
    assert [row["sha256"] for row in rows] == [hashlib.sha256(open(f, "rb").read()).hexdigest() for f in files]
    np.testing.assert_allclose([row["complexity"] for row in rows], routed.scores, atol=1e-6)
    assert [row["exit"] for row in rows] == routed.exits.tolist() and len(set(routed.exits)) == 3
    assert all(row["milliseconds"] > 0 for row in rows)
    assert opened.shards[0].dtype == np.float16 and isinstance(opened.shards[0], np.memmap)
    np.testing.assert_allclose(opened[:], routed.embeddings, atol=1e-3)
    np.testing.assert_array_equal(opened[[22, 0, 10, 9]], opened[:][[22, 0, 10, 9]])
    assert [len(shard) for shard in opened.shards] == [10, 10, 3] and opened.rows().num_rows == 23
    with pytest.raises(IndexError, match="from 0 to 22"):
        opened[[23]]
    assert sum(done.exits.values()) == 23 and done.stats.rows == dict(done.exits)
    assert not (tmp_path / "out" / "bad.csv").exists()


def test_nothing_compiles_after_warm_up(bundle, pictures, tmp_path):
    done = embed(icar_jax.load(bundle, batch_size=4), pictures, tmp_path / "out")
    assert done.stats.compilations == 0 and "0 compilations after warm-up" in done.report()


def test_images_that_are_new_are_added_and_others_not_read_again(model, pictures, tmp_path, monkeypatch):
    embed(model, pictures, tmp_path / "out")
    before = content(tmp_path / "out")
    draw(pictures, 4, seed=1)
    done = embed(model, pictures, tmp_path / "out")
    after = content(tmp_path / "out")
    assert (done.images, done.before, done.total) == (4, 23, 27)
    np.testing.assert_array_equal(after[0][:23], before[0])
    assert after[1][:23] == before[1] and len(after[1]) == 27
    monkeypatch.chdir(pictures)  # the same files by relative paths
    assert embed(model, ".", tmp_path / "out").images == 0
    assert content(tmp_path / "out")[1] == after[1]


def test_one_exit_for_all_scores_nothing(model, clip_folder, pictures, tmp_path):
    embed(model, pictures, tmp_path / "early", exit=1)
    files = sorted(map(str, pictures.iterdir()))
    opened = open_corpus(tmp_path / "early")
    assert set(opened.rows()["exit"].to_pylist()) == {1} and set(opened.rows()["complexity"].to_pylist()) == {None}
    np.testing.assert_allclose(opened[:], model.encode_image(files, exit=1), atol=1e-3)
    embed(icar_jax.load(clip_folder, batch_size=8), pictures, tmp_path / "full")
    assert set(open_corpus(tmp_path / "full").rows()["exit"].to_pylist()) == {3}
    # The same tower, in a bundle or alone.
    assert embed(icar_jax.load(clip_folder, batch_size=8), pictures, tmp_path / "early", exit=1).images == 0


def test_bad_files_are_listed_and_tried_again(model, pictures, tmp_path, capsys, bundle):
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    (pictures / "0_005.png").write_bytes((pictures / "0_005.png").read_bytes()[:100])
    command = ["embed", str(pictures), "--checkpoint", str(bundle), "--out", str(tmp_path / "out"), "--batch-size", "8"]
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    captured = capsys.readouterr()
    assert end.value.code == 1 and "2 images could not be embedded" in captured.err and "broken.jpg: " in captured.err
    assert "22 images, float16 [22, 24]" in captured.out
    listed = list(csv.DictReader((tmp_path / "out" / "bad.csv").open()))
    assert [os.path.basename(row["file"]) for row in listed] == ["0_005.png", "broken.jpg"]
    Image.new("RGB", (40, 30), "red").save(pictures / "broken.jpg")
    (pictures / "0_005.png").unlink()
    cli.main(command)
    assert "Embedded 1 images" in capsys.readouterr().out and not (tmp_path / "out" / "bad.csv").exists()
    assert len(open_corpus(tmp_path / "out")) == 23


def test_nothing_but_bad_files_and_no_files(model, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no")
    done = embed(model, tmp_path / "bad", tmp_path / "out")
    assert (done.total, done.bad) == (0, 1) and (tmp_path / "out" / "bad.csv").exists()
    assert embed(model, tmp_path / "bad", tmp_path / "out").bad == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImages):
        embed(model, tmp_path / "empty", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_model_or_other_options_are_refused(model, bundle, clip_folder, complexity_folder, pictures, tmp_path):
    out = tmp_path / "out"
    embed(model, pictures, out)
    before = content(out)
    other = make_bundle(clip_folder, complexity_folder, tmp_path / "other", thresholds=(0.125, 0.875))
    for changed, options, match in (
        (icar_jax.load(other), {}, r"encoding was .* now .*0\.125"),
        (model, {"exit": 1}, "encoding was"),
        (model, {"shard_rows": 11}, "shard_rows was 10, now 11"),
        (icar_jax.load(bundle, dtype="bfloat16"), {}, "bfloat16"),
        (icar_jax.load(clip_folder), {}, "model was"),
    ):
        with pytest.raises(CorpusError, match=match):
            embed(changed, pictures, out, **options)
    np.testing.assert_array_equal(content(out)[0], before[0])


def test_folders_that_are_no_corpus_and_damage(model, pictures, tmp_path):
    with pytest.raises(CorpusError, match="is not a corpus"):
        embed(model, pictures, pictures)
    with pytest.raises(CorpusError, match="has no corpus.json"):
        open_corpus(pictures)
    embed(model, pictures, tmp_path / "out")
    for name, match in (("000001.npy", "000001.npy"), ("000001.parquet", "is missing 000001.parquet")):
        kept = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).unlink()
        for use in (open_corpus, lambda out: embed(model, pictures, out)):
            with pytest.raises(CorpusError, match=match):
                use(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(kept)
    (tmp_path / "out" / "corpus.json").write_text("{")
    with pytest.raises(CorpusError, match="not valid JSON"):
        open_corpus(tmp_path / "out")


def test_one_writer_at_a_time(model, pictures, tmp_path):
    manifest = {"model": {}, "encoding": {}, "embed_dim": 4, "shard_rows": 2}
    with CorpusWriter(tmp_path / "out", manifest), pytest.raises(CorpusError, match="another process"):
        CorpusWriter(tmp_path / "out", manifest).__enter__()
    assert not (tmp_path / "out").exists(), "nothing was written"


@pytest.mark.parametrize("nth", range(1, 8))
def test_stopped_before_any_write_it_continues_to_the_same_corpus(nth, model, pictures, tmp_path, monkeypatch):
    """Files of a corpus are moved into place atomically; a stop before the nth move loses at most one shard."""
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    embed(model, pictures, tmp_path / "whole")
    replace, calls = os.replace, 0

    def stop(source, target):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(corpus_module.workdir.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        embed(model, pictures, tmp_path / "out")
    monkeypatch.undo()
    embed(model, pictures, tmp_path / "out")
    ours, whole = content(tmp_path / "out"), content(tmp_path / "whole")
    # The remainder runs in batches of other sizes, which round differently; embeddings are float16.
    np.testing.assert_allclose(ours[0], whole[0], atol=1e-3)
    scores = [np.array([row.pop("complexity") for row in rows], np.float64) for rows in (ours[1], whole[1])]
    np.testing.assert_allclose(*scores, atol=1e-6)
    assert ours[1] == whole[1]
    manifests = [json.loads((tmp_path / name / "corpus.json").read_text()) for name in ("out", "whole")]
    assert manifests[0] == manifests[1] and manifests[0]["complete"] and manifests[0]["bad"] == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.check
def test_killed_at_random_moments_it_continues_to_the_same_corpus(bundle, model, tmp_path):
    pictures = draw(tmp_path / "pictures", 400)
    embed(model, pictures, tmp_path / "whole")
    command = [
        sys.executable, "-m", "icar_jax.cli", "embed", str(pictures), "--checkpoint", str(bundle), "--out",
        str(tmp_path / "out"), "--batch-size", "8", "--shard-rows", "10",
    ]  # fmt: skip
    rng, kills = np.random.default_rng(0), 0
    for _ in range(40):
        process = subprocess.Popen(
            command, env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        held = len(list((tmp_path / "out").glob("*.parquet"))) if (tmp_path / "out").exists() else 0
        wanted = held + int(rng.integers(1, 8))
        while process.poll() is None and len(list((tmp_path / "out").glob("*.parquet"))) < wanted:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        out, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()[-2000:]
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills >= 3
    ours, whole = content(tmp_path / "out"), content(tmp_path / "whole")
    assert [r["path"] for r in ours[1]] == [r["path"] for r in whole[1]], "lost, doubled or out of order"
    assert [r["exit"] for r in ours[1]] == [r["exit"] for r in whole[1]]
    np.testing.assert_allclose(ours[0], whole[0], atol=2e-3)
    assert pq.read_table(tmp_path / "out" / "000039.parquet").num_rows == 10
