"""Unreadable folders are listed like bad files; other files are processed, and their contents are not treated as deleted."""

import csv
import os

import pytest
from PIL import Image

import icar_jax
from icar_jax.data.sources.files import ImagePaths, unlisted, vanished
from icar_jax.inference.files.corpus import BAD
from icar_jax.inference.files.embedding import embed_files
from icar_jax.search.opening import open_store
from tests.support import collected
from tests.support.collected import draw, index, picture, rows


@pytest.fixture(scope="module")
def model(clip_folder, complexity_folder, tmp_path_factory):
    return icar_jax.load(collected.bundle(clip_folder, complexity_folder, tmp_path_factory.mktemp("b")), batch_size=8)


@pytest.fixture
def tree(tmp_path):
    """A folder of 3 images, with subfolders 'lost' (2 images) and 'more' (1 image)."""
    home = draw(tmp_path / "pictures", 3)
    draw(home / "lost", 2, seed=1)
    draw(home / "more", 1, seed=2)
    return home


@pytest.fixture
def locked(monkeypatch):
    """locked(folder) makes a folder unreadable, also for a superuser, who ignores file modes."""
    closed = []

    def guard(name, below):
        real = getattr(os, name)

        def guarded(path=".", *args, **options):
            text = path if isinstance(path, str) else os.fspath(path) if isinstance(path, os.PathLike) else ""
            if any(text.startswith(f"{folder}/") or (text == folder and not below) for folder in closed):
                raise PermissionError(13, "Permission denied", text)
            return real(path, *args, **options)

        monkeypatch.setattr(os, name, guarded)

    guard("scandir", below=False)
    guard("stat", below=True)
    guard("lstat", below=True)
    return lambda *folders: closed.__setitem__(slice(None), map(str, folders))


def test_the_walk_continues(tree, locked):
    assert len(list(ImagePaths([str(tree)]))) == 6
    locked(tree / "lost")
    paths = ImagePaths([str(tree)])
    found = [os.path.relpath(path, tree) for path in paths]
    assert found == ["0_000.png", "0_001.png", "0_002.png", "lost", "more/2_000.png"]
    assert paths.count() == 5 and paths.empty == [] and paths.folders == [str(tree)]
    assert sorted(ImagePaths([str(tree / "**")])) == sorted(os.path.join(tree, name) for name in found)
    assert list(ImagePaths([str(tree / "lost")])) == [str(tree / "lost")]


def test_a_link_to_an_inaccessible_place(tree, locked):
    (tree / "link").symlink_to(tree / "lost" / "deep")
    (tree / "loop").symlink_to(tree / "loop")
    assert "loop" not in [os.path.basename(path) for path in ImagePaths([str(tree)])]


def test_inaccessible_files_have_not_vanished(tree, locked):
    locked(tree / "lost")
    assert not vanished(str(tree / "lost" / "1_000.png")) and not vanished(str(tree / "0_000.png"))
    assert vanished(str(tree / "none.png")) and vanished(str(tree / "0_000.png" / "below")) and vanished("\0")
    assert unlisted(str(tree / "lost")) == "Permission denied"
    assert unlisted(str(tree)) is None and unlisted(str(tree / "0_000.png")) is None


def test_the_rest_is_indexed_and_no_row_is_lost(model, tree, locked, tmp_path):
    store = tmp_path / "store"
    assert index(model, tree, store).added == 6
    Image.fromarray(picture(77)).save(tree / "more" / "new.png")
    (tree / "0_000.png").unlink()
    locked(tree / "lost")
    done = index(model, tree, store, prune=True)
    assert (done.added, done.bad, done.removed, done.gone, done.unchanged) == (1, 1, 1, 0, 3)
    assert sum("/lost/" in path for path in rows(store)) == 2
    (bad,) = open_store(store).bad_rows().to_pylist()
    assert bad["path"] == str(tree / "lost") and bad["size"] is None
    assert "contents cannot be read" in bad["reason"] and "Permission denied" in bad["reason"]
    done = index(model, [tree / "lost", tree], store, prune=True, prune_missing=True)
    assert (done.still_bad, done.bad, done.removed) == (1, 0, 0) and len(rows(store)) == 6
    locked()
    done = index(model, tree, store, prune=True)
    assert (done.bad, done.still_bad, done.removed, done.unchanged) == (0, 0, 0, 6)
    assert not len(open_store(store).bad_rows())


def test_embed_lists_the_folder(model, tree, locked, tmp_path):
    locked(tree / "lost")
    done = embed_files(model, ImagePaths([str(tree)]), tmp_path / "corpus")
    assert (done.total, done.bad) == (4, 1)
    with open(tmp_path / "corpus" / BAD, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["file"] == str(tree / "lost") and "Permission denied" in row["reason"]
