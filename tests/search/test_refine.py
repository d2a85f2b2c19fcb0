"""icar index --pass cheap and --pass refine."""

import os

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import cli
from icar_jax.checkpoint import CheckpointError
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.search.indexing import IndexingError
from icar_jax.search.opening import open_store
from icar_jax.search.refine import refine
from tests.support.collected import draw, embeddings, index, picture, rows


@pytest.fixture
def store(tmp_path, pictures, model):
    """A store after the cheap pass."""
    index(model, pictures, tmp_path / "store", cheap=True)
    return tmp_path / "store"


def run(model, store, named=(), **options):
    return refine(store, named, None, lambda _: model, **{"commit_rows": 5, **options})


def never(_):
    raise AssertionError("the model was loaded")


def test_a_cheap_pass_and_a_refining_one_give_what_one_pass_gives(model, pictures, store, tmp_path):
    cheap = rows(store, "exit", "complexity")
    files = sorted(map(str, pictures.iterdir()))
    assert {exit for exit, _ in cheap.values()} == {1}
    np.testing.assert_allclose(np.stack([embeddings(store)[f] for f in files]), model.encode_image(files, exit=1), atol=1e-3)
    index(model, pictures, tmp_path / "once")
    whole = rows(tmp_path / "once", "exit", "complexity")
    deeper = sum(exit > 1 for exit, _ in whole.values())
    done = run(model, store)
    after = rows(store, "exit", "complexity")
    assert 0 < deeper < 23 and (done.images, done.wanted, done.deep, done.total) == (deeper, deeper, 23 - deeper, 23)
    assert {path: exit for path, (exit, _) in after.items()} == {path: exit for path, (exit, _) in whole.items()}
    scores = [{path: score for path, (_, score) in held.items()} for held in (cheap, after)]
    assert scores[0] == scores[1], "nothing is scored twice"
    mine, once = embeddings(store), embeddings(tmp_path / "once")
    assert all(np.allclose(mine[file], once[file], atol=1e-3) for file in files)
    assert f"Refined {deeper:,} of {deeper:,} images" in done.report()
    before = open_store(store).versions()
    again = refine(store, (), None, never)
    assert again.images == again.wanted == 0 and again.deep == 23 and open_store(store).versions() == before


def test_indexing_again_does_not_make_refined_rows_shallow(model, pictures, store):
    run(model, store)
    refined = rows(store, "exit")
    draw(pictures, 2, seed=1)
    os.utime(sorted(pictures.iterdir())[0], ns=(1, 1))
    done = index(model, pictures, store, cheap=True)
    after = rows(store, "exit")
    assert (done.added, done.touched, done.unchanged) == (2, 1, 22) and done.exits == {1: 2}
    assert {path: after[path] for path in refined} == refined


def test_stopped_anywhere_it_goes_on(model, pictures, store, monkeypatch):
    """Each commit refines some rows; a run interrupted after any commit leaves the others unchanged."""
    from icar_jax.search.store import Store

    upsert, calls, wanted = Store.upsert, [], run_wanted(model, store)

    def stop(self, table):
        if len(calls) % 2:
            calls.append(0)
            raise KeyboardInterrupt
        calls.append(len(table))
        return upsert(self, table)

    monkeypatch.setattr(Store, "upsert", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, store)
    monkeypatch.undo()
    upgraded = sum(exit > 1 for (exit,) in rows(store, "exit").values())
    assert upgraded == calls[0] == 5
    done = run(model, store)
    assert done.images == wanted - 5 and sum(exit > 1 for (exit,) in rows(store, "exit").values()) == wanted


def run_wanted(model, store):
    """Number of rows that a run would refine: all with a score above the first threshold."""
    return sum(score > model.thresholds[0] for (score,) in rows(store, "complexity").values())


def test_what_searches_returned_comes_first(model, pictures, store, monkeypatch):
    held = rows(store, "complexity")
    complex_ones = sorted(path for path, (score,) in held.items() if score > model.thresholds[0])
    favourites = complex_ones[-2:]
    open_store(store).note_returned([*favourites, favourites[1], *complex_ones[:1]])
    order = []
    read = icar_jax.search.refine._read_row
    monkeypatch.setattr("icar_jax.search.refine._read_row", lambda row, p: (order.append(row["path"]), read(row, p))[1])
    run(model, store, order="returned", threads=1)
    assert order[0] == favourites[1] and set(order[1:3]) == {favourites[0], complex_ones[0]}
    assert sorted(order) == complex_ones


def test_files_that_changed_or_went_since(model, pictures, store):
    complex_ones = sorted(path for path, (score,) in rows(store, "complexity").items() if score > model.thresholds[0])
    changed, gone, spoilt = complex_ones[:3]
    size = os.stat(changed)
    Image.fromarray(picture(501)).save(changed)
    os.utime(changed, ns=(size.st_atime_ns, size.st_mtime_ns))
    os.unlink(gone)
    open(spoilt, "wb").write(b"spoilt")
    done = run(model, store)
    assert (done.gone, done.changed, done.bad, done.images) == (1, 2, 1, len(complex_ones) - 3)
    held, routed = rows(store, "exit", "complexity"), model.route([changed])
    assert held[changed] == (routed.exits[0], pytest.approx(routed.scores[0], abs=1e-6))
    assert gone in held and spoilt not in held
    assert [row["path"] for row in open_store(store).bad_rows().to_pylist()] == [spoilt]


def test_only_named_folders_and_captions_stay(model, tmp_path, pictures, store):
    (pictures / "captions.csv").write_text("file,caption\n" + "".join(f"{f.name},x\n" for f in pictures.glob("*.png")))
    index(model, pictures, store, captions=pictures / "captions.csv")
    assert run(model, store, [str(tmp_path / "elsewhere")]).wanted == 0
    assert run(model, store, [str(pictures)]).images > 0
    assert {caption for (caption,) in rows(store, "caption").values()} == {"x"}


def test_rows_without_a_score_and_checkpoints_that_are_no_bundle(model, clip_folder, pictures, tmp_path):
    index(model, pictures, tmp_path / "fixed", exit=1)
    done = run(model, tmp_path / "fixed")
    assert (done.unscored, done.images) == (23, 0) and "unscored, not refined 23" in done.report()
    with pytest.raises(CheckpointError, match="needs a bundle"):
        refine(tmp_path / "fixed", (), clip_folder, never)
    with pytest.raises(IndexingError, match="pass --checkpoint"):
        refine(tmp_path / "none", (), None, never)
    with pytest.raises(CheckpointError, match="cannot score images"):
        index(icar_jax.load(clip_folder), pictures, tmp_path / "new", checkpoint=clip_folder, cheap=True)


def test_other_thresholds_go_deeper_and_never_back(model, clip_folder, complexity_folder, store, tmp_path):
    first = run(model, store).images
    deeper = make_bundle(clip_folder, complexity_folder, tmp_path / "deeper", thresholds=(-1.0, -1.0))
    shallow = sum(exit < 3 for (exit,) in rows(store, "exit").values())
    done = refine(store, (), deeper, lambda path: icar_jax.load(path, batch_size=8), commit_rows=5)
    assert first > 0 and done.images == shallow > 0 and {exit for (exit,) in rows(store, "exit").values()} == {3}
    assert refine(store, (), model.path.parent, never).wanted == 0
    with pytest.raises(CheckpointError, match="icar calibrate"):  # a budget needs the scores of calibration images
        refine(store, (), deeper, lambda path: model, budget=0.9)


def test_the_commands(bundle, pictures, tmp_path, capsys):
    command = ["index", "--store", str(tmp_path / "store"), "--batch-size", "8"]
    cli.main([*command, str(pictures), "--checkpoint", str(bundle), "--pass", "cheap"])
    assert "1 blocks: 23 images (100.0%)" in capsys.readouterr().out
    cli.main([*command, "--pass", "refine", "--order", "returned"])
    assert "Refined " in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--pass", "refine", "--prune"])
    assert end.value.code == 2 and "leave out --prune" in capsys.readouterr().err
