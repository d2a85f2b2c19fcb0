"""Readers of captions: Karpathy's JSON, tables, JSON lines, Flickr30k's own files, and a text beside each image.

Every layout gives rows of (image file, captions, split, URL); docs/data.md lists them for users.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from tqdm import tqdm

from icar_jax.data.sources.names import plain_text
from icar_jax.errors import DataError
from icar_jax.files import json_file, limits
from icar_jax.files.opening import open_regular, read_regular

KARPATHY = "dataset*.json"
TABLES = ("captions.csv", "captions.tsv", "captions.txt", "captions.jsonl")
FLICKR = ("results.csv", "*.token", "*.token.txt")
IMAGE_FOLDERS = ("images", "flickr30k_images", "flickr30k-images")
SPLIT_FOLDERS = frozenset({"train", "val", "validation", "test", "restval"})
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_FLICKR_HEADER = re.compile(r"image_name\s*\|")
# 1000092795.jpg#0<tab>caption, and 1000092795.jpg| 0| caption, in which one released line lacks the second bar.
_FLICKR_LINE = re.compile(r"(?P<file>[^\t|]+?)(?:#\d+\t|\s*\|\s*\d+\s*(?:\||\s)\s*)(?P<caption>.*)")
_THREADS = 8  # that read the texts beside images; they mostly wait for storage
_SHOWN = 5


class Columns(NamedTuple):
    """The columns of a table, and keys of JSON lines, that hold the file and the caption; `file` always holds the file."""

    image: str = "image"
    caption: str = "caption"


class Row(NamedTuple):
    """Captions of one image file. place: where they stand, for messages."""

    place: str
    file: str
    captions: tuple[str, ...]
    split: str | None
    url: str | None = None


def caption_files(root: Path) -> list[Path]:
    """The caption files in a folder. Those of Flickr30k's own layout count only where there are no others."""
    named = sorted(root.glob(KARPATHY)) + [root / name for name in TABLES if (root / name).is_file()]
    return named or sorted({path for pattern in FLICKR for path in root.glob(pattern) if path.is_file()})


def image_folder(root: Path) -> Path:
    """The folder of the images beside a caption file: `images` or a name of Flickr30k's, else the folder itself."""
    return next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root)


def read_rows(where: Path, images: Path, columns: Columns = Columns()) -> Iterator[Row]:
    """Yields the rows of a caption file, by its suffix and its first line; `images` is the folder that its names are below.

    Raises FileNotFoundError, DataError: with the file, the line, what was expected and what was found.
    """
    suffix = where.suffix.lower()
    if suffix == ".json":
        return _karpathy(where, images)
    if suffix == ".jsonl":
        return _json_lines(where, columns)
    if suffix not in (".csv", ".tsv", ".txt", ".token"):
        raise DataError(
            f"{where}: expected captions in Karpathy's .json layout, a .csv, .tsv or .txt table, a .jsonl, Flickr30k's .token, "
            "or a folder with a .txt beside each image"
        )
    if suffix == ".token" or where.name.lower().endswith(".token.txt"):
        return _flickr(where)
    with open_regular(where) as stream:
        first = stream.readline(limits.LINE_BYTES).decode("utf-8-sig", errors="replace")
    return _flickr(where) if _FLICKR_HEADER.match(first) else _table(where, columns)


def read_beside(images: Path, files: Collection[str]) -> list[Row]:
    """Rows of the images that have a .txt or a .json of the same name beside them, in the order of names.

    A .txt alone holds one caption a line. With a .json, as img2dataset writes both, the .txt is one caption, and where it is
    missing or empty `caption` or `captions` of the .json counts. Images below folders named train, val, test and the like are
    of that split. Texts that are not UTF-8 are counted in a warning, and their images have no captions then.
    """
    there = {folder: frozenset(os.listdir(images / folder)) for folder in {posixpath.dirname(name) for name in files}}

    def beside(name: str, suffix: str) -> str | None:
        stem = posixpath.splitext(name)[0] + suffix
        return stem if posixpath.basename(stem) in there[posixpath.dirname(name)] else None

    found = [(name, beside(name, ".txt"), beside(name, ".json")) for name in sorted(files)]
    found = [each for each in found if each[1] or each[2]]
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda each: _beside(images, *each), found)
        rows = list(tqdm(read, total=len(found), desc="read captions", unit="image", disable=None, delay=3.0))
    if bad := [fault for _, fault in rows if fault]:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        logging.warning("%s: %d texts beside images cannot be used: %s%s", images, len(bad), "; ".join(bad[:_SHOWN]), more)
    return [row for row, _ in rows]


def _beside(images: Path, name: str, text: str | None, described: str | None) -> tuple[Row, str]:
    """(row, what is wrong with a text or '')."""
    captions: Sequence[str] = ()
    split = name.partition("/")[0] if "/" in name else None
    url, fault = None, ""
    try:
        if text is not None:
            whole = read_regular(images / text, limits.LINE_BYTES).decode("utf-8-sig")
            captions = [whole] if described else whole.splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fault = f"{text}: {getattr(error, 'strerror', None) or error}"
    try:
        if described is not None:
            entry = json_file.read_object(images / described)
            url = entry.get("url") if isinstance(entry.get("url"), str) else None
            if not any(c.strip() for c in captions):
                captions = [c for key in ("caption", "captions") for c in _listed(entry.get(key)) if isinstance(c, str)]
    except DataError as error:
        fault = fault or str(error)
    row = _row(images, text or described or name, name, list(captions), split if split in SPLIT_FOLDERS else None, url)
    return row, fault


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _row(where: Path, place: str, file: Any, captions: Any, split: Any, url: Any = None) -> Row:
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
    url = url.strip() or None if isinstance(url, str) else None
    return Row(place, posixpath.normpath(file.strip()), kept, (split or "").strip() or None, url)


def _karpathy(where: Path, folder: Path) -> Iterator[Row]:
    for number, image in enumerate(karpathy_images(where)):
        place = f"images[{number}]"
        try:
            file, sentences, split = image["filename"], [s["raw"] for s in image["sentences"]], image.get("split")
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}, {place}: expected `filename` and `sentences[*].raw`: {error!r}") from error
        row = _row(where, place, file, sentences, split, image.get("url"))
        # COCO's JSON stores the subfolder (val2014) separately; some copies of the images are flat.
        nested = posixpath.join(str(image.get("filepath") or ""), row.file)
        yield row._replace(file=nested) if nested != row.file and os.path.isfile(folder / nested) else row


def karpathy_images(where: Path) -> list[Any]:
    """The entries of the list `images` of a file in Karpathy's layout. Raises FileNotFoundError, DataError."""
    try:
        data = read_regular(where, limits.JSON_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"caption file {where} not found; {where.parent} has {listing(where.parent)}") from None
    found = json_file.parse(data, f"{where}: expected Karpathy's JSON with a list `images`")
    images = found.get("images") if isinstance(found, dict) else found
    if not isinstance(found, dict) or not isinstance(images, list):
        raise DataError(f"{where}: expected Karpathy's JSON, an object with a list `images`, found {images!r:.80}")
    return images


def _table(where: Path, columns: Columns) -> Iterator[Row]:
    with open_regular(where) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as stream:
        line = 0
        try:
            header = stream.readline(limits.LINE_BYTES)
            separator, image = _separator(where, header, columns)
            reader = csv.reader(itertools.chain([header], stream), delimiter=separator, strict=True)
            names = [name.strip() for name in next(reader)]
            for values in reader:
                line = reader.line_num
                if not values:
                    continue
                if len(values) != len(names):
                    raise DataError(
                        f"{where}, line {line}: expected {len(names)} columns ({', '.join(names)}), separated by "
                        f"{_SEPARATORS[separator]}, found {len(values)}; put captions that contain {_SEPARATORS[separator]} in "
                        "double quotes"
                    )
                row = dict(zip(names, values, strict=True))
                yield _row(where, f"line {line}", row[image], row[columns.caption], row.get("split"), row.get("url"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{where}, line {line + 1}: not readable as UTF-8 CSV: {error}") from error


def _separator(where: Path, header: str, columns: Columns) -> tuple[str, str]:
    """(separator of a table, its column of files), from the header. Raises DataError with the columns that were found."""
    split = {s: [name.strip() for name in next(csv.reader([header.rstrip("\r\n")], delimiter=s), [])] for s in _SEPARATORS}
    for separator, names in split.items():
        image = next((name for name in (columns.image, "file") if name in names), None)
        if image is not None and columns.caption in names:
            return separator, image
    best = max(split, key=lambda s: len(split[s]))
    wanted = "file" if columns.image == "file" else f"file or {columns.image}"
    raise DataError(
        f"{where}, line 1: expected a header with the columns {wanted}, and {columns.caption}, separated by commas, tabs, "
        f"semicolons or vertical bars; found {', '.join(split[best]) or 'nothing'}"
        + (f" (separated by {_SEPARATORS[best]})" if len(split[best]) > 1 else "")
        + ". config.data.image_column and config.data.caption_column name other columns (icar index: --image-column, "
        "--caption-column)"
    )


def _json_lines(where: Path, columns: Columns) -> Iterator[Row]:
    with open_regular(where) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(limits.LINE_BYTES + 1), b""), start=1):
            if len(line) > limits.LINE_BYTES:
                raise DataError(f"{where}, line {number}: longer than the limit of {limits.LINE_BYTES:,} bytes")
            if not line.strip():
                continue
            row = json_file.parse(line, f"{where}, line {number}")
            image = next((name for name in (columns.image, "file") if isinstance(row, dict) and name in row), None)
            if image is None or columns.caption not in row:
                wanted = "`file`" if columns.image == "file" else f"`file` or `{columns.image}`"
                raise DataError(
                    f"{where}, line {number}: expected an object with {wanted}, and `{columns.caption}`, found {row!r:.80}"
                )
            yield _row(where, f"line {number}", row[image], row[columns.caption], row.get("split"), row.get("url"))


def _flickr(where: Path) -> Iterator[Row]:
    """Rows of results_20130124.token and results.csv of Flickr30k, and of Flickr8k.token.txt: one caption a line."""
    number = 0
    with open_regular(where) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                line = line.rstrip("\r\n")
                if not line.strip() or (number == 1 and _FLICKR_HEADER.match(line)):
                    continue
                found = _FLICKR_LINE.fullmatch(line)
                if found is None:
                    raise DataError(
                        f"{where}, line {number}: expected `NAME.jpg#0<tab>caption` or `NAME.jpg| 0| caption`, "
                        f"found {line!r:.80}"
                    )
                yield _row(where, f"line {number}", found["file"], found["caption"], None)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}, line {number + 1}: not readable as UTF-8: {error}") from error


def listing(root: Path) -> str:
    """The first names of a folder, for messages."""
    return some(sorted(p.name for p in root.iterdir()))


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are, for messages."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]).encode("utf-8", "backslashreplace").decode() + more
