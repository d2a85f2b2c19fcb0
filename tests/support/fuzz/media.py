"""Images, captions, ratings, labels and shards as inputs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import odd_images, ratedfiles, shardfiles
from tests.support.fuzz.reader import WrongSilence, refused
from tests.support.image_folders import put_images, put_karpathy

# Images


def read_image(folder: Path, data: bytes) -> tuple[int, int]:
    from icar_jax.data.images import decode

    (folder / "x.jpg").write_bytes(data)
    image = decode(folder / "x.jpg", at_least=64)
    if image.mode != "RGB" or image.tobytes() and len(image.tobytes()) != 3 * image.width * image.height:
        raise WrongSilence(f"decoded as {image.mode} {image.size}")
    return image.size


def image_seeds(folder: Path) -> list[bytes]:
    plain = odd_images.noise()
    made = [odd_images.saved(plain, name) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]
    made += [odd_images.saved(plain, "JPEG", progressive=True), odd_images.saved(plain.convert("RGBA"), "PNG")]
    made += [odd_images.jpeg_with_exif(odd_images.exif_block([odd_images.turned(6)]), plain)]
    made += [odd_images.tiff(np.full((8, 8), 4000, np.uint16), 16, maximum=4095)]
    return made


def handmade_images() -> dict[str, tuple[bytes, Any]]:
    plain = odd_images.noise()
    jpeg = odd_images.saved(plain, "JPEG", quality=95)
    odd = {f"tag {name}": (odd_images.jpeg_with_exif(odd_images.exif_block([tag]), plain), (64, 48))
           for name, tag in odd_images.ODD_TAGS.items()}  # fmt: skip
    turned = odd_images.jpeg_with_exif(odd_images.exif_block([odd_images.turned(6)]), plain)
    return odd | refused(
        eps=odd_images.EPS, claim=odd_images.claiming(jpeg, 13_000, 13_000), scans=odd_images.many_scans(256, 2_000),
        tiff=odd_images.tiff_sharing(300, 20_000), cut=jpeg[: len(jpeg) // 2], empty=b"", svg=b"<svg/>",
        tall=odd_images.flat_png(1, 200_000_000 // 8, 8, 0)[:200],
    ) | {"turned": (turned, (48, 64))}  # fmt: skip


# Captions, ratings, labels, shards


def captions(kind: str, folder: Path) -> list[bytes]:
    put_images(folder / "images", ["a.png", "b.png", "c.png"])
    if kind == "json":
        put_karpathy(folder, [("a.png", "train", ["one"], {}), ("b.png", "val", ["two", "zwei"], {"filepath": ""})])
        return [(folder / "dataset_tiny.json").read_bytes()]
    if kind == "token":
        return [b"a.png#0\tone\nb.png#0\ttwo, or so\n", b"image_name| comment_number| comment\na.png| 0| one\nb.png| 1   two\n"]
    if kind == "beside":
        return [b"one\ntwo\n", "größer".encode()]
    if kind == "csv":
        return [b'file,caption,split\na.png,one,train\nb.png,"two, or so",val\n']
    return [b'{"file": "a.png", "caption": "one"}\n{"file": "b.png", "caption": ["two", "zwei"], "split": "val"}\n']


def read_captions(file: str, folder: Path, data: bytes) -> list:
    from icar_jax.data.sources.folders import CaptionFolder

    (folder / file).write_bytes(data)
    source = CaptionFolder(folder, None)
    return [[record.name, list(record.captions), record.image().size] for record in map(source.__getitem__, range(len(source)))]


def released_seeds(folder: Path) -> list[bytes]:
    return [b'{"1": ["cat"], "laion_00000002": {"labels": ["dog"]}}', b'[{"id": "1", "label": 0}, {"imgid": 2, "label": -1}]']


def read_released(folder: Path, data: bytes) -> None:
    from icar_jax.data.ratings.released import join_labels

    (folder / "released.json").write_bytes(data)
    (folder / "manifest.tsv").write_bytes(b"1\thttps://a.org/1\nlaion_00000002\thttps://a.org/2\n")
    join_labels(folder / "released.json", manifest=folder / "manifest.tsv")


def manifest_seeds(folder: Path) -> list[bytes]:
    (folder / "released.json").write_bytes(b'{"laion_00000001": ["cat"], "laion_00000002": ["dog"]}')
    return [b"laion_00000001\thttps://a.org/1\tA cat\nlaion_00000002\thttps://a.org/2\t\n"]


def read_manifest(folder: Path, data: bytes) -> None:
    from icar_jax.data.ratings.released import join_labels

    (folder / "manifest.tsv").write_bytes(data)
    join_labels(folder / "released.json", manifest=folder / "manifest.tsv")


def embedding_seeds(kind: str, folder: Path) -> list[bytes]:
    rows, names = np.eye(4, 3, dtype=np.float32) + 0.5, np.array(["a", "b", "c", "d"])
    stream = io.BytesIO()
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"embedding": rows.tolist(), "name": names.tolist()}), stream)
    else:
        np.savez(stream, embeddings=rows, names=names)
    return [stream.getvalue()]


def read_embedding_file(kind: str, folder: Path, data: bytes) -> None:
    from icar_jax.evaluation.embeddings.files import read_embeddings

    (folder / f"images.{kind}").write_bytes(data)
    found = read_embeddings(folder / f"images.{kind}")
    if np.abs(np.linalg.norm(found.rows, axis=1) - 1).max() > 0.01:
        raise WrongSilence(f"rows of length {np.linalg.norm(found.rows, axis=1)}")


def pair_seeds(kind: str, folder: Path) -> list[bytes]:
    (folder / "images.npz").write_bytes(embedding_seeds("npz", folder)[0])
    return [b"[0, 1, 2, 3]", b'["a", "c", "b", "d"]'] if kind == "json" else [b"text,image\na,d\nb,c\nc,b\nd,a\n"]


def read_pair_file(kind: str, folder: Path, data: bytes) -> None:
    from icar_jax.evaluation.embeddings.files import read_embeddings, read_pairs

    (folder / f"pairs.{kind}").write_bytes(data)
    both = read_embeddings(folder / "images.npz")
    found = read_pairs(folder / f"pairs.{kind}", both, both)
    if found.shape != (4,) or not ((found >= 0) & (found < 4)).all():
        raise WrongSilence(f"pairs {found}")


def rating_seeds(kind: str, folder: Path) -> list[bytes]:
    ratedfiles.images(folder / "images", 3)
    if kind == "json":
        return [b'{"0 a.jpg": 0.1, "1 a.jpg": 0.5, "2 a.jpg": 0.9}', b'{"0 a.jpg": 0, "1 a.jpg": 1, "2 a.jpg": -1}']
    if kind == "csv":
        return [b"file,score\n0 a.jpg,0.1\n1 a.jpg,0.5\n2 a.jpg,0.9\n"]
    return [b"0 a.jpg  0.1\n1 a.jpg  0.5\n2 a.jpg  0.9\n"]


def read_rating_file(file: str, folder: Path, data: bytes) -> None:
    from icar_jax.data.ratings.table import read_ratings

    (folder / file).write_bytes(data)
    found = read_ratings(folder / file)
    if any(not 0 <= score <= 1 for score in found.scores.values()):
        raise WrongSilence(f"scores {found.scores}")


def read_label_file(folder: Path, data: bytes) -> None:
    from icar_jax.data.ratings.labels import read_labels

    (folder / "labels.json").write_bytes(data)
    read_labels(folder / "labels.json")


def label_seeds(folder: Path) -> list[bytes]:
    return [b'{"a.jpg": ["cat", "dog"], "b.jpg": {"categories": ["cat"]}, "c.jpg": []}']


def tar_seeds(folder: Path) -> list[bytes]:
    return [shardfiles.write_shards(folder / "shards", 1, 3).joinpath("00000.tar").read_bytes()]


def read_tar(folder: Path, data: bytes) -> None:
    from icar_jax.data.sources.webdataset import WebDataset

    for index in (folder / "shards").glob(".icar_index_*"):
        index.unlink()
    (folder / "shards" / "00000.tar").write_bytes(data)
    source = WebDataset(str(folder / "shards"))
    for i in range(len(source)):
        source[i].image()


def parquet_seeds(folder: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    rows = [{"image": shardfiles.picture(n), "caption": f"picture {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), stream)
    (folder / "rows").mkdir(exist_ok=True)
    return [stream.getvalue()]


def read_parquet(folder: Path, data: bytes) -> None:
    from icar_jax.data.sources.parquet import Parquet

    (folder / "rows" / "0.parquet").write_bytes(data)
    source = Parquet(str(folder / "rows"))
    for i in range(min(len(source), 10)):
        source[i].image()
