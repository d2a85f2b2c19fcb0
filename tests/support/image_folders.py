"""Folders of pictures with and without captions."""

import json

from PIL import Image


def put_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), (i, 0, 0)).save(folder / name)


def put_karpathy(root, entries, name="dataset_tiny.json"):
    images = [
        {"filename": f, "split": s, "sentences": [{"raw": c} for c in captions]} | extra for f, s, captions, extra in entries
    ]
    (root / name).write_text(json.dumps({"images": images, "dataset": "tiny"}))
