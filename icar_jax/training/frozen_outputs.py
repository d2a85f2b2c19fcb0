"""Outputs of frozen trunks (config.train.cache_frozen): computed once, kept on disk, and read in place of images and captions.

Heads read pooled tokens. Where the tower below them is frozen, these are the same in every epoch, so a run that only trains
heads need not run the tower again. The folder of an output is named by a hash of all that it depends on: the frozen
parameters and their architecture, the preprocessing and augmentation, the images or the captions, and the precision.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from icar_jax import pytree
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data import augment, configured
from icar_jax.data.augment import Augment
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.loader.kept import DTYPES, TRUNCATED, KeptOutputs, KeptRows
from icar_jax.data.records import Record, Source, Subset
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch
from icar_jax.parallel.mesh import batch_sharding, batch_shards
from icar_jax.training.optimizer import TRUNKS, trainable
from icar_jax.training.output_folders import RowWriter, folder_of, held, make_room, root_of
from icar_jax.training.preemption import StopRequest

IMAGE, TEXT = "image_pooled", "text_pooled"  # entries of a batch
_BATCH = 64
_STEP = 8  # tokens; shorter batches of captions have a multiple of it, so that few programs are compiled
_CAPTIONS = 16  # batches of captions that are sorted by length before they run
_SAVE_EVERY = 16  # batches between two states that a stopped computation resumes from


def parts(config: ExperimentConfig, shapes: pytree.Tree, arch: ClipArch) -> tuple[bool, bool]:
    """Returns whether the outputs of the image trunk and of the text trunk are kept. Raises ConfigError where none can be."""
    t = config.train
    if not t.cache_frozen:
        return False, False
    frozen = {
        name: not any(trainable(path, t.freeze) for path in pytree.flatten(shapes) if re.search(pattern, path))
        for name, pattern in TRUNKS.items()
    }
    wrong = ""
    if not any(frozen.values()):
        wrong = f"keeps outputs of frozen trunks, and config.train.freeze={t.freeze} freezes none; add 'image_trunk'"
    elif jax.process_count() > 1:
        wrong = f"keeps outputs on one host, and this run has {jax.process_count()} processes; set it to False"
    elif config.loss.cross or config.loss.distill_init:
        wrong = "leaves out the towers that config.loss.cross and config.loss.distill_init read; set these to 0, or it to False"
    elif frozen["image_trunk"]:
        if not arch.vision.reads_pooled:
            wrong = "keeps pooled tokens, and heads with attention read all tokens; use config.clip.exit_head=linear"
        elif arch.vision.schedules or t.layer_dropout:
            wrong = "keeps the outputs of one tower, which schedules drawn a step and config.train.layer_dropout change"
        elif _augment(config).random != (t.cache_views > 1):
            wrong = (
                f"with config.train.cache_views={t.cache_views}: that number of augmented views of each image is kept; use a "
                "number above 1 with augmentation (config.data.flip, crop_scale, ...) and 1 without"
            )
    if wrong:
        raise ConfigError(f"config.train.cache_frozen=True {wrong}")
    return frozen["image_trunk"], frozen["text_trunk"]


def kept_outputs(
    config: ExperimentConfig, clip: Graph[Clip], preprocess: Preprocess, source: Source, tokenizer: Tokenizer,
    params: Mapping[str, Any], mesh: Mesh, request: StopRequest,
) -> KeptOutputs | None:  # fmt: skip
    """Returns the kept outputs of a run, computing those that are absent; None if a stop signal arrived.

    A computation that was stopped is resumed. Raises ConfigError if the outputs do not fit config.train.cache_gb.
    """
    image, text = parts(config, clip.shapes, clip.arch)
    root = root_of(config.train)
    found: dict[str, KeptRows] = {}
    dtype = "float32" if config.train.dtype == "float32" else "bfloat16"
    if image:
        vision, views = clip.arch.vision, config.train.cache_views
        shape = (len(vision.read_blocks), vision.parts, vision.width)
        about = {
            "arch": _trunk_fields(vision), "params": _digest(params["vision"], "image_trunk"), "views": views,
            "preprocess": preprocess.to_dict(), "images": _image_digest(source), "dtype": config.train.dtype,
            "augment": _drawn(config) if views > 1 else None,
        }  # fmt: skip
        found["image"] = KeptRows(folder_of(root, "image", about), shape, dtype, views)
    if text:
        tower = clip.arch.text
        shape = (tower.width,) if tower.head_blocks == 1 else (tower.head_blocks, tower.width)
        about = {
            "arch": _trunk_fields(tower), "params": _digest(params["text"], "text_trunk"),
            "tokenizer": tokenizer.to_json(), "captions": _caption_digest(source), "dtype": config.train.dtype,
        }  # fmt: skip
        found["text"] = KeptRows(folder_of(root, "text", about), shape, dtype)
    for name, rows in found.items():
        with held(rows.folder):
            if not rows.complete:
                # An unknown number of captions: five an image, as in the usual collections.
                size = max(0, rows.row_bytes * len(source) * (rows.views or 5) - rows.bytes_on_disk)
                make_room(root, [each.folder for each in found.values()], size, config.train.cache_gb)
                on = functools.partial(_put, mesh)
                made = (
                    _keep_images(config, clip, preprocess, source, rows, params, on, request)
                    if name == "image"
                    else _keep_captions(clip, source, tokenizer, rows, params, on, request)
                )
                if not made:
                    return None
            os.utime(rows.folder)  # the least recently used folders go first
    return KeptOutputs(**found)


# --- computing ---------------------------------------------------------------------------------------------------------------


def _keep_images(
    config: ExperimentConfig, clip: Graph[Clip], preprocess: Preprocess, source: Source, rows: KeptRows,
    params: Mapping[str, Any], on: Callable, request: StopRequest,
) -> bool:  # fmt: skip
    blocks = clip.arch.vision.read_blocks

    @jax.jit
    def embed(params, images):
        taps = clip.vision.pooled(params["vision"], normalise(images, preprocess.mean, preprocess.std))
        stacked = jnp.stack([taps[n] for n in blocks], axis=1)
        return stacked.reshape(len(images), *rows.shape).astype(rows.dtype)

    views, bad = rows.views, BadFiles()
    seen = source if views == 1 else _Views(source, _augment(config), preprocess, views, config.train.seed)
    with RowWriter(rows, len(source) * views) as writer:
        pixels = preprocess if views == 1 else Preprocess(preprocess.image_size, "squash")  # a view has its size already
        reading = {"batch_size": _BATCH, **configured.loading(config.data)}
        start = writer.done
        if start < len(seen):
            left = Subset(seen, np.arange(start, len(seen)), seen.name)
            with (
                eval_batches(left, {"image": pixels}, **reading) as batches,
                tqdm(total=len(seen), initial=start, desc="keep outputs of the image trunk", unit="image") as bar,
            ):
                for number, batch in enumerate(batches, 1):
                    if request.name:
                        return False
                    bad.add(batch)
                    if len(batch["index"]):
                        output = np.asarray(embed(params, on(batch["images"]["image"])))[: len(batch["index"])]
                        writer.add(output, start + batch["index"])
                    count = min(_BATCH, len(seen) - writer.done)
                    writer.advance(count, number % _SAVE_EVERY == 0)
                    bar.update(count)
        if bad:
            logging.warning("%s", bad.summary())
        first = writer.places.reshape(len(source), views)
        if (first < 0).all():
            raise ConfigError(f"none of the {len(source)} training images can be read; see the warnings above")
        # An image is readable if all its views are; these lie side by side.
        first = np.where((first >= 0).all(axis=1), first[:, 0], -1)
        writer.finish(np.append(first, writer.rows))
    return True


def _keep_captions(
    clip: Graph[Clip], source: Source, tokenizer: Tokenizer, rows: KeptRows, params: Mapping[str, Any], on: Callable,
    request: StopRequest,
) -> bool:  # fmt: skip
    embed = jax.jit(lambda params, tokens: clip.text.pooled(params["text"], tokens).astype(rows.dtype))
    length, first, cut, size = clip.arch.text.context_length, np.zeros(len(source) + 1, np.int64), [], 4 * _BATCH
    with RowWriter(rows, 0) as writer, tqdm(total=len(source), desc="keep outputs of the text trunk", unit="image") as bar:
        waiting: list[str] = []
        for image in range(len(source) + 1):
            last = image == len(source)
            while len(waiting) >= _CAPTIONS * size or (last and waiting):
                part, waiting = waiting[: _CAPTIONS * size], waiting[_CAPTIONS * size :]
                tokens, truncated = tokenizer.encode(part, length)
                made = np.empty((len(part), *rows.shape), DTYPES[rows.dtype])
                for places, some in _by_length(tokens, clip.arch.text.pad_id, size):
                    if request.name:
                        return False
                    made[places] = np.asarray(embed(params, on(some, size)))[: len(some)]
                writer.add(made, None)
                cut.append(truncated)
            if not last:
                captions = source[image].captions
                first[image + 1] = first[image] + len(captions)
                waiting += captions
                bar.update()
        (rows.folder / TRUNCATED).write_bytes(np.concatenate(cut).astype(np.uint8).tobytes() if cut else b"")
        writer.finish(first)
    return True


def _by_length(tokens: np.ndarray, pad_id: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows, their tokens) of batches of `size` captions of similar lengths, without most of their padding.

    A text tower that masks its padding (`pad_id` of at least 0) gives the same outputs without it.
    """
    length = tokens.shape[1]
    ends = length - np.argmax(tokens[:, ::-1] != pad_id, axis=1) if pad_id >= 0 else np.full(len(tokens), length)
    order = np.argsort(ends, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, tokens[rows, : min(length, -(-int(ends[rows].max()) // _STEP) * _STEP)]


def _put(mesh: Mesh, rows: np.ndarray, size: int = _BATCH) -> jax.Array:
    """The rows, padded with zeros to a full batch that divides over the mesh, so that one compiled program serves all."""
    size = -(-size // batch_shards(mesh)) * batch_shards(mesh)
    filled = np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
    return jax.device_put(filled, batch_sharding(mesh))


class _Views(Source):
    """Every image in a number of augmented views, each drawn from (seed, index of the image, view); odd ones are mirrored."""

    def __init__(self, source: Source, how: Augment, preprocess: Preprocess, views: int, seed: int):
        self.name, self._source, self._views, self._seed = source.name, source, views, seed
        self._mirror, self._how, self._preprocess = how.flip, dataclasses.replace(how, flip=False), preprocess

    def __len__(self) -> int:
        return len(self._source) * self._views

    def __getitem__(self, i: int) -> Record:
        image, view = divmod(i, self._views)
        record = self._source[image]
        return dataclasses.replace(record, image=functools.partial(self._view, record, (self._seed, image, view)))

    def _view(self, record: Record, seed: tuple[int, int, int]) -> Any:
        pixels = self._how.resize(record.image(), self._preprocess, np.random.default_rng(seed))
        return Image.fromarray(pixels[:, ::-1] if self._mirror and seed[-1] % 2 else pixels)


# --- what outputs depend on --------------------------------------------------------------------------------------------------


def _drawn(config: ExperimentConfig) -> list[Any]:
    """The augmentation, and the seed if it draws anything; views that are only mirrored are the same for all seeds."""
    how = _augment(config)
    return [dataclasses.asdict(how), config.train.seed if dataclasses.replace(how, flip=False).random else None]


def _trunk_fields(arch: VisionArch | TextArch) -> dict[str, Any]:
    """The fields of an architecture that the outputs of its trunk depend on: all but those of the projections."""
    of_heads = {"embed_dim", "projection", "projection_width", "proj_bias", "pooler", "exit_sum", "exit_head", "exit_eps"}
    return {name: value for name, value in dataclasses.asdict(arch).items() if name not in of_heads}


def _digest(tower: Mapping[str, Any], trunk: str) -> str:
    """SHA-256 of the parameters of a trunk, as they are in memory."""
    prefix, found = ("vision/" if trunk == "image_trunk" else "text/"), hashlib.sha256()
    for path, leaf in sorted(pytree.flatten(tower).items()):
        if re.search(TRUNKS[trunk], prefix + path):
            found.update(path.encode() + np.asarray(jax.device_get(leaf)).tobytes())
    return found.hexdigest()


def _image_digest(source: Source) -> list[Any]:
    """The fingerprint of the images, and of files their sizes and times."""
    files = source.files()
    stamps = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, files or [])]
    return [configured.fingerprint(source), hashlib.sha256(repr(stamps).encode()).hexdigest()]


def _caption_digest(source: Source) -> list[Any]:
    """The fingerprint of the images, and SHA-256 of their captions; shards are fingerprinted by their bytes."""
    found = hashlib.sha256()
    if source.shards is None:
        for i in range(len(source)):
            found.update(json.dumps(source[i].captions).encode())
    return [configured.fingerprint(source), found.hexdigest()]


def _augment(config: ExperimentConfig) -> Augment:
    return augment.from_config(config.data, whole_images=False)
