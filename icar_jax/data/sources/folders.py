"""Sources for image folders with captions: Karpathy's JSON layout, and captions.csv or captions.jsonl."""

from __future__ import annotations

import csv
import functools
import io
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from icar_jax.data.images import decode
from icar_jax.data.records import Record, Source, name_hash
from icar_jax.data.sources.names import FileNames, plain_text
from icar_jax.errors import DataError
from icar_jax.files import json_file, limits
from icar_jax.files.formats import IMAGE_SUFFIXES
from icar_jax.files.opening import open_regular, read_regular
from icar_jax.files.walk import Walk, is_image

CAPTION_FILES = ("captions.csv", "captions.jsonl")
_NAMES_SHOWN = 5


class _Entry(NamedTuple):
    file: str
    captions: tuple[str, ...]
    split: str | None


class _Photos(Source):
    """Base of the folder sources: matches caption entries with existing files.

    Attributes:
        missing: captioned files of this split that do not exist (skipped with a warning).
        uncaptioned: files of the folder without any caption (skipped with a warning).
        splits: split name -> number of captioned images, missing files included; empty if the file names no splits.
    """

    def __init__(self, root: Path, split: str | None, entries: Sequence[_Entry], where: Path):
        self.root, self.split = root, split
        self.name = f"{root.name}/{split}" if split else root.name
        if split is not None and not any(e.split for e in entries):
            entries = [e._replace(split=_split_by_name(e.file)) for e in entries]
            logging.warning("%s names no splits: a tenth of the files is used as 'val', the rest as 'train'.", where)
        self.splits = dict(Counter(e.split for e in entries if e.captions and e.split is not None))
        wanted = _wanted_splits(split, self.splits, where)
        images = root / "images" if (root / "images").is_dir() else root
        found = image_files(images)
        if not found:
            raise FileNotFoundError(
                f"{images}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))}); {where.name} lists {len(entries)}"
            )

        names = FileNames(found, images)
        entries, lost = _on_disk(entries, names, where)
        captioned = {e.file for e in entries if e.captions}
        self.uncaptioned = sorted(({e.file for e in entries} | found) - captioned)
        chosen = [e for e in entries if e.captions and (wanted is None or e.split in wanted)]
        self.missing = [e.file for e in chosen if e.file in lost]
        kept = [e for e in chosen if e.file not in lost]
        missing = _some([*map(names.named, self.missing[:_NAMES_SHOWN]), *self.missing[_NAMES_SHOWN:]])
        if not chosen:
            raise DataError(f"{where}: no captions for split {split!r}")
        if not kept:
            raise FileNotFoundError(
                f"{where}: none of the {len(chosen)} captioned files of split {split!r} exist under {images}"
                f" (first: {missing}). Put the images there, with the same names and suffixes."
            )
        if self.missing:
            logging.warning("%s: %d of %d captioned files are missing and skipped: %s",
                            self.name, len(self.missing), len(chosen),
                            missing)  # fmt: skip
        if self.uncaptioned:
            logging.warning("%s: %d files have no caption and are skipped: %s",
                            self.name, len(self.uncaptioned), _some(self.uncaptioned))  # fmt: skip
        self.images = images
        self.names = [e.file for e in kept]
        self._captions = [e.captions for e in kept]

    def __len__(self) -> int:
        return len(self.names)

    def files(self) -> list[str]:
        return [os.path.join(self.images, name) for name in self.names]

    def __getitem__(self, i: int) -> Record:
        path = os.path.join(self.images, self.names[i])
        return Record(name=self.names[i], image=functools.partial(decode, path), captions=self._captions[i])


class KarpathyFolder(_Photos):
    """A folder with Karpathy's `dataset*.json` and its images in `images/` or next to it.

    Args:
        root: the folder.
        split: a split named in the JSON; several joined by '+' ('train+restval'); None uses every image.
        json_name: the JSON's file name; detected automatically if there is only one `dataset*.json`.

    Raises:
        FileNotFoundError, ValueError: with the file, what was expected and what was found.
    """

    def __init__(self, root: str | Path, split: str | None, json_name: str | None = None):
        root = existing_folder(root)
        where = root / json_name if json_name else _only_karpathy_json(root)
        super().__init__(root, split, _merge(_read_karpathy(where), where), where)


class CaptionFolder(_Photos):
    """A folder with `captions.csv` or `captions.jsonl` and its images in `images/` or next to it.

    Each row or line has `file` (relative to the image folder), `caption` and optionally `split`; a file may have
    several rows. In JSON lines `caption` may be a list. Other columns are ignored.

    Args:
        root: the folder.
        split: a value of the `split` column; several joined by '+'; None uses every image.

    Raises:
        FileNotFoundError, ValueError: with the file, the line number, what was expected and what was found.
    """

    def __init__(self, root: str | Path, split: str | None = None):
        root = existing_folder(root)
        present = [root / name for name in CAPTION_FILES if (root / name).is_file()]
        if not present:
            raise FileNotFoundError(f"{root}: expected {' or '.join(CAPTION_FILES)}, found {_listing(root)}")
        if len(present) > 1:
            raise DataError(f"{root}: found both {' and '.join(CAPTION_FILES)}; keep one of them")
        where = present[0]
        rows = _read_csv(where) if where.suffix == ".csv" else _read_jsonl(where)
        super().__init__(root, split, _merge(rows, where), where)


def open_folder(root: str | Path, split: str | None) -> KarpathyFolder | CaptionFolder:
    """Opens a folder by the kind of its caption file. Raises FileNotFoundError without one, DataError for several kinds."""
    root = existing_folder(root)
    karpathy = sorted(p.name for p in root.glob("dataset*.json"))
    plain = [name for name in CAPTION_FILES if (root / name).is_file()]
    if karpathy and plain:
        raise DataError(f"{root}: several caption files, {', '.join(karpathy + plain)}; keep one of them")
    if not karpathy and not plain:
        raise FileNotFoundError(
            f"{root}: expected dataset*.json (Karpathy) or {' or '.join(CAPTION_FILES)}, found {_listing(root)}"
        )
    return KarpathyFolder(root, split) if karpathy else CaptionFolder(root, split)


def read_captions(where: str | Path) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """Reads Karpathy's JSON, a .csv or a .jsonl as the sources do; returns (image folder, relative POSIX path -> captions).

    Raises FileNotFoundError, ValueError: with the file, the line, what was expected and what was found.
    """
    where = Path(where).expanduser().absolute()
    readers = {".json": _read_karpathy, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if where.suffix.lower() not in readers:
        raise DataError(f"{where}: expected captions in Karpathy's .json layout, a .csv or a .jsonl")
    entries = _merge(readers[where.suffix.lower()](where), where)
    folder = where.parent / "images" if (where.parent / "images").is_dir() else where.parent
    return folder, {entry.file: entry.captions for entry in entries if entry.captions}


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
        joined[file] = _Entry(file, (known.captions if known else ()) + entry.captions, entry.split)
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


def _only_karpathy_json(root: Path) -> Path:
    found = sorted(root.glob("dataset*.json"))
    if not found:
        raise FileNotFoundError(f"{root}: expected a Karpathy file dataset*.json, found {_listing(root)}")
    if len(found) > 1:
        raise DataError(f"{root}: several Karpathy files, {', '.join(p.name for p in found)}; choose one with json_name")
    return found[0]


def _listing(root: Path) -> str:
    return _some(sorted(p.name for p in root.iterdir()))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown.encode("utf-8", "backslashreplace").decode() + more


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


class _Row(NamedTuple):
    place: str
    file: str
    captions: tuple[str, ...]
    split: str | None


def _row(where: Path, place: str, file: Any, captions: Any, split: Any) -> _Row:
    if not isinstance(file, str) or not file.strip():
        raise DataError(f"{where}, {place}: expected a file name, found {file!r}")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise DataError(f"{where}, {place}: expected a caption (text, or a list of texts), found {captions!r:.80}")
    if split is not None and not isinstance(split, str):
        raise DataError(f"{where}, {place}: expected a split name, found {split!r}")
    kept = tuple(plain_text(c.strip()) for c in captions if c.strip())
    if any(c.strip() not in kept for c in captions if c.strip()):
        logging.warning("%s, %s: half of a character (a lone surrogate) in the caption is read as \ufffd", where, place)
    return _Row(place, posixpath.normpath(file.strip()), kept, (split or "").strip() or None)


def _merge(rows: Iterator[_Row], where: Path) -> list[_Entry]:
    """Merges the rows of each file, in order of first appearance. Raises DataError for a file in two splits."""
    first: dict[str, _Row] = {}
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
    return [_Entry(file, tuple(captions[file]), row.split) for file, row in first.items()]


def _read_karpathy(where: Path) -> Iterator[_Row]:
    try:
        data = read_regular(where, limits.JSON_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"caption file {where} not found; {where.parent} has {_listing(where.parent)}") from None
    found = json_file.parse(data, f"{where}: expected Karpathy's JSON with a list `images`")
    images = found.get("images") if isinstance(found, dict) else found
    if not isinstance(found, dict) or not isinstance(images, list):
        raise DataError(f"{where}: expected Karpathy's JSON, an object with a list `images`, found {images!r:.80}")
    folder = where.parent / "images" if (where.parent / "images").is_dir() else where.parent
    for number, image in enumerate(images):
        place = f"images[{number}]"
        try:
            file, sentences, split = image["filename"], [s["raw"] for s in image["sentences"]], image.get("split")
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}, {place}: expected `filename` and `sentences[*].raw`: {error!r}") from error
        row = _row(where, place, file, sentences, split)
        # COCO's JSON stores the subfolder (val2014) separately; some copies of the images are flat.
        nested = posixpath.join(str(image.get("filepath") or ""), row.file)
        yield row._replace(file=nested) if nested != row.file and os.path.isfile(folder / nested) else row


def _read_csv(where: Path) -> Iterator[_Row]:
    with open_regular(where) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            columns = reader.fieldnames or []
            if not {"file", "caption"} <= set(columns):
                raise DataError(f"{where}, line 1: expected a header with the columns file and caption, found {columns}")
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}, {place}: expected {len(columns)} columns ({', '.join(columns)}), found more or fewer;"
                        " put captions that contain commas in double quotes"
                    )
                yield _row(where, place, row["file"], row["caption"], row.get("split"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{where}, line {reader.line_num + 1}: not readable as UTF-8 CSV: {error}") from error


def _read_jsonl(where: Path) -> Iterator[_Row]:
    with open_regular(where) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(limits.LINE_BYTES + 1), b""), start=1):
            if len(line) > limits.LINE_BYTES:
                raise DataError(f"{where}, line {number}: longer than the limit of {limits.LINE_BYTES:,} bytes")
            if not line.strip():
                continue
            row = json_file.parse(line, f"{where}, line {number}")
            if not isinstance(row, dict) or not {"file", "caption"} <= set(row):
                raise DataError(f"{where}, line {number}: expected an object with `file` and `caption`, found {row!r:.80}")
            yield _row(where, f"line {number}", row["file"], row["caption"], row.get("split"))
