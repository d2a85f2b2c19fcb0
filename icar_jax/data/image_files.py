"""Pictures on disk without captions, as a source: named on the command line, or listed in a file of labels."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from icar_jax.data.folders import existing_folder, image_files
from icar_jax.data.images import decode
from icar_jax.data.ratings import Ratings, RatingsError, read_ratings
from icar_jax.data.records import Record


class ImageFiles:
    """Records of picture files.

    Args:
        name: what the source is called.
        paths: record name -> file, in the order of the source.
        ratings: record name -> complexity in [0, 1]; nan for others.
    """

    def __init__(self, name: str, paths: Mapping[str, str], ratings: Mapping[str, float] | None = None):
        if not paths:
            raise ValueError(f"{name}: no image files in it")
        self.name, self.names = name, list(paths)
        self._paths, self._ratings = list(paths.values()), dict(ratings or {})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        name = self.names[i]
        return Record(name, functools.partial(decode, self._paths[i], name), (), self._ratings.get(name, float("nan")))


def find_image_files(patterns: Sequence[str]) -> ImageFiles:
    """Files, folders (with all below them) and globs, in the order given; each file once.

    Raises FileNotFoundError where one of them names no picture.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        if Path(pattern).is_dir():
            root = existing_folder(pattern)
            paths = [str(root / name) for name in sorted(image_files(root))]
        elif Path(pattern).is_file():
            paths = [pattern]
        else:
            paths = [p for p in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)) if Path(p).is_file()]
        if not paths:
            raise FileNotFoundError(f"{pattern}: no image file, no folder that holds one, and no pattern that matches one")
        found |= {os.path.realpath(path): path for path in paths}
    return ImageFiles(" ".join(patterns), {path: path for path in found.values()})


def labelled_files(labels: str | os.PathLike, root: str | os.PathLike, bad_share: float) -> tuple[ImageFiles, Ratings]:
    """The pictures below `root` (or its `images/`) that a file of ratings or labels names, and what it says of them.

    Raises FileNotFoundError, or RatingsError where more than `bad_share` of its lines cannot be used.
    """
    root = existing_folder(root)
    images = root / "images" if (root / "images").is_dir() else root
    present = image_files(images)
    ratings = read_ratings(labels, lambda name: name if name in present else None, f"no such image in {images}")
    if ratings.key == "url":
        raise RatingsError(f"{labels}: names addresses (column url), not files; it needs a column file, of names in {images}")
    ratings.check(bad_share)
    paths = {name: str(images / name) for name in ratings.scores}
    return ImageFiles(Path(labels).name, paths, ratings.scores), ratings
