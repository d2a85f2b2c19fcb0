"""The source of image folders with captions, in all layouts of `caption_files`."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from icar_jax.data.images import decode
from icar_jax.data.records import Record, Source, name_hash
from icar_jax.data.sources import caption_files
from icar_jax.data.sources.caption_files import Columns, Row, listing, some
from icar_jax.data.sources.names import FileNames
from icar_jax.errors import DataError
from icar_jax.files.formats import IMAGE_SUFFIXES
from icar_jax.files.walk import Walk, is_image

_NAMES_SHOWN = 5


class _Entry(NamedTuple):
    file: str
    captions: tuple[str, ...]
    split: str | None
    url: str | None


class CaptionFolder(Source):
    """Images with captions from one file beside them or elsewhere, or from a text beside each image.

    Args:
        root: the folder with the caption file and, in `images/` or next to it, the images. Empty if `captions` and `images`
            say where both are.
        split: a split that the caption file names; several joined by '+' ('train+restval'); None uses every image.
        captions: the caption file, relative to `root` or to the current folder; found by its name without.
        images: the folder of the images, where it is neither `root` nor `images/` in it.
        columns: columns of a table, keys of JSON lines.

    Attributes:
        missing: captioned files of this split that do not exist (skipped with a warning).
        uncaptioned: files of the folder without any caption (skipped with a warning).
        splits: split name -> number of captioned images, missing files included; empty if the file names no splits.

    Raises:
        FileNotFoundError, ValueError: with the file, the line, what was expected and what was found.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        captions: str | Path = "",
        images: str | Path = "",
        columns: Columns = Columns(),
    ):
        self.root, self.split = existing_folder(root or images), split
        self.name = f"{self.root.name}/{split}" if split else self.root.name
        where = _named_file(self.root, captions) if captions else _only_file(self.root)
        self.images = existing_folder(images) if images else caption_files.image_folder(self.root)
        if where is None:  # the texts lie beside the images
            found = _found_images(self.images)
            entries = _captions_beside(self.images, found, self.root)
            where = self.root
        else:
            entries = _merge(caption_files.read_rows(where, self.images, columns), where)
            found = _found_images(self.images)
        self._keep(entries, found, where)

    def _keep(self, entries: Sequence[_Entry], found: set[str], where: Path) -> None:
        """Matches caption entries with existing files, and keeps those of the split."""
        split = self.split
        if split is not None and not any(e.split for e in entries):
            entries = [e._replace(split=_split_by_name(e.file)) for e in entries]
            logging.warning("%s names no splits: a tenth of the files is used as 'val', the rest as 'train'.", where)
        self.splits = dict(Counter(e.split for e in entries if e.captions and e.split is not None))
        wanted = _wanted_splits(split, self.splits, where)
        names = FileNames(found, self.images)
        entries, lost = _on_disk(entries, names, where)
        captioned = {e.file for e in entries if e.captions}
        self.uncaptioned = sorted(({e.file for e in entries} | found) - captioned)
        chosen = [e for e in entries if e.captions and (wanted is None or e.split in wanted)]
        self.missing = [e.file for e in chosen if e.file in lost]
        kept = [e for e in chosen if e.file not in lost]
        missing = some([*map(names.named, self.missing[:_NAMES_SHOWN]), *self.missing[_NAMES_SHOWN:]])
        if not chosen:
            raise DataError(f"{where}: no captions for split {split!r}")
        if not kept:
            raise FileNotFoundError(
                f"{where}: none of the {len(chosen)} captioned files of split {split!r} exist under {self.images}"
                f" (first: {missing}). Put the images there, with the same names and suffixes, or name their folder with"
                " config.data.images"
            )
        if self.missing:
            logging.warning("%s: %d of %d captioned files are missing and skipped: %s",
                            self.name, len(self.missing), len(chosen),
                            missing)  # fmt: skip
        if self.uncaptioned:
            logging.warning("%s: %d files have no caption and are skipped: %s",
                            self.name, len(self.uncaptioned), some(self.uncaptioned))  # fmt: skip
        self.names = [e.file for e in kept]
        self._captions = [e.captions for e in kept]
        self._urls = [e.url for e in kept]

    def __len__(self) -> int:
        return len(self.names)

    def urls(self) -> list[str | None] | None:
        return list(self._urls) if any(self._urls) else None

    def files(self) -> list[str]:
        return [os.path.join(self.images, name) for name in self.names]

    def __getitem__(self, i: int) -> Record:
        path = os.path.join(self.images, self.names[i])
        return Record(name=self.names[i], image=functools.partial(decode, path), captions=self._captions[i])


def read_captions(where: str | Path, columns: Columns = Columns()) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """Reads a caption file, or a folder with a text beside each image; returns (image folder, relative path -> captions).

    Raises FileNotFoundError, ValueError: with the file, the line, what was expected and what was found.
    """
    where = Path(where).expanduser().absolute()
    if where.is_dir():
        entries = _captions_beside(where, _found_images(where), where)
        return where, {entry.file: entry.captions for entry in entries if entry.captions}
    folder = caption_files.image_folder(where.parent)
    entries = _merge(caption_files.read_rows(where, folder, columns), where)
    return folder, {entry.file: entry.captions for entry in entries if entry.captions}


def _merge(rows: Iterable[Row], where: Path) -> list[_Entry]:
    """Merges the rows of each file, in order of first appearance. Raises DataError for a file in two splits."""
    first: dict[str, Row] = {}
    captions: dict[str, list[str]] = {}
    for row in rows:
        known = first.setdefault(row.file, row)
        if known.split != row.split:
            raise DataError(
                f"{where}, {row.place}: {row.file} is in split {row.split!r}, but in {known.split!r} at {known.place}"
            )
        captions.setdefault(row.file, []).extend(row.captions)
    if not any(captions.values()):
        raise DataError(f"{where}: contains no captions")
    return [_Entry(file, tuple(captions[file]), row.split, row.url) for file, row in first.items()]


def _on_disk(entries: Sequence[_Entry], names: FileNames, where: Path) -> tuple[list[_Entry], set[str]]:
    """(entries under the names that their files have on disk, names without a file). Two spellings of one file are joined."""
    lost, joined = set(), {}
    for entry in entries:
        file = names.find(entry.file)
        if file is None:
            lost.add(entry.file)
            file = entry.file
        known = joined.get(file)
        if known is not None and known.split != entry.split:
            raise DataError(f"{where}: {entry.file} and {known.file} are the same file, but in two splits")
        joined[file] = entry._replace(file=file, captions=(known.captions if known else ()) + entry.captions)
    return list(joined.values()), lost


def _split_by_name(file: str) -> str:
    """Returns 'val' for a tenth of the names, else 'train'; depends on the name only, so adding files moves no others."""
    return "val" if name_hash(file, seed=0) < 2**64 // 10 else "train"


def existing_folder(root: str | Path) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist" if not root.exists() else f"{root} is not a folder")
    if next(root.iterdir(), None) is None:
        raise FileNotFoundError(f"image folder {root} is empty; expected images in it")
    return root.resolve()


def _named_file(root: Path, captions: str | Path) -> Path:
    """The caption file of this name in the folder, else from the current folder. Raises FileNotFoundError."""
    named = Path(captions).expanduser()
    for path in (root / named, named):
        if path.is_file():
            return path.resolve()
    raise FileNotFoundError(f"caption file config.data.json={str(captions)!r} not found; {root} has {listing(root)}")


def _only_file(root: Path) -> Path | None:
    """The caption file of a folder, or None without one. Raises DataError for several."""
    found = caption_files.caption_files(root)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(
            f"{root}: several caption files, {names}; choose one, such as config.data.json={found[0].name} (of distractors: "
            f"config.eval.distractors.json={found[0].name})"
        )
    return found[0] if found else None


def _found_images(images: Path) -> set[str]:
    if not (found := image_files(images)):
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise FileNotFoundError(f"{images}: no image files, expected {suffixes}; found {listing(images)}")
    return found


def _captions_beside(images: Path, found: set[str], root: Path) -> list[_Entry]:
    rows = caption_files.read_beside(images, found)
    if not any(row.captions for row in rows):
        raise FileNotFoundError(
            f"{root}: expected {caption_files.KARPATHY} (Karpathy), {' or '.join(caption_files.TABLES)}, results.csv or .token "
            f"(Flickr30k), or a .txt beside each image; found {listing(root)}. config.data.json names a caption file elsewhere"
        )
    return _merge(rows, root)


def image_files(folder: Path) -> set[str]:
    """Returns the relative POSIX paths of all image files, from one walk instead of a stat per caption.

    Warns about what the walk left out and about folders that cannot be listed.
    """
    walk, found, start = Walk(), set(), os.path.join(folder, "")
    for path in walk.images(os.fspath(folder)):
        if is_image(path):
            found.add(path[len(start) :].replace(os.sep, "/"))
        else:
            logging.warning("%s: the folder cannot be listed and is skipped", path)
    if report := walk.left_out.report():
        logging.warning("%s: %s", folder, report)
    return found


def _wanted_splits(split: str | None, present: dict[str, int], where: Path) -> set[str] | None:
    if split is None:
        return None
    wanted = set(split.split("+"))
    if unknown := sorted(wanted - set(present)):
        listed = ", ".join(f"{s} ({n} images)" for s, n in sorted(present.items()))
        raise DataError(f"{where}: no split {', '.join(map(repr, unknown))}; it has {listed}")
    return wanted
