"""Labels as data sets release them, keyed by running ids, joined with the names and URLs of images.

A running id is only a key into the file that was released with it (Karpathy's JSON, a manifest), never a position in what was
downloaded: positions shift for all later images when a download fails.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from icar_jax.config import ConfigError
from icar_jax.data.ratings.labels import labels_of
from icar_jax.data.ratings.table import UNDECIDED
from icar_jax.data.sources.caption_files import karpathy_images, some
from icar_jax.files import json_file
from icar_jax.files.opening import open_regular

IDS = ("imgid", "cocoid", "index")
_KEYS = ("id", "key", *IDS, "image_id", "url", "file", "filename", "name")  # of a list of objects
_NUMBER = re.compile(r"(?:.*_)?0*(\d+)")  # 391895, laion_00000012


class Joined(NamedTuple):
    """text: the file to write, JSON of category labels or a CSV of complexity labels, by `suffix`. report: what was joined."""

    text: str
    suffix: str
    report: str


def join_labels(
    labels: str | os.PathLike,
    *,
    captions: str | os.PathLike | None = None,
    by: str | None = None,
    split: str | None = None,
    manifest: str | os.PathLike | None = None,
) -> Joined:
    """Joins labels with the images that their ids stand for.

    labels: JSON of id -> labels, or a list of objects with an id and `categories`, `labels` or `label`. Labels are lists of
    categories, or 0, 1 and -1 (complexity).
    captions, by, split: Karpathy's JSON; ids are its `imgid` or `cocoid`, or count its images (of the split) from 0.
    manifest: a .tsv with an id or local file and a URL in each line, or a .json of URL -> local file or the other way round.
    Without both, the keys are names or URLs already.

    Raises ConfigError for files and options that do not go together, and where no label finds an image.
    """
    labels = Path(labels).expanduser()
    if captions is not None and manifest is not None:
        raise ConfigError("--captions and --manifest exclude each other: ids stand for images of one of them")
    if (captions is None) != (by is None) or (split is not None and captions is None):
        raise ConfigError("--captions needs --by imgid, cocoid or index, and --by and --split need --captions")
    table = _read(labels)
    key_of: Callable[[str], str | None]
    if captions is not None:
        known = _karpathy_ids(Path(captions).expanduser(), str(by), split)
        key_of, where = lambda key: known.get(_plain_number(key)), f"{captions}{f', split {split}' if split else ''}"
    elif manifest is not None:
        known = _manifest_ids(Path(manifest).expanduser(), {_stem(key) for key in table})
        key_of, where = lambda key: known.get(_stem(key)), os.fspath(manifest)
    else:
        key_of, where = lambda key: key, ""
    joined, lost = {}, []
    for key, value in table.items():
        if (name := key_of(key)) is None:
            lost.append(key)
        elif name in joined:
            raise ConfigError(f"{labels}: two entries stand for {name}, the second is {key!r}; keep one")
        else:
            joined[name] = value
    if not joined:
        raise ConfigError(
            f"{labels}: none of its {len(table)} entries (first: {next(iter(table), None)!r}) is "
            + (f"among the ids of {where}" + (f" by {by}; try another --by" if by else "") if where else "usable")
        )
    report = f"{labels}: {len(joined)} of {len(table)} entries joined" + (f" with {where}" if where else "")
    report += f"; {len(lost)} stand for no image there: {some(lost)}" if lost else ""
    if any(_is_complexity(value) for value in joined.values()):
        return _complexity(labels, joined, report)
    sets = {name: list(labels_of(value, f"{labels}, entry of {name!r}")) for name, value in joined.items()}
    bare = sum(not each for each in sets.values())
    report += f"; {bare} of them have no category" if bare else ""
    return Joined(json.dumps(sets, ensure_ascii=False, indent=0) + "\n", ".json", report)


def _read(path: Path) -> dict[str, Any]:
    found = json_file.read(path, ConfigError, pairs=json_file.without_duplicates)
    if isinstance(found, dict):
        return {key: _value(entry) for key, entry in found.items()}
    if not isinstance(found, list):
        raise ConfigError(f"{path}: expected an object {{id: labels}}, or a list of objects, found {type(found).__name__}")
    table: dict[str, Any] = {}
    for number, entry in enumerate(found):
        named = [key for key in _KEYS if isinstance(entry, dict) and key in entry]
        if not named:
            raise ConfigError(f"{path}, entry {number}: expected an object with one of {', '.join(_KEYS)}, found {entry!r:.80}")
        key = str(entry[named[0]])
        if key in table:
            raise ConfigError(f"{path}, entry {number}: {named[0]} {key!r} occurs twice")
        table[key] = _value(entry)
    return table


def _value(entry: Any) -> Any:
    """`label` or `labels` of an object, else the entry itself."""
    return entry.get("label", entry.get("labels", entry)) if isinstance(entry, dict) else entry


def _is_complexity(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _complexity(where: Path, joined: Mapping[str, Any], report: str) -> Joined:
    wrong = [(name, value) for name, value in joined.items() if not _is_complexity(value) or value not in (UNDECIDED, 0, 1)]
    if wrong:
        raise ConfigError(
            f"{where}: {len(wrong)} of {len(joined)} complexity labels are not 0, 1 or {UNDECIDED}, such as {wrong[0][1]!r} of "
            f"{wrong[0][0]!r}"
        )
    kept = {name: value for name, value in joined.items() if value != UNDECIDED}
    urls = [name for name in kept if _is_url(name)]
    if urls and len(urls) != len(kept):
        other = next(name for name in kept if not _is_url(name))
        raise ConfigError(f"{where}: some keys are URLs and some are not, such as {other!r}; write two files")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["url" if urls else "file", "score"])
    writer.writerows((name, int(value)) for name, value in kept.items())
    return Joined(stream.getvalue(), ".csv", f"{report}; {len(joined) - len(kept)} undecided (label {UNDECIDED}) dropped")


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _plain_number(key: str) -> int | None:
    found = _NUMBER.fullmatch(_stem(key))
    return int(found[1]) if found else None


def _stem(key: str) -> str:
    return os.path.splitext(key.strip().rpartition("/")[2])[0]


def _karpathy_ids(where: Path, by: str, split: str | None) -> dict[int | None, str]:
    """Id -> file name of the images of a split. Raises ConfigError where images lack the id."""
    images = karpathy_images(where)
    if not all(isinstance(image, dict) and isinstance(image.get("filename"), str) for image in images):
        raise ConfigError(f"{where}: expected Karpathy's JSON, whose images have a `filename`")
    if split is not None:
        images = [image for image in images if image.get("split") in split.split("+")]
    if not images:
        raise ConfigError(f"{where}: no images of split {split!r}")
    if by == "index":
        return {number: image["filename"] for number, image in enumerate(images)}
    bare = [image["filename"] for image in images if not isinstance(image.get(by), int)]
    if bare:
        raise ConfigError(f"{where}: {len(bare)} images have no {by} (such as {bare[0]}); use another --by")
    return {image[by]: image["filename"] for image in images}


def _manifest_ids(where: Path, wanted: set[str]) -> dict[str, str]:
    """Id -> URL for the wanted ids. Raises ConfigError for an id with two URLs, and a file without URLs."""
    found: dict[str, str] = {}
    rows = 0
    for cells in _manifest_rows(where):
        url = next((cell.strip() for cell in cells if _is_url(cell.strip())), None)
        if url is None:
            continue
        rows += 1
        for name in {_stem(cell) for cell in cells if not _is_url(cell.strip())} & wanted:
            if found.setdefault(name, url) != url:
                raise ConfigError(f"{where}: {name} has two URLs, {found[name]} and {url}")
    if not rows:
        raise ConfigError(f"{where}: expected an id and a URL in each line or entry, found no URL")
    return found


def _manifest_rows(where: Path) -> Any:
    if where.suffix.lower() == ".json":
        table = json_file.read_object(where, ConfigError)
        for key, value in table.items():
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            yield [key, *(cell for cell in inner if isinstance(cell, str))]
        return
    if where.suffix.lower() not in (".tsv", ".csv"):
        raise ConfigError(f"{where}: expected a manifest as .tsv, .csv or .json, found {where.suffix or 'no suffix'}")
    try:
        with open_regular(where) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as stream:
            if where.suffix.lower() == ".csv":
                yield from csv.reader(stream)
            else:  # captions in it may hold quotes
                for line in stream:
                    yield line.rstrip("\r\n").split("\t")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{where}: not readable as a table in UTF-8: {error}") from error
