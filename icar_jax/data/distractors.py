"""Distractors: additional gallery images that are never queries or targets, checked for overlap with the evaluated images."""

from __future__ import annotations

import numpy as np

from icar_jax.config import ConfigError, DataConfig, DistractorConfig
from icar_jax.data.configured import open_files
from icar_jax.data.records import Source, Subset
from icar_jax.data.scenes import Scenes

_NAMES_SHOWN = 3


def distractor_source(distractors: DistractorConfig, data: DataConfig) -> Source:
    """Returns the first `size` images of `config.eval.distractors` (all if size is 0), read with the options of `data`.

    Raises ConfigError, ShardError or OSError as the sources do.
    """
    d = distractors
    if d.source == "scenes":
        return Scenes(d.split, d.size, image_size=data.scenes_pixels)
    source = open_files(d.source, d, d.split or (None if d.source == "folder" else "."), data)
    if d.size > len(source):
        raise ConfigError(
            f"config.eval.distractors.size={d.size}, but {source.name} holds {len(source)} images; lower it, or pass 0 for all"
        )
    return Subset(source, np.arange(d.size), source.name) if d.size else source


def source_urls(source: Source) -> list[str | None] | None:
    """Returns the URL of every record; None if the source has no URLs."""
    try:
        urls = source.urls()
    except ConfigError:  # Parquet files without a column of URLs
        return None
    return urls if urls is not None and any(urls) else None


def require_apart(base: Source, far: Source, base_urls: list | None, far_urls: list | None) -> list[str]:
    """Raises ConfigError if a distractor is also an image of the base set; returns sentences on how this was checked.

    Compares the shard files of both sources, or their image names if both have names of their own, and the URLs from
    `source_urls`. Names of records in shards are numbers, so they cannot be compared between shards.
    """
    notes, checked = [], []
    for what, of in (("shard files", _shard_files), ("names", _names)):
        ours, theirs = of(base), of(far)
        if ours is not None and theirs is not None:
            checked.append(what)
            _refuse(what, ours & theirs, base, far)
    if base_urls is not None and far_urls is not None:
        checked.append("URLs")
        _refuse("URLs", {u for u in base_urls if u} & {u for u in far_urls if u}, base, far)
    elif far_urls is not None and (ours := _names(base)) is not None:
        checked.append("file names in URLs")
        named = {name.rpartition("/")[2] for name in ours}
        ends = sorted(u for u in far_urls if u and u.split("?")[0].rpartition("/")[2] in named)
        if ends:
            notes.append(
                f"{len(ends)} distractors have URLs that end in the name of an image of {base.name} ({_some(ends)}): if these "
                "are the same images, remove them"
            )
    if not checked:
        notes.append(f"could not check whether {far.name} holds images of {base.name}: no names or URLs to compare")
    return notes or [f"no distractor is also in {base.name} (compared: {' and '.join(checked)})"]


def _refuse(what: str, shared: set[str], base: Source, far: Source) -> None:
    if shared:
        raise ConfigError(
            f"config.eval.distractors: {len(shared)} {what} of {far.name} are also in the evaluated {base.name} "
            f"({_some(sorted(shared))}); evaluated images must not be distractors: remove these"
        )


def _shard_files(source: Source) -> set[str] | None:
    source = source.source if isinstance(source, Subset) else source
    return set(source.paths) if source.paths is not None else None


def _names(source: Source) -> set[str] | None:
    """Returns image names; for scenes the split's name, which prefixes all names; None for records in shards."""
    inner = source.source if isinstance(source, Subset) else source
    if isinstance(inner, Scenes):
        return {inner.name}
    return set(source.names) if inner.names is not None else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
