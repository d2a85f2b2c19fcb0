"""Writers of tiny data sets in every layout that is read: tests and benchmarks/data.py make their own files with them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, side: int = 12, format: str = "PNG") -> bytes:
    """An image file of random pixels, different for every seed."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), np.uint8)).save(stream, format)
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, content) members in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, image: bytes, caption: str, extension: str = "jpg") -> list[tuple[str, bytes]]:
    """The three members that img2dataset writes for a picture."""
    described = json.dumps({"key": key, "caption": caption, "url": f"http://example.org/{key}"}).encode()
    return [(f"{key}.{extension}", image), (f"{key}.json", described), (f"{key}.txt", caption.encode())]


def write_shards(folder: Path, shards: int, per_shard: int, first: int = 0) -> Path:
    """`shards` tars of `per_shard` pictures each; picture n has the caption 'picture n'."""
    for s in range(first, first + shards):
        numbers = range(s * per_shard, (s + 1) * per_shard)
        members = [m for n in numbers for m in sample(f"{n:06}", picture(n), f"picture {n}")]
        write_tar(folder / f"{s:05}.tar", members)
    return folder


def write_array_records(root: Path, dataset: str, shards: dict[str, list[int]], image=picture) -> Path:
    """A TFDS data set like coco_captions, as ArrayRecord files with their metadata; returns `root`.

    TFDS itself needs TensorFlow to write an Image feature, so the records are its own protocol buffers filled by hand.
    `shards` has the number of pictures of each shard of each split.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / dataset / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)}),
        }
    )
    features.save_config(str(folder))
    splits, number = [], 0
    for split, counts in shards.items():
        for s, count in enumerate(counts):
            path = folder / f"{dataset}-{split}.array_record-{s:05}-of-{len(counts):05}"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for _ in range(count):
                example = tf_example_pb2.Example()
                feature = example.features.feature
                feature["image"].bytes_list.value.append(image(number))
                feature["image/filename"].bytes_list.value.append(f"{number}.png".encode())
                texts = [f"picture {number}", f"number {number}"][: 1 + number % 2]
                feature["captions/text"].bytes_list.value.extend(t.encode() for t in texts)
                feature["captions/id"].int64_list.value.extend(range(len(texts)))
                writer.write(example.SerializeToString())
                number += 1
            writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths = [str(c) for c in counts]
        splits.append({"name": split, "shardLengths": lengths, "numBytes": "1", "filepathTemplate": template})
    info = {"name": dataset, "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return root
