"""Decoding of untrusted images, and serving of files of the store."""

import hashlib
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icar_jax.search.server.errors import RequestError
from icar_jax.search.server.pictures import Pictures, media_type, open_indexed, open_picture
from tests.support.serverkit import sent

# Decoding


@pytest.fixture(scope="module")
def whole():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    return [sent(image, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]


def test_formats_that_people_have(whole):
    for data in whole:
        picture = open_picture(data, "image", 10_000)
        assert picture.mode == "RGB" and picture.size == (64, 48)


def test_a_bomb_is_refused_before_it_goes_off():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b"")
    with pytest.raises(RequestError, match="exceed the limit of 50,000,000 pixels") as refused:
        open_picture(bomb, "image", 50_000_000)
    assert refused.value.status == 422
    with pytest.raises(RequestError, match="64 x 48 exceed the limit of 3,071"):
        open_picture(sent(Image.new("RGB", (64, 48))), "image", 3071)


def test_formats_that_run_programs_are_not_opened():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(RequestError, match="not an image file of a format that is read"):
        open_picture(script, "image", 10_000)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_picture_or_a_reason(data, whole):
    """Valid files with some bytes changed and the end cut off, and empty data."""
    base = bytearray(data.draw(st.sampled_from([*whole, b""])))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, max(0, len(base) - 1)), st.integers(0, 255)), max_size=6)):
        if base:
            base[place] = value
    cut = data.draw(st.integers(0, len(base)))
    try:
        picture = open_picture(bytes(base[:cut]), "image", 1_000_000)
        assert picture.mode == "RGB" and picture.width * picture.height <= 1_000_000
    except RequestError as refused:
        assert refused.status == 422 and refused.reason.startswith("image") and "\n" not in refused.reason


# Serving


@pytest.fixture
def one(tmp_path):
    """(folder, path, SHA-256) of an indexed image."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    path = folder / "a.png"
    path.write_bytes(sent(Image.new("RGB", (600, 300), "red")))
    return folder, path, hashlib.sha256(path.read_bytes()).hexdigest()


def served(path, sha256, **options):
    return Pictures(lambda wanted: [str(path)] if wanted == sha256 else [], 1_000_000, 100_000, **options)


def read_indexed(*args, **options):
    with open_indexed(*args, **options) as file:
        return file.read()


def original(pictures, sha256):
    with pictures.original(sha256) as file:
        return file.read(), media_type(file)


def refusal(pictures, sha256):
    with pytest.raises(RequestError) as refused:
        pictures.original(sha256)
    assert refused.value.status == 404
    return refused.value.kind


def test_a_picture_and_its_preview(one):
    _, path, sha256 = one
    pictures = served(path, sha256)
    assert original(pictures, sha256) == (path.read_bytes(), "image/png")
    preview = open_picture(pictures.preview(sha256, 320), "preview", 1_000_000)
    assert preview.size == (320, 160)
    path.unlink()
    assert pictures.preview(sha256, 320), "kept in memory"
    assert refusal(pictures, sha256) == "image-gone"
    assert refusal(pictures, "0" * 64) == "image-unknown"


def test_only_the_bytes_that_were_indexed(one, tmp_path):
    folder, path, sha256 = one
    pictures = served(path, sha256)
    secret = tmp_path / "secret.png"
    secret.write_bytes(sent(Image.new("RGB", (9, 9), "blue")))
    path.unlink()
    path.symlink_to(secret)
    assert refusal(pictures, sha256) == "image-link"
    assert refusal(served(path, sha256, follow_links=True), sha256) == "image-changed"
    path.unlink()
    path.write_bytes(secret.read_bytes())
    assert refusal(pictures, sha256) == "image-changed"
    path.unlink()
    path.mkdir()
    assert refusal(pictures, sha256) in ("image-changed", "image-gone")
    path.rmdir()
    os.mkfifo(path)  # a blocking open would wait for a writer
    assert refusal(pictures, sha256) == "image-changed"


def test_links_within_the_folder_and_folders_that_are_links(one, tmp_path):
    folder, path, sha256 = one
    (folder / "b.png").symlink_to(path)
    assert read_indexed(str(folder / "b.png"), sha256) == path.read_bytes()
    (tmp_path / "other name").symlink_to(folder)
    assert read_indexed(str(tmp_path / "other name" / "a.png"), sha256) == path.read_bytes()
    (tmp_path / "outside.png").write_bytes(path.read_bytes())
    (folder / "c.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(RequestError, match="link out of its folder"):
        read_indexed(str(folder / "c.png"), sha256)
    assert read_indexed(str(folder / "c.png"), sha256, follow_links=True) == path.read_bytes()


def test_a_link_to_a_folder_leads_out_of_what_was_indexed_too(one, tmp_path):
    folder, path, sha256 = one
    (folder / "deep").mkdir()
    (tmp_path / "inbox").symlink_to(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.png").write_bytes(path.read_bytes())
    (folder / "link").symlink_to(outside)
    (folder / "inside").symlink_to(folder / "deep")
    (folder / "deep" / "c.png").write_bytes(path.read_bytes())
    (folder / "d.png").symlink_to(outside / "b.png")
    roots = [str(folder)]
    for name in ("link/b.png", "d.png"):
        with pytest.raises(RequestError, match="out of the indexed folders") as refused:
            read_indexed(str(folder / name), sha256, roots=roots)
        assert (refused.value.status, refused.value.kind) == (404, "image-link")
        assert read_indexed(str(folder / name), sha256, follow_links=True, roots=roots)
        # The target or the link itself was indexed explicitly.
        assert read_indexed(str(folder / name), sha256, roots=[*roots, str(outside)])
        assert read_indexed(str(folder / name), sha256, roots=[*roots, str(folder / name)])
    assert read_indexed(str(folder / "a.png"), sha256, roots=roots)
    assert read_indexed(str(folder / "inside" / "c.png"), sha256, roots=roots)
    assert read_indexed(str(tmp_path / "inbox" / "a.png"), sha256, roots=[str(tmp_path / "inbox")]), "a root may be a link"
    (outside / "e.png").symlink_to(path)
    with pytest.raises(RequestError, match="link out of its folder"):  # not below a root
        read_indexed(str(outside / "e.png"), sha256, roots=roots)
    pictures = Pictures(lambda _: [str(folder / "link" / "b.png")], 1_000_000, 100_000, roots=lambda: roots)
    assert refusal(pictures, sha256) == "image-link"


def test_a_picture_that_moved_is_found_again(one):
    folder, path, sha256 = one
    where = [str(path)]
    pictures = Pictures(lambda _: where, 1_000_000, 100_000)
    pictures.remember([(sha256, str(path))])
    path.rename(folder / "moved.png")
    where[:] = [str(path), str(folder / "moved.png")]
    assert original(pictures, sha256)[0] == (folder / "moved.png").read_bytes()


def test_previews_are_kept_within_bounds(tmp_path):
    rng = np.random.default_rng(0)
    paths = {}
    for i in range(12):
        path = tmp_path / f"{i}.png"
        path.write_bytes(sent(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))))
        paths[hashlib.sha256(path.read_bytes()).hexdigest()] = [str(path)]
    pictures = Pictures(lambda sha256: paths[sha256], 1_000_000, 20_000)
    for sha256 in paths:
        pictures.preview(sha256, 320)
        assert pictures._cached == sum(map(len, pictures._cache.values())) <= 20_000
    assert 1 < len(pictures._cache) < 12
    before = pictures.hits
    pictures.preview(list(paths)[-1], 320)
    assert pictures.hits == before + 1
