"""Files, folders, patterns and lists become paths: in order, each once, nothing silently skipped."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.data.sources.files import ImagePaths, NoImages
from icar_jax.files.formats import IMAGE_SUFFIXES
from icar_jax.files.walk import Walk


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b/2.jpg", "b/1.PNG", "b/deep/x.webp", "a.png", "notes.txt", ".hidden/h.jpg", "c [1].jpg", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_walked_in_the_order_of_names(tree):
    assert list(ImagePaths(["."])) == ["./a.png", "./b/1.PNG", "./b/2.jpg", "./b/deep/x.webp", "./c [1].jpg"]
    assert ImagePaths(["."]).count() == 5


def test_each_path_is_yielded_once(tree):
    paths = ImagePaths(["b/2.jpg", "./b/../b/2.jpg", "b", os.path.abspath("a.png"), "a.png"])
    assert list(paths) == ["b/2.jpg", "b/1.PNG", "b/deep/x.webp", os.path.abspath("a.png")]
    assert paths.duplicates == 3
    assert list(paths) and paths.duplicates == 3, "a second pass counts anew"


def test_progress_over_the_count_completes(tree):
    paths, passed = ImagePaths(["b", ".", "b/*.jpg"]), []
    given = list(paths.each(lambda: passed.append(1)))
    assert len(given) + len(passed) == paths.count() == 9 and len(passed) == paths.duplicates == 4


def test_patterns_and_names_that_look_like_patterns(tree):
    assert list(ImagePaths(["b/*.jpg"])) == ["b/2.jpg"]
    assert list(ImagePaths(["**/*.webp"])) == ["b/deep/x.webp"]
    both = ImagePaths(["b/**"])
    assert sorted(both) == ["b/1.PNG", "b/2.jpg", "b/deep/x.webp"] and both.duplicates == 0
    assert list(ImagePaths(["c [1].jpg"])) == ["c [1].jpg"]


def test_lists_are_read_as_streams(tree):
    taken = []

    def lines():
        for line in ("b/2.jpg\n", "\n", "b\r\n", "gone.png\n"):
            taken.append(line)
            yield line

    paths = iter(ImagePaths(["-"], lines()))
    assert next(paths) == "b/2.jpg" and len(taken) == 1
    assert list(paths) == ["b/1.PNG", "b/deep/x.webp", "gone.png"]
    assert ImagePaths(["a.png", "-"], lines()).count() is None


def test_missing_files_are_yielded_and_any_suffix_is_accepted(tree):
    assert list(ImagePaths(["gone.png", "notes.txt"])) == ["gone.png", "notes.txt"]


def test_nothing_found_is_an_error_and_an_empty_folder_is_named(tree):
    with pytest.raises(NoImages, match=r"looked in empty, \*\.bmp for files that end in .*\.jpg"):
        list(ImagePaths(["empty", "*.bmp"]))
    paths = ImagePaths(["empty", "a.png", "*.bmp"])
    assert list(paths) == ["a.png"] and paths.empty == ["empty", "*.bmp"]


def test_links_are_followed_except_cycles(tree):
    os.symlink(tree, tree / "b" / "up")
    os.symlink(tree / "a.png", tree / "b" / "link.png")
    assert "./b/link.png" in list(ImagePaths(["."]))
    assert not any("up" in path for path in ImagePaths(["."]))


names = st.text("abAB.", min_size=1, max_size=4).filter(lambda n: n.strip(".") and not n.startswith("."))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.lists(names, max_size=2), names, st.sampled_from([".jpg", ".PNG", ".txt", ""])), max_size=8))
def test_a_walk_equals_a_slow_search(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("walk")
    for folders, stem, suffix in files:
        path = root.joinpath(*(f"d{f}" for f in folders), stem + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    expected = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
    found = list(Walk().images(str(root)))
    assert sorted(found) == sorted(map(str, expected))
    assert [os.path.relpath(f, root).split(os.sep) for f in found] == sorted(
        os.path.relpath(f, root).split(os.sep) for f in found
    )
