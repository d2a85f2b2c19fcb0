"""Sources of images with ratings, and their splits.

Ratings are joined with images by file name or URL, never by a running number. Splits come from the ratings (IC9600's train.txt
and test.txt) or from the hash of each name, so that adding images moves no others. Thresholds are chosen on `val`, as in ICAR;
`val` is neither trained on nor reported.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax.config import ConfigError, DataConfig
from icar_jax.data.images import decode
from icar_jax.data.ratings.table import Ratings, RatingsError, read_ratings
from icar_jax.data.records import Record, Source, Subset, name_hash
from icar_jax.data.sources.folders import existing_folder, image_files
from icar_jax.data.sources.names import FileNames
from icar_jax.data.sources.parquet import Parquet
from icar_jax.data.sources.shards import retrying
from icar_jax.data.sources.webdataset import WebDataset
from icar_jax.errors import DataError
from icar_jax.files import json_file

SPLITS = ("train", "val", "test")
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}
TABLE = "ratings.csv"  # in the root; read if neither config.data.ratings nor a train.txt says otherwise
VAL_OF_TRAIN = 0.10  # fraction of train.txt used as val if there is no val.txt


class RatedFolder(Source):
    """Source of image files in a folder, with scores.

    names: relative to `images`; scores: float32 [N] in [0, 1]; categories: of each image, '' for none; empty without any.
    """

    def __init__(self, name: str, images: Path, names: Sequence[str], scores: np.ndarray, categories: Sequence[str] = ()):
        self.name, self.images, self.names = name, images, list(names)
        self.scores, self.categories = np.asarray(scores, np.float32), list(categories)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        path = os.path.join(self.images, self.names[i])
        labels = (self.categories[i],) if self.categories and self.categories[i] else ()
        return Record(self.names[i], functools.partial(decode, path), (), float(self.scores[i]), labels)


class RatedShards(Source):
    """Source of records in shards, joined with scores by URL; the URL is their name.

    indices: int64 [N], record indices in the source; scores: float32 [N] in [0, 1].
    """

    def __init__(self, source: Source, indices: Sequence[int], names: Sequence[str], scores: np.ndarray):
        self.name, self.source, self.names = source.name, source, list(names)
        self.indices, self.scores = np.asarray(indices, np.int64), np.asarray(scores, np.float32)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        record = self.source[int(self.indices[i])]
        return dataclasses.replace(record, name=self.names[i], complexity=float(self.scores[i]))


@dataclass(frozen=True)
class RatedSource:
    """All rated images of a configuration.

    Attributes:
        source: all images with a usable score.
        split_of: the split of each image.
        how: one sentence on how the splits were made.
        notes: sentences about what was read and what was skipped.
    """

    source: RatedFolder | RatedShards
    split_of: tuple[str, ...]
    how: str
    notes: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of images per split."""
        return dict(Counter(self.split_of))

    def split(self, wanted: str) -> Subset:
        """Returns the images of a split, or of several joined by '+'. Raises ConfigError naming the available splits."""
        names = set(wanted.split("+"))
        if unknown := sorted(names - set(self.split_of)):
            listed = ", ".join(f"{name} ({count} images)" for name, count in sorted(self.counts.items()))
            raise ConfigError(f"{self.source.name}: no images in split {', '.join(map(repr, unknown))}; it has {listed}")
        chosen = [i for i, split in enumerate(self.split_of) if split in names]
        return Subset(self.source, chosen, f"{self.source.name}/{wanted}")


def open_rated(data: DataConfig) -> RatedSource:
    """Opens the images of config.data.root joined with the ratings of config.data.ratings.

    Raises ConfigError, OSError, ShardError; RatingsError if more than config.data.bad_share of the lines are unusable, or an
    image is in two splits.
    """
    if data.source in ("webdataset", "parquet"):
        return _sharded(data)
    root = existing_folder(data.root)
    if not data.ratings and (root / TABLE).is_file() and not (root / "train.txt").is_file():
        data = dataclasses.replace(data, ratings=str(root / TABLE))
    if not data.ratings:
        return _own_splits(root, data.bad_share)
    images = _image_folder(root)
    found = image_files(images)
    ratings = read_ratings(_ratings_file(data, root), *_lookup(images, found)).check(data.bad_share)
    if ratings.key == "url":
        return _url_folder(images, sorted(found), ratings)
    categories = _categories(ratings, data.categories)
    return by_hash(_folder(root.name, images, ratings.scores, categories), (ratings.summary(),))


def by_hash(source: RatedFolder | RatedShards, notes: tuple[str, ...]) -> RatedSource:
    """Splits 70/15/15 into train, val and test by the hash of each name."""
    train, val = SHARES["train"], SHARES["train"] + SHARES["val"]

    def split(name: str) -> str:
        place = name_hash(name, seed=0) / 2**64
        return "train" if place < train else "val" if place < val else "test"

    how = "70/15/15 into train, val and test by the BLAKE2b hash of each image's name, so adding images moves no others"
    return RatedSource(source, tuple(map(split, source.names)), how, notes)


def _own_splits(root: Path, bad_share: float) -> RatedSource:
    """Opens IC9600's layout: train.txt, test.txt and optionally val.txt, next to images/."""
    files = {split: root / f"{split}.txt" for split in SPLITS if (root / f"{split}.txt").is_file()}
    if "train" not in files:
        raise ConfigError(
            f"config.data.ratings='' and {root} has no {TABLE} and no train.txt (IC9600: train.txt, test.txt, images/); "
            "pass --config.data.ratings=FILE (.txt, .json, .csv or .parquet)"
        )
    images = _image_folder(root)
    lookup = _lookup(images, image_files(images))
    read = {split: read_ratings(file, *lookup).check(bad_share) for split, file in files.items()}
    first: dict[str, str] = {}
    for split, ratings in read.items():
        both = [name for name in ratings.scores if name in first]
        if both:
            raise RatingsError(
                f"{ratings.where}: {len(both)} images are also in {files[first[both[0]]].name}, first {both[0]}; each image "
                "must be in one split only, so that no evaluated image is trained on"
            )
        first |= dict.fromkeys(ratings.scores, split)
    how = f"{', '.join(file.name for file in files.values())} of the folder"
    if "val" not in read:
        cut = {name for name in read["train"].scores if name_hash(name, seed=0) < VAL_OF_TRAIN * 2**64}
        first |= dict.fromkeys(cut, "val")
        how += "; val is a tenth of train.txt, chosen by the BLAKE2b hash of each image's name"
    scores = {name: score for ratings in read.values() for name, score in ratings.scores.items()}
    source = _folder(root.name, images, scores)
    return RatedSource(source, tuple(first[name] for name in source.names), how, tuple(r.summary() for r in read.values()))


def _sharded(data: DataConfig) -> RatedSource:
    """Opens all shards of root, regardless of split, joined with scores by URL."""
    ratings = read_ratings(_ratings_file(data, None)).check(data.bad_share)
    if ratings.key != "url":
        raise RatingsError(
            f"{ratings.where}: shards are joined by URL, never by running number: expected a CSV or Parquet file with the "
            "columns url and score, or a JSON of URL -> score"
        )
    with retrying(data.retries):
        if data.source == "webdataset":
            source = WebDataset(data.root, ".", captions=False, bad_share=data.bad_share)
        else:
            source = Parquet(data.root, ".", data.image_column, "", bad_share=data.bad_share)
        urls = _urls(source, (ratings.where, os.stat(ratings.where).st_mtime_ns, source.shards.sha256()))
    names, indices, note = _join(urls, ratings)
    scores = np.array([ratings.scores[name] for name in names], np.float32)
    return by_hash(RatedShards(source, indices, names, scores), (ratings.summary(), note))


_last_urls: dict[Any, list[str | None]] = {}


def _urls(source: WebDataset | Parquet, key: Any) -> list[str | None]:
    """Returns the URLs of a source; cached for the last shards, since training, validation and splits all need them."""
    if key not in _last_urls:
        found = source.urls()
        _last_urls.clear()
        _last_urls[key] = found
    return _last_urls[key]


def _url_folder(images: Path, files: list[str], ratings: Ratings) -> RatedSource:
    """Opens img2dataset's file layout: 00000/000000001.jpg with its URL in 000000001.json."""

    def url(file: str) -> str | None:
        try:
            beside = os.path.join(images, os.path.splitext(file)[0] + ".json")
            found = json_file.read_object(beside).get("url")
        except DataError:
            return None
        return found if isinstance(found, str) else None

    urls = [url(file) for file in tqdm(files, desc="read URLs", disable=None)]
    names, indices, note = _join(urls, ratings)
    scores = np.array([ratings.scores[name] for name in names], np.float32)
    source = RatedFolder(images.name, images, [files[i] for i in indices], scores)
    rated = by_hash(source, (ratings.summary(), note))
    # File numbers depend on the download; URLs do not, so splits are by URL.
    split_of = by_hash(RatedFolder(images.name, images, names, scores), ()).split_of
    return dataclasses.replace(rated, split_of=split_of, how=rated.how.replace("image's name", "image's URL"))


def _join(urls: Sequence[str | None], ratings: Ratings) -> tuple[list[str], list[int], str]:
    """Joins URLs with scores; returns (URLs with image and score, image index of each, a summary sentence)."""
    first: dict[str, int] = {}
    unaddressed = unrated = repeated = 0
    for i, url in enumerate(urls):
        if url is None:
            unaddressed += 1
        elif url not in ratings.scores:
            unrated += 1
        elif url in first:
            repeated += 1
        else:
            first[url] = i
    counts = f"{len(urls)} images, {len(first)} with a score"
    rest = {
        "images without a score": unrated, "images without a URL": unaddressed, "images with a duplicate URL": repeated,
        "scores without an image": len(ratings.scores) - len(first),
    }  # fmt: skip
    note = f"joined by URL: {counts}; skipped: " + (", ".join(f"{n} {what}" for what, n in rest.items() if n) or "nothing")
    if not first:
        example = next((url for url in urls if url is not None), "none")
        raise RatingsError(
            f"{ratings.where}: {note}. No rated URL belongs to an image; first rated URL: {next(iter(ratings.scores))}, first "
            f"image URL: {example}"
        )
    if unrated or unaddressed or repeated:
        logging.info("%s", note)
    return list(first), list(first.values()), note


def _folder(name: str, images: Path, scores: dict[str, float], categories: Sequence[str] = ()) -> RatedFolder:
    return RatedFolder(name, images, list(scores), np.fromiter(scores.values(), np.float32, len(scores)), categories)


def _categories(ratings: Ratings, origin: str) -> list[str]:
    """Returns the category of each rated image, from the column or the names; empty if there is no column."""
    if origin == "column":
        return [ratings.categories.get(name, "") for name in ratings.scores] if ratings.categories else []
    found = [_prefix(name) for name in ratings.scores]
    if not all(found):
        name = list(ratings.scores)[found.index("")]
        raise RatingsError(
            f"{ratings.where}: config.data.categories='prefix', but {name} names no category: expected CATEGORY/NAME or "
            "CATEGORY_NAME; add a column `category` and use config.data.categories=column"
        )
    return found


def _prefix(name: str) -> str:
    """Returns the folder of a name, or without a folder the part before its last underscore: 'ad_003.jpg' -> 'ad'."""
    return posixpath.dirname(name) or name.rpartition("_")[0]


def _image_folder(root: Path) -> Path:
    return root / "images" if (root / "images").is_dir() else root


def _ratings_file(data: DataConfig, root: Path | None) -> Path:
    path = Path(data.ratings).expanduser()
    if root is not None and not path.is_file() and (root / path).is_file():
        raise ConfigError(f"config.data.ratings={data.ratings!r} not found; did you mean {root / path}?")
    return path


def _lookup(images: Path, found: set[str]) -> tuple[Callable[[str], str | None], str]:
    """Returns (function from a name in a rating file to a path relative to the images, or None; reason for None).

    Names are relative to the images, or paths as written by `icar score`.
    """

    names = FileNames(found, images)

    def known(name: str) -> str | None:
        if (plain := names.find(name)) is not None:
            return plain
        relative = os.path.relpath(os.path.abspath(name), images).replace(os.sep, "/")
        return relative if relative in found else None

    return known, f"no such image under {images}"
