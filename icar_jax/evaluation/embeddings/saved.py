"""Saves the embeddings of an evaluation, in files that `icar evaluate-embeddings` reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from icar_jax.evaluation.embeddings.files import write_embeddings
from icar_jax.evaluation.routing.gallery import Gallery
from icar_jax.models.reduction.routes import in_cost_order
from icar_jax.workdir import write_text

FOLDER = "embeddings"  # in the workdir


def save_gallery(gallery: Gallery, far: Gallery | None, folder: Path) -> str:
    """Writes images.npz (full depth), images_exit_<blocks>.npz, with routing images_routed.npz, and texts.npz to `folder`.

    With category labels also labels.json. Those of distractors get the prefix distractor_. Images have `names`, texts `image`,
    the row of their image. Returns a sentence on what was written. Raises OSError.
    """
    written = []
    for prefix, each in (("", gallery), ("distractor_", far)):
        if each is None:
            continue
        names = np.array(each.names)
        order = in_cost_order(each.by_exit)
        runs = {f"images_exit_{exit}": each.by_exit[exit] for exit in order[:-1]} | {"images": each.by_exit[order[-1]]}
        if each.routed is not None:
            runs["images_routed"] = each.routed
        for name, rows in runs.items():
            write_embeddings(folder / f"{prefix}{name}.npz", rows, names=names)
            written.append(f"{prefix}{name}.npz")
        write_embeddings(folder / f"{prefix}texts.npz", each.texts, image=each.caption_image)
        written.append(f"{prefix}texts.npz")
        if any(each.labels):  # which may have been joined by URL
            labels = {name: list(found) for name, found in zip(each.names, each.labels, strict=True)}
            write_text(folder / f"{prefix}labels.json", json.dumps(labels, ensure_ascii=False) + "\n")
            written.append(f"{prefix}labels.json")
    return f"Embeddings: {folder}: {', '.join(written)}"
