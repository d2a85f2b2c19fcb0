"""icar index: rows match the files after any change, no work is repeated, and harmful runs are rejected."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import icar_jax
from icar_jax import cli
from icar_jax.data.sources.files import ImagePaths, NoImages
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.search.access import StoreError
from icar_jax.search.indexing import IndexingError, index_files
from icar_jax.search.opening import open_store, store_exists
from icar_jax.search.scan import Lookup, process_share
from tests.support.collected import draw, embeddings, index, picture, rows


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def counts(done):
    names = ("added", "updated", "copied", "touched", "removed", "gone", "bad", "still_bad", "unchanged")
    return {name: getattr(done, name) for name in names if getattr(done, name)}


def never(_):
    raise AssertionError("the model was loaded")


def test_a_store_holds_what_the_model_gives(model, pictures, store):
    done = index(model, pictures, store)
    files = sorted(map(str, pictures.iterdir()))
    routed, held = model.route(files), rows(store)
    assert counts(done) == {"added": 23} and done.images == done.total == 23 and sorted(held) == files
    for file, score, exit in zip(files, routed.scores, routed.exits, strict=True):
        _, size, mtime_ns, caption, complexity, at = held[file]
        assert (size, mtime_ns) == (os.stat(file).st_size, os.stat(file).st_mtime_ns)
        assert caption is None and complexity == pytest.approx(score, abs=1e-6) and at == exit
    vectors = embeddings(store)
    np.testing.assert_allclose(np.stack([vectors[file] for file in files]), routed.embeddings, atol=1e-3)
    assert len(set(routed.exits)) == 3 and done.stats.compilations == 0
    assert done.exits == {e: int((routed.exits == e).sum()) for e in set(routed.exits.tolist())}
    assert "Embedded 23 images in" in done.report() and "added 23, updated 0, removed 0" in done.report()
    meta = open_store(store).meta
    assert meta["model"] == model.identity and meta["exits"] == [1, 2, 3] and meta["checkpoint"] == str(model.path.parent)


def test_a_second_run_reads_nothing_and_writes_nothing(model, pictures, store, bundle):
    index(model, pictures, store)
    before = open_store(store).versions()
    done = index_files(store, ImagePaths([str(pictures)]), None, never)
    assert counts(done) == {"unchanged": 23} and done.images == 0 and done.warm_up_s == 0
    assert open_store(store).versions() == before


def test_only_what_changed_is_done(model, pictures, store):
    index(model, pictures, store)
    before = rows(store, "sha256", "embedded_at")
    files = sorted(pictures.iterdir())
    draw(pictures, 2, seed=1)  # added
    Image.fromarray(picture(77)).save(files[0])  # updated
    os.utime(files[1], ns=(1, 1))  # touched
    files[2].rename(pictures / "moved.png")  # moved
    shutil.copy(files[3], pictures / "copy.png")  # copied
    shutil.copy(files[4], files[5])  # updated with known content
    done = index(model, pictures, store)
    assert counts(done) == {"added": 4, "updated": 2, "copied": 3, "touched": 1, "gone": 1, "unchanged": 19}
    assert done.images == 3 and done.total == 27, "three files have content that was not known"
    after = rows(store, "sha256", "embedded_at")
    same = [str(file) for file in (files[1], *files[6:])]
    assert {path: after[path] for path in same} == {path: before[path] for path in same}
    vectors = embeddings(store)
    for a, b in ((files[2], pictures / "moved.png"), (files[3], pictures / "copy.png"), (files[4], files[5])):
        np.testing.assert_array_equal(vectors[str(a)], vectors[str(b)])
    np.testing.assert_allclose(vectors[str(files[0])], model.encode_image([files[0]])[0], atol=1e-3)
    pruned = index_files(store, ImagePaths([str(pictures)]), None, never, prune=True)
    assert counts(pruned) == {"removed": 1, "unchanged": 26} and sorted(rows(store)) == sorted(map(str, pictures.iterdir()))
    assert not counts(index_files(store, ImagePaths([str(pictures)]), None, never, prune=True)).keys() - {"unchanged"}


@settings(deadline=None, max_examples=4, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 3))), max_size=12))
def test_after_any_changes_rows_are_the_files(model, tmp_path_factory, changes):
    """Files are added, changed, swapped and removed; after each run with --prune the store equals a new one."""
    home = tmp_path_factory.mktemp("home")
    folder = draw(home / "pictures", 2, seed=9)
    for number, (name, content) in enumerate(changes):
        file = folder / f"{name}.png"
        if content is None:
            file.unlink(missing_ok=True)
        else:
            Image.fromarray(picture(content)).save(file)
            os.utime(file, ns=(number + 1, number + 1))
        if number % 4 == 3:
            index(model, folder, home / "store", prune=True, commit_rows=3)
    index(model, folder, home / "store", prune=True, commit_rows=3)
    index(model, folder, home / "anew")
    columns = ("sha256", "size", "mtime_ns", "exit")
    assert rows(home / "store", *columns) == rows(home / "anew", *columns)
    mine, anew = embeddings(home / "store"), embeddings(home / "anew")
    assert all(np.allclose(mine[path], anew[path], atol=1e-3) for path in anew)


def test_a_change_that_size_and_time_hide_is_found_by_rehash(model, pictures, store):
    index(model, pictures, store)
    file = sorted(pictures.iterdir())[0]
    stat, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # last byte of the last PNG checksum, which decoders ignore
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert counts(index_files(store, ImagePaths([str(pictures)]), None, never)) == {"unchanged": 23}
    assert counts(index(model, pictures, store, rehash=True)) == {"updated": 1, "unchanged": 22}
    before = open_store(store).versions()
    assert counts(index(model, pictures, store, rehash=True)) == {"unchanged": 23}
    assert open_store(store).versions() == before


def test_bad_files_are_noted_once_and_again_when_they_change(model, pictures, store):
    good = sorted(pictures.iterdir())[0]
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    (pictures / "link.png").symlink_to(pictures / "nowhere.png")
    done = index(model, pictures, store)
    assert counts(done) == {"added": 23, "bad": 2} and len(done.first_bad) == 2
    listed = {os.path.basename(row["path"]): row for row in open_store(store).bad_rows().to_pylist()}
    assert "not an image" in listed["broken.jpg"]["reason"] and listed["broken.jpg"]["size"] == 13
    assert listed["link.png"]["size"] is None
    before = open_store(store).versions()
    assert counts(index_files(store, ImagePaths([str(pictures)]), None, never)) == {"still_bad": 2, "unchanged": 23}
    assert open_store(store).versions() == before
    assert counts(index(model, pictures, store, retry_bad=True)) == {"bad": 2, "unchanged": 23}
    Image.new("RGB", (40, 30), "red").save(pictures / "broken.jpg")
    good.write_bytes(b"spoilt")
    (pictures / "link.png").unlink()
    done = index(model, pictures, store)
    assert counts(done) == {"added": 1, "bad": 1, "removed": 1, "unchanged": 22}
    assert [row["path"] for row in open_store(store).bad_rows().to_pylist()] == [str(good)] and str(good) not in rows(store)


def test_files_that_cannot_be_read_for_now_keep_their_rows(model, pictures, store, monkeypatch):
    index(model, pictures, store)
    file = sorted(pictures.iterdir())[0]
    os.utime(file, ns=(1, 1))
    read = icar_jax.inference.files.stream.read_regular

    def fail(path, most):
        if path == str(file):
            raise OSError("Input/output error")
        return read(path, most)

    monkeypatch.setattr(icar_jax.inference.files.stream, "read_regular", fail)
    assert counts(index(model, pictures, store)) == {"bad": 1, "unchanged": 22} and str(file) in rows(store)
    monkeypatch.undo()
    assert counts(index(model, pictures, store)) == {"touched": 1, "unchanged": 22}
    assert not len(open_store(store).bad_rows())


def test_the_bar_ends_where_it_should(model, pictures, store, monkeypatch):
    bars = []

    class Bar(icar_jax.search.indexing.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(icar_jax.search.indexing, "tqdm", Bar)
    draw(pictures / "sub", 3, seed=6)
    index(model, [pictures, pictures / "sub"], store)
    index(model, [pictures, pictures / "sub"], store)
    assert [(bar.n, bar.total) for bar in bars] == [(29, 29)] * 2


def test_another_budget_for_what_is_done_is_answered(model, pictures, store):
    assert "keep their exits" not in index(model, pictures, store).report()
    assert "keep their exits" not in index(model, pictures, store).report()
    before = open_store(store).versions()
    for options in ({"budget": 0.9}, {"exit": 1}, {"cheap": True}):
        done = index(model, pictures, store, **options)
        assert done.rerouted and "Unchanged images keep their exits" in done.report() and "--pass refine" in done.report()
    assert open_store(store).versions() == before
    draw(pictures, 1, seed=7)
    assert index(model, pictures, store, exit=1).rerouted
    assert not index(model, pictures, store, exit=1).rerouted and index(model, pictures, store).rerouted


def test_what_was_indexed_is_kept_over_all_runs(model, pictures, store, tmp_path):
    other = draw(tmp_path / "other", 1, seed=2)
    listed = draw(tmp_path / "listed", 1, seed=3)
    (tmp_path / "link.png").symlink_to(other / "2_000.png")
    index(model, [pictures, *sorted(other.iterdir())], store)
    assert open_store(store).roots() == [str(pictures)], "a file that is no link leads nowhere else"
    index(model, [tmp_path / "link.png"], store)
    index_files(store, ImagePaths(["-"], [str(listed)]), None, lambda _: model)
    assert open_store(store).roots() == sorted(map(str, (pictures, tmp_path / "link.png", listed)))
    before = open_store(store).versions()
    index(model, [pictures, tmp_path / "link.png"], store)
    assert open_store(store).versions() == before


def test_captions_come_from_a_file_and_stay(model, pictures, store, tmp_path):
    names = sorted(file.name for file in pictures.iterdir())
    (pictures / "captions.csv").write_text(f"file,caption\n{names[0]},a dog\n{names[0]},two dogs\n{names[1]},a cat\n")
    index(model, pictures, store, captions=pictures / "captions.csv")
    first, second, third = (str(pictures / name) for name in names[:3])
    assert [rows(store, "caption")[path][0] for path in (first, second, third)] == ["a dog\ntwo dogs", "a cat", None]
    (tmp_path / "elsewhere.jsonl").write_text(json.dumps({"file": names[2], "caption": "a bird"}) + "\n")
    done = index_files(store, ImagePaths([str(pictures)]), None, never, captions=tmp_path / "elsewhere.jsonl")
    assert done.captioned == 1 and done.unchanged == 22
    Image.fromarray(picture(88)).save(first)
    os.rename(second, pictures / "moved.png")
    index(model, pictures, store, prune=True)
    held = rows(store, "caption")
    assert [held[path][0] for path in (first, third, str(pictures / "moved.png"))] == ["a dog\ntwo dogs", "a bird", "a cat"]
    (tmp_path / "none.jsonl").write_text(json.dumps({"file": "other.png", "caption": "x"}) + "\n")
    with pytest.raises(IndexingError, match="no caption matches an image"):
        index(model, pictures, store, captions=tmp_path / "none.jsonl")


def test_folders_that_are_missing_or_empty_are_no_reason_to_remove_their_rows(model, pictures, store, tmp_path):
    other = draw(tmp_path / "other", 3, seed=2)
    index(model, [pictures, other], store)
    pictures.rename(tmp_path / "away")
    for options in ({}, {"prune": True}):
        with pytest.raises(IndexingError, match="does not exist; is its disk mounted"):
            index(model, [pictures, other], store, **options)
    pictures.mkdir()
    with pytest.raises(IndexingError, match="contains no image, but the store has 23 from there: is a disk not mounted"):
        index(model, [pictures, other], store, prune=True)
    done = index(model, [pictures, other], store)
    assert counts(done) == {"gone": 23, "unchanged": 3} and done.empty == [str(pictures)]
    pictures.rmdir()
    done = index_files(store, ImagePaths([str(pictures)]), None, never, prune=True, prune_missing=True)
    assert counts(done) == {"removed": 23} and sorted(rows(store)) == sorted(map(str, other.iterdir()))
    with pytest.raises(IndexingError, match="pass folders"):
        index_files(store, ImagePaths([str(tmp_path / "other" / "*.png")]), None, never, prune=True)


def test_a_folder_below_that_has_become_empty_is_no_reason_to_remove_its_rows(model, pictures, store):
    """As for the mount point of an unmounted disk."""
    disk, album = draw(pictures / "disk" / "2020", 3, seed=4).parent, draw(pictures / "album", 2, seed=5)
    index(model, pictures, store)
    away = pictures.parent / "away"
    disk.rename(away)
    disk.mkdir()
    (disk / "lost+found").mkdir()
    before = rows(store)
    with pytest.raises(IndexingError, match=rf"{disk} contains no image, but the store has 3 from there: is a disk"):
        index(model, pictures, store, prune=True)
    assert rows(store) == before
    assert counts(index(model, pictures, store)) == {"gone": 3, "unchanged": 25}
    # A folder that no longer exists was deleted on purpose; a remounted one is unchanged.
    disk.joinpath("lost+found").rmdir()
    disk.rmdir()
    away.rename(disk)
    for file in album.iterdir():
        file.unlink()
    album.rmdir()
    assert counts(index(model, pictures, store, prune=True)) == {"removed": 2, "unchanged": 26}
    for file in (disk / "2020").iterdir():
        file.unlink()
    with pytest.raises(IndexingError, match=rf"{disk / '2020'} contains no image, but the store has 3"):
        index(model, pictures, store, prune=True)
    assert counts(index(model, pictures, store, prune=True, prune_missing=True)) == {"removed": 3, "unchanged": 23}


def test_only_rows_below_the_named_folders_are_removed(model, pictures, store, tmp_path):
    beside = draw(tmp_path / "pictures2", 2, seed=3)
    index(model, [pictures, beside], store)
    for file in (*beside.iterdir(), sorted(pictures.iterdir())[0]):
        file.unlink()
    assert counts(index(model, pictures, store, prune=True)) == {"removed": 1, "unchanged": 22}
    assert sum(path.startswith(str(beside)) for path in rows(store)) == 2


def test_models_that_do_not_belong_are_refused_before_anything_is_read(
    model, pictures, store, clip_folder, complexity_folder, tmp_path
):
    index(model, pictures, store)
    other = shutil.copytree(clip_folder, tmp_path / "clip")
    description = json.loads((other / "icar.json").read_text())
    (other / "icar.json").write_text(json.dumps({**description, "preprocess": {**description["preprocess"], "resize": "crop"}}))
    before = open_store(store).versions()
    with pytest.raises(StoreError, match=f"a different CLIP.*from {model.path.parent}"):
        index_files(store, ImagePaths([str(pictures)]), other, never)
    with pytest.raises(IndexingError, match="contains no CLIP"):
        index_files(store, ImagePaths([str(pictures)]), complexity_folder, never)
    assert open_store(store).versions() == before
    # Another bundle of the same models is accepted, since all exits share one space.
    again = make_bundle(clip_folder, complexity_folder, tmp_path / "again", thresholds=(-1.0, -1.0))
    draw(pictures, 1, seed=4)
    done = index_files(store, ImagePaths([str(pictures)]), again, lambda path: icar_jax.load(path, batch_size=8))
    assert counts(done) == {"added": 1, "unchanged": 23} and done.exits == {3: 1}
    assert open_store(store).meta["checkpoint"] == str(again)


def test_no_store_is_made_for_nothing(model, store, complexity_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImages):
        index(model, tmp_path / "empty", store)
    with pytest.raises(IndexingError, match="pass --checkpoint"):
        index_files(store, ImagePaths([str(tmp_path)]), None, never)
    with pytest.raises(IndexingError, match="contains no CLIP"):
        index_files(store, ImagePaths([str(tmp_path)]), complexity_folder, never)
    assert not store_exists(store)


def test_the_command(bundle, pictures, store, capsys):
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    command = ["index", str(pictures), "--store", str(store), "--batch-size", "8"]
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--checkpoint", str(bundle)])
    out = capsys.readouterr()
    assert end.value.code == 1 and "added 23, updated 0, removed 0, unchanged 0, bad 1" in out.out
    assert f"Store: {store}: 23 images" in out.out and "broken.jpg: not an image" in out.err
    cli.main([*command, "--skip-bad"])
    assert "unchanged 23, bad 1" in capsys.readouterr().out
    cli.main(["index", "--bad", "--store", str(store)])
    assert "broken.jpg: not an image" in capsys.readouterr().out
    cli.main(["index", "--bad", "--json", "--store", str(store)])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["path"] == str(pictures / "broken.jpg") and set(row) == {"path", "size", "mtime_ns", "reason", "found_at"}
    for wrong, match in (
        (["--store", "x"], "PATH missing"),
        ([str(pictures), "--store", "x", "--prune-missing"], "without --prune"),
        ([str(pictures), "--store", "x", "--order", "returned"], "without --pass refine"),
        ([str(pictures), "--store", "x", "--pass", "cheap", "--budget", "0.5"], "first exit"),
        ([str(pictures), "--store", "x", "--json"], "--json needs --bad"),
        ([str(pictures), "--store", "x"], "pass --checkpoint"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["index", *wrong])
        assert end.value.code == 2 and match in capsys.readouterr().err


@settings(max_examples=30)
@given(st.lists(st.text(max_size=4)), st.text(max_size=4))
def test_lookup_finds_what_a_list_holds(texts, other):
    lookup = Lookup(pa.chunked_array([texts[: len(texts) // 2], texts[len(texts) // 2 :]], pa.string()))
    assert all(texts[lookup.find(text)] == text for text in texts) and (other in lookup) == (other in texts)


def test_shares_of_processes_cover_every_path_once():
    names = [f"/photos/{i}.jpg" for i in range(300)] + ["/bad\udcff.jpg"]
    owners = [[process_share(process, 3)(name) for process in range(3)] for name in names]
    assert all(sum(row) == 1 for row in owners) and min(np.sum(owners, axis=0)) > 60
