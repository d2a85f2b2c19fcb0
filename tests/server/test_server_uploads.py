"""Two hundred damaged uploads: each gets an error message, and the server keeps running."""

import gzip
import struct
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax.search.server.settings import ServerSettings
from tests.support import serverkit

LIMITS = {"max_upload_bytes": 300_000, "max_pixels": 1_000_000}
KINDS = {kind: f"image/{kind.lower()}" for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")}


def png(width, height, data=b"", kind=2):
    """A PNG with a given size in its header."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def crafted(whole):
    """Malicious image files, and data that are not images."""
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\x00\x00\xff\xff\xff\x00\x00\x00,"
    gif += struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02L\x01\x00;"
    yield from (b"", b"\0", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\x04\0\0\0WEBP", b"II*\0\xff\xff\xff\xff")
    yield b"BM" + bytes(60)
    yield png(30_000, 30_000, zlib.compress(bytes(200_000)))
    yield png(2**31 - 1, 2**31 - 1, b"")
    yield png(0, 0, b"")
    yield png(100, 100, zlib.compress(bytes(10)))
    yield png(1001, 1000, zlib.compress(bytes(3_000_000)))
    yield gif
    yield whole["JPEG"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff", 1)
    yield whole["BMP"][:18] + struct.pack("<ii", 60_000, 60_000) + whole["BMP"][26:]
    yield gzip.compress(whole["PNG"])
    yield b"PK\x03\x04" + bytes(100)
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"
    yield b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    yield b"<html><script>alert(1)</script></html>"
    yield b"\x00\x00\x00\x20ftypheic" + bytes(50)
    yield bytes(300_001)
    yield whole["PNG"] + bytes(400_000)


def mutations(rng, whole, n):
    """Valid files truncated, partly overwritten or shuffled; most are no longer images."""
    for _ in range(n):
        data = bytearray(whole[list(whole)[rng.integers(len(whole))]])
        how = rng.integers(4)
        if how == 0:
            del data[int(rng.integers(1, len(data))) :]
        elif how == 1:
            start = int(rng.integers(0, 40))
            data[start : start + 30] = rng.bytes(30)
        elif how == 2:
            for place in rng.integers(0, len(data), 60):
                data[place] = rng.integers(256)
        else:
            cut = int(rng.integers(1, len(data)))
            data = data[cut:] + data[:cut]
        yield bytes(data)


@pytest.fixture(scope="module")
def address(clip_folder, complexity_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    model = icar_jax.load(serverkit.make_bundle(clip_folder, complexity_folder, folder / "bundle"), batch_size=8)
    serverkit.fill(folder / "store", model, serverkit.draw(folder / "pictures", 8))
    with serverkit.running(serverkit.backend(folder / "store", model), ServerSettings(port=0, **LIMITS)) as address:
        yield address


def test_two_hundred_damaged_uploads(address):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    whole = {kind: serverkit.sent(image, kind) for kind in KINDS}
    damaged = [*crafted(whole)]
    damaged += mutations(rng, whole, 200 - len(damaged))
    types = [*KINDS.values(), "application/octet-stream", "text/html", "image/svg+xml", ""]
    statuses = []
    with httpx.Client(base_url=address, timeout=60) as client:
        for i, data in enumerate(damaged):
            file = (f"../../{i}\u202e.png", data, types[i % len(types)])
            answer = client.post("/api/search/image", files={"image": file})
            statuses.append(answer.status_code)
            if answer.status_code != 200:  # some damaged images are still readable
                assert answer.status_code in (413, 422), (i, answer.text)
                assert set(answer.json()) == {"detail"} and answer.json()["detail"] and "\n" not in answer.json()["detail"]
                assert "Traceback" not in answer.text and ".py" not in answer.text and "0x" not in answer.text, answer.text
        assert len(statuses) == 200 and statuses.count(422) > 100 and statuses.count(413) == 2
        for kind, data in whole.items():
            assert client.post("/api/search/image", files={"image": ("a", data, KINDS[kind])}).status_code == 200
        assert client.get("/readyz").status_code == 200
        assert 'status="500"' not in client.get("/metrics").text


BOUNDARY = b"--x\r\n"
PART = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


@pytest.mark.parametrize("body", [
    b"", b"--x--\r\n", BOUNDARY, BOUNDARY + PART, BOUNDARY + PART + b"data", b"\r\n\r\n", b"--y\r\n" + PART + b"data\r\n--y--",
    BOUNDARY + b"Content-Disposition: form-data\r\n\r\nx\r\n--x--", BOUNDARY + b"x" * 9000 + b"\r\n\r\nx\r\n--x--",
    BOUNDARY + b'Content-Disposition: form-data; name="image"\r\n\r\nno file\r\n--x--',
    b"".join(BOUNDARY + PART + b"x\r\n" for _ in range(50)) + b"--x--", b"\xff" * 1000,
], ids=range(12))  # fmt: skip
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", "multipart/form-data; boundary=",
                                  "multipart/mixed; boundary=x", "image/png"])  # fmt: skip
def test_damaged_wrapping(address, body, kind):
    answer = httpx.post(f"{address}/api/search/image", content=body, headers={"content-type": kind}, timeout=60)
    assert answer.status_code == 422 and set(answer.json()) == {"detail"}, answer.text
