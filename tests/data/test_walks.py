"""Walks of odd folders: loops, special files, depth, hidden files, exclusions; and names that spell files another way."""

import os
import socket
import stat
import subprocess
import unicodedata

import pytest

from icar_jax.data.ratings.sources import _lookup
from icar_jax.data.sources.files import ImagePaths
from icar_jax.data.sources.folders import CaptionFolder, image_files, read_captions
from icar_jax.data.sources.names import FileNames, plain_text
from icar_jax.data.sources.shards import texts
from icar_jax.errors import DataError
from icar_jax.files.opening import NotRegular, TooLarge, make_staging, open_regular, read_regular
from icar_jax.files.walk import Walk
from icar_jax.inference.files.scoring import _prepare
from icar_jax.inference.files.stream import read_image
from icar_jax.inference.reading import BadFile, read_or_bad
from icar_jax.search.captions import Captions
from tests.support import odd_images as odd


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def below(folder, **options):
    return [os.path.relpath(path, folder) for path in ImagePaths([str(folder)], **options)]


# Walks


def test_loops_and_fans_of_links_are_visited_once(tmp_path):
    touch(tmp_path, "0.jpg", "z/1.jpg")
    (tmp_path / "l1").symlink_to("."), (tmp_path / "l2").symlink_to("."), (tmp_path / "z" / "up").symlink_to("..")
    for i in range(30):  # each level has two links to the next: 2^30 paths
        level = tmp_path / f"fan{i}"
        level.mkdir()
        (level / "a").symlink_to(f"../fan{i + 1}"), (level / "b").symlink_to(f"../fan{i + 1}")
    touch(tmp_path, "fan30/2.jpg")
    assert below(tmp_path) == ["0.jpg", "fan30/2.jpg", "z/1.jpg"]
    assert list(ImagePaths([str(tmp_path / "**/*.jpg")])) == [str(tmp_path / n) for n in ("0.jpg", "fan30/2.jpg", "z/1.jpg")]
    assert image_files(tmp_path) == {"0.jpg", "fan30/2.jpg", "z/1.jpg"}


def test_a_folder_keeps_its_own_name_beside_a_link_to_it(tmp_path):
    touch(tmp_path / "photos", "z/1.jpg")
    touch(tmp_path / "outside", "2.jpg")
    (tmp_path / "photos" / "a").symlink_to("z"), (tmp_path / "photos" / "b").symlink_to(tmp_path / "outside")
    assert below(tmp_path / "photos") == ["z/1.jpg", "b/2.jpg"]


def test_depth_has_no_limit_of_recursion(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        here, old = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(old)
    os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    assert below(tmp_path) == ["d/" * 1500 + "x.jpg"]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # shutil.rmtree is recursive


def test_hidden_files_system_folders_exclusions_and_other_formats_are_counted(tmp_path):
    touch(tmp_path, "a.jpg", "._a.jpg", ".b.png", "@eaDir/a.jpg/T.jpg", ".thumbs/a.jpg", "#recycle/c.jpg", "d.HEIC", "e.heic")
    touch(tmp_path, "raw/f.nef", "raw/f.jpg", "old/g.jpg", "new/old.jpg", "new/deep/h.png", "notes.txt")
    paths = ImagePaths([str(tmp_path)], exclude=["old", "new/deep", "*.png"])
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["a.jpg", "new/old.jpg", "raw/f.jpg"]
    left = paths.left_out
    assert (left.hidden, left.folders, left.excluded) == (2, 3, 2) and left.unread[".nef"] == 1
    assert left.report().startswith("Left out: 2 hidden images, 3 hidden and system folders, 2 excluded by --exclude")
    assert paths.count() == 3 and paths.left_out is left
    assert Walk().left_out.report() == ""


@pytest.mark.parametrize("pattern, expected", [
    ("**/*.jpg", ["a.jpg", "b/c.jpg", "b/d/e.jpg"]), ("b/**/e.jpg", ["b/d/e.jpg"]), ("**/d/*", ["b/d/e.jpg", "b/d/f.png"]),
    ("b/**", ["b/c.jpg", "b/d/e.jpg", "b/d/f.png", "b/g.txt"]), ("*/*.jpg", ["b/c.jpg"]),
    ("**/[e-f].*", ["b/d/e.jpg", "b/d/f.png"]),
])  # fmt: skip
def test_patterns_match_as_those_of_the_glob_module(tmp_path, monkeypatch, pattern, expected):
    import glob

    touch(tmp_path, "a.jpg", "b/c.jpg", "b/d/e.jpg", "b/d/f.png", "b/g.txt", "b/.h.jpg")
    monkeypatch.chdir(tmp_path)
    assert (
        sorted(ImagePaths([pattern])) == expected == sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    )


# Special files


@pytest.fixture
def special(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    os.mkfifo("pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "a.txt").touch()
    yield tmp_path
    listener.close()


@pytest.mark.parametrize("name, what", [("pipe.jpg", "a pipe"), ("zero.png", "a device"), ("socket.jpg", "a socket")])
def test_special_files_are_bad_files_and_never_waited_on(special, name, what):
    from icar_jax.data.images import Preprocess

    for read in (lambda path: read_image(path, {"clip": Preprocess(8)}), lambda path: _prepare(path, Preprocess(8))):
        bad = read_or_bad(name, read)
        assert isinstance(bad, BadFile) and bad.reason.endswith(f"expected a regular file, found {what}")
    with pytest.raises(NotRegular):
        open_regular(name)
    assert name in [os.path.basename(path) for path in ImagePaths([str(special)])]


def test_sizes_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(TooLarge, match="5 bytes exceed the limit of 4 bytes"):
        read_regular(tmp_path / "a", 4)
    assert read_regular("/proc/self/status", 1 << 20).startswith(b"Name:"), "a size of 0 that is not true"


@pytest.mark.parametrize("name", ["a.jpg\0b.jpg", "\0"])
def test_a_nul_in_a_list_is_named(name):
    (path,) = ImagePaths(["-"], [name + "\n"])
    bad = read_or_bad(path, lambda path: pytest.fail("opened"))
    assert "\0" not in bad.file and "NUL" in bad.reason


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_staging_folders_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = make_staging(tmp_path / ("é" * 127))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


# Names and texts of captions


@pytest.fixture
def named(tmp_path):
    names = [
        unicodedata.normalize("NFD", "café.jpg"),
        unicodedata.normalize("NFC", "naïve.jpg"),
        "sub/a.jpg",
        "Case.JPG",
        "d.ppm",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(odd.saved(odd.noise(), "JPEG"))
    return tmp_path


def test_captions_find_files_that_are_spelled_another_way(named, caplog):
    rows = [
        "café.jpg,1",
        unicodedata.normalize("NFD", "naïve.jpg") + ",2",
        "sub\\a.jpg,3",
        "case.jpg,4",
        "d.ppm,5",
        "gone.jpg,6",
    ]
    (named / "captions.csv").write_text("file,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    source = CaptionFolder(named)
    assert [source[i].captions[0] for i in range(len(source))] == ["1", "2", "3", "5"]
    assert source[0].image().size == source[2].image().size == (64, 48)
    assert source.missing == ["case.jpg", "gone.jpg"] and source.uncaptioned == ["Case.JPG"]
    assert "case.jpg (there is Case.JPG, which differs in upper and lower case), gone.jpg" in caplog.text
    known, _ = _lookup(named, image_files(named))
    assert known("sub\\a.jpg") == "sub/a.jpg" and known("case.jpg") is None and known("café.jpg") is not None


def test_captions_of_a_store_do_too(named):
    (named / "captions.csv").write_text("file,caption\ncafé.jpg,1\nsub\\a.jpg,3\ncase.jpg,4\n", encoding="utf-8")
    captions = Captions(named / "captions.csv")
    nfd = unicodedata.normalize("NFD", "café.jpg")
    assert [captions.get(str(named / name)) for name in (nfd, "sub/a.jpg", "Case.JPG", "d.ppm")] == ["1", "3", None, None]
    assert captions.said_of_case().endswith(f"case.jpg is not the file {named / 'Case.JPG'}: upper and lower case differ")


def test_a_name_finds_no_file_outside_of_its_folder(named):
    (named.parent / "outside.jpg").touch()
    names = FileNames({"sub/a.jpg"}, named)
    assert names.find("../outside.jpg") is None and names.find(str(named.parent / "outside.jpg")) is None
    assert names.find("\0") is None and names.find("x" * 5000) is None


def test_half_a_character_becomes_the_replacement_character(tmp_path, caplog):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "a.jpg", "caption": "A dog \\ud83d"}\n{"file": "a.jpg", "caption": "\\ud83d\\ude00"}\n'
    )
    assert CaptionFolder(tmp_path, None)[0].captions == ("A dog \ufffd", "\U0001f600")
    assert "captions.jsonl, line 1: half of a character" in caplog.text and "line 2" not in caplog.text
    assert texts(["\ud83d dog"]) == ("\ufffd dog",) and plain_text("a\udfffb") == "a\ufffdb"


@pytest.mark.parametrize("text, why", [
    ("[]", "expected Karpathy's JSON"), ('{"images": 3}', "expected Karpathy's JSON"),
    ("[" * 100_000, "expected Karpathy's JSON"),
    ('{"images": [3]}', r"images\[0\]: expected `filename`"), ('{"images": {"a": 1}}', "an object with a list `images`"),
    ('{"images": [{"filename": "a", "sentences": 3}]}', r"images\[0\]: expected `filename`"),
])  # fmt: skip
def test_captions_of_another_shape_are_one_error(tmp_path, text, why):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=f"dataset.json.*{why}"):
        read_captions(tmp_path / "dataset.json")
    (tmp_path / "c.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match="c.jsonl, line 1: nested deeper than the limit"):
        read_captions(tmp_path / "c.jsonl")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(OSError, match="found a pipe"):
        read_captions(tmp_path / "pipe.csv")
