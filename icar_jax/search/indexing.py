"""Indexes image files into a store: new and changed files are embedded and written in small, resumable commits.

The store is synchronised to the files. A killed run leaves only complete commits, and the next run compares again to find
what is missing. Content that is already in the store, under any path, is not embedded again.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import jax
from absl import logging
from tqdm import tqdm

from icar_jax import checkpoint as ckpt
from icar_jax import profiling
from icar_jax.data.sources.caption_files import Columns
from icar_jax.data.sources.files import STDIN, ImagePaths, NoImages, vanished
from icar_jax.errors import IcarError
from icar_jax.files.walk import Walk
from icar_jax.inference import pretrained
from icar_jax.inference.files.stream import StreamEncoder, embed_stream
from icar_jax.inference.model import Model
from icar_jax.inference.reading import map_ordered
from icar_jax.parallel import distributed
from icar_jax.search import opening
from icar_jax.search.access import StoreExists, address
from icar_jax.search.captions import Captions
from icar_jax.search.index_result import SUMMED, IndexResult
from icar_jax.search.scan import Scan, is_below, process_share
from icar_jax.search.store import Store
from icar_jax.search.writing import StoreWriter, read_found

COMMIT_ROWS = 1000
_BUNDLE_ROUTES = {"budget": None, "exit": None, "cheap": False}


class IndexingError(IcarError, ValueError):
    """Indexing options that contradict each other or would delete data by mistake; the message names the fix."""


def index_files(
    uri: str | os.PathLike,
    paths: ImagePaths,
    checkpoint: str | os.PathLike | None,
    load: Callable[[str | os.PathLike], Model],
    *,
    exit: int | None = None,
    budget: float | None = None,
    cheap: bool = False,
    prune: bool = False,
    prune_missing: bool = False,
    rehash: bool = False,
    retry_bad: bool = False,
    captions: str | os.PathLike | None = None,
    columns: Columns = Columns(),
    may_be_empty: bool = False,
    commit_rows: int = COMMIT_ROWS,
    threads: int = 0,
    bad_shown: int = 20,
) -> IndexResult:
    """Updates the store at `uri` from image files, with a progress bar; creates it if missing.

    Args:
        checkpoint: path passed to `load`; None uses the checkpoint recorded in the store.
        load: returns the model of a checkpoint; called only if a file must be read or the store is new.
        exit, budget, cheap: as for StreamEncoder, for images embedded in this run.
        prune: remove rows at or below the given folders whose files no longer exist.
        prune_missing: with `prune`, also if a whole given folder is missing or empty.
        rehash: read every file even if its size and modification time are unchanged.
        retry_bad: retry unusable files even if unchanged.
        captions, columns: as for `Captions`; None keeps the captions of the store.
        may_be_empty: no error if there are no files.

    Under jax.distributed, all processes make the same call, and each handles the paths assigned to it by hash.
    Memory grows by about 250 bytes per image in the store.
    Raises StoreError, CheckpointError, NoImages, and IndexingError for paths that do not exist.
    """
    roots, missing = named_roots(paths.named)
    if missing and not (prune and prune_missing):
        raise IndexingError(
            f"{', '.join(missing[:3])} does not exist; is its disk mounted? If the files were deleted, remove their rows with "
            "--prune --prune-missing"
        )
    if prune and not roots:
        raise IndexingError("--prune compares folders with the store; pass folders, not patterns or a list")
    store, model = open_or_create(uri, checkpoint, load, _require_images(paths, missing))
    if prune and not prune_missing:
        _require_no_emptied_folder(store, roots)
    new_captions = (
        Captions(captions, [root for root in roots if os.path.isdir(root)], columns) if captions is not None else None
    )
    done, start = IndexResult(), time.perf_counter()
    with distributed.together("indexing"):
        if distributed.is_main():  # before any of their rows, since `icar serve` only serves files below the roots
            store.add_roots(root for root in roots if os.path.isdir(root) or os.path.islink(root))
        scan = Scan(
            store.state(), store.bad_rows(), rehash=rehash, retry_bad=retry_bad,
            mine=process_share(jax.process_index(), jax.process_count()),
        )  # fmt: skip
        writer = StoreWriter(store, scan, new_captions, done, commit_rows, bad_shown)
        encoding = None
        bar = tqdm(total=paths.count(), desc="index", unit=" images", disable=not distributed.is_main())

        def passed() -> None:  # counted, but excluded from the images/s
            if not bar.disable:  # only process 0 shows the bar
                bar.initial += 1
            bar.update()

        with bar:
            found = scan.to_read(_existing_paths(paths, missing, may_be_empty or (prune and prune_missing), passed), passed)
            while True:
                first = next(found, None)
                if first is None:
                    break
                encoding = encoding or StreamEncoder(model(), exit=exit, budget=budget, cheap=cheap)
                _embed_files(encoding, itertools.chain([first], found), writer, bar, threads, commit_rows)
                found = iter(writer.take_retries())  # another run removed the row to copy from
        if distributed.is_main():  # folders of patterns and lists
            store.add_roots(map(os.path.abspath, paths.folders))
        with profiling.section("saving"):
            writer.recaption()
        gone = [path for path in scan.gone(roots) if vanished(path)]
        if prune:
            with profiling.section("saving"):
                done.removed += store.delete(gone, unless=lambda path: not vanished(path))
        else:
            done.gone = len(gone)
        # An unreadable folder that was not found again is readable now.
        store.clear_bad([name for name in scan.bad_gone(roots) if vanished(name) or os.path.isdir(name)])
        done.unchanged = len(scan.unchanged) - done.captioned
        done.still_bad = len(scan.still_bad)
    for name, value in zip(SUMMED, distributed.total([getattr(done, name) for name in SUMMED]), strict=True):
        setattr(done, name, int(value))
    done.share_exits(store.exits, distributed.total([done.exits[exit] for exit in store.exits]))
    asked = {"budget": budget, "exit": exit, "cheap": cheap}
    done.rerouted = bool(done.unchanged) and store.meta.get("routing", _BUNDLE_ROUTES) != asked
    if distributed.is_main():
        if done.images:
            store.set_meta(routing=asked)
        with profiling.section("saving"):
            store.compact()
    done.seconds = time.perf_counter() - start - done.warm_up_s
    done.total, done.duplicates, done.empty = store.count(), paths.duplicates, list(paths.empty)
    done.left_out = paths.left_out.report()
    by_case = new_captions.said_of_case() if new_captions is not None else None
    if by_case is not None:
        logging.warning("%s", by_case)
    if new_captions is not None and not distributed.total([new_captions.used])[0]:
        raise IndexingError(
            f"{new_captions.where}: no caption matches an image; its file names were resolved relative to its own folder "
            f"and {', '.join(roots) or 'no other folder'}"
        )
    return done


def open_or_create(
    uri: str | os.PathLike, checkpoint: str | os.PathLike | None, load: Callable, before_creating: Callable[[], None]
) -> tuple[Store, Callable[[], Model]]:
    """(store for this checkpoint, function that returns the model, loaded on its first call).

    An existing store only needs the checkpoint's description. Raises StoreError for a store of another model.
    """
    known = opening.open_store(uri) if opening.store_exists(uri) else None
    where = checkpoint_of(uri, checkpoint)
    model = functools.cache(lambda: load(where))
    identity = ckpt.identities(where)
    if "clip" not in identity:
        raise IndexingError(f"{where} contains no CLIP and cannot embed images; pass a bundle or a CLIP checkpoint")

    def make() -> Store:
        if not opening.store_exists(uri):
            before_creating()
            made = model()
            made.fixed_exit(None)  # raises for a model that cannot embed images
            try:
                return opening.create_store(uri, made.identity, made.embed_dim, made.exits, str(Path(where).absolute()))
            except StoreExists:
                pass  # another run created it first
        store = opening.open_store(uri)
        store.require_model(identity, where)
        return store

    if known is not None:
        known.require_model(identity, where)
    store = distributed.main_first("opening the store", make)
    if distributed.is_main():
        store.set_meta(checkpoint=str(Path(where).absolute()), model={**store.meta["model"], **identity})
    return store, model


def checkpoint_of(uri: str | os.PathLike, checkpoint: str | os.PathLike | None) -> str:
    """The path of the model: `checkpoint`, or the one recorded in the store. Raises IndexingError without either.

    A name on the hub gives the folder that its checkpoint was downloaded to.
    """
    if checkpoint is not None:
        found = pretrained.local(checkpoint)
        if found != Path(checkpoint) and not ckpt.is_own(found):
            raise IndexingError(
                f"{checkpoint} holds weights of another library; convert them (`icar convert {checkpoint} OUT`) and pass OUT"
            )
        return str(found)
    if not opening.store_exists(uri):
        raise IndexingError(f"there is no store at {address(uri)}; pass --checkpoint to create one")
    return opening.open_store(uri).meta["checkpoint"]


def named_roots(named: Sequence[str]) -> tuple[list[str], list[str]]:
    """(absolute paths of the given files and folders, those of them that do not exist).

    Patterns and lists are excluded, since what they matched in earlier runs is unknown.
    """
    names = [name for name in named if name != STDIN and (os.path.lexists(name) or not glob.has_magic(name))]
    roots = [os.path.abspath(os.path.expanduser(name)) for name in names]
    return roots, [root for root in roots if vanished(root)]


def _require_images(paths: ImagePaths, missing: Sequence[str]) -> Callable[[], None]:
    """A function that raises NoImages if there are no images; skips lists from stdin, which can be read only once."""
    return lambda: None if STDIN in paths.named or missing else (next(iter(paths)), None)[1]


def _require_no_emptied_folder(store: Store, roots: Sequence[str]) -> None:
    """Raises IndexingError if a folder at or below `roots` has rows in the store but contains no image now.

    An unmounted disk leaves an empty folder. A folder that no longer exists was deleted on purpose.
    """
    there = sorted({_nearest_existing(folder, root) for root in roots for folder in store.folders_below(root)})
    empty = [folder for folder in there if next(Walk().images(folder), None) is None]
    empty = [folder for folder in empty if not any(is_below(folder, [other]) for other in empty if other != folder)]
    if empty:
        counts = [store.count_below(folder) for folder in empty]
        named = "; ".join(
            f"{folder} contains no image, but the store has {count:,} from there"
            for folder, count in zip(empty[:5], counts, strict=False)
        )
        more = f"; and {len(empty) - 5} more such folders" if len(empty) > 5 else ""
        raise IndexingError(
            f"{named}{more}: is a disk not mounted? --prune --prune-missing removes all {sum(counts):,} of these rows, and "
            "those of other missing files"
        )


def _nearest_existing(folder: str, root: str) -> str:
    """The nearest existing folder at or above `folder`, not above `root`."""
    while folder != root and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _existing_paths(
    paths: ImagePaths, missing: Sequence[str], none_is_fine: bool, passed: Callable[[], None]
) -> Iterator[str]:  # fmt: skip
    """Yields the paths that exist; `passed()` is called for missing and duplicate ones."""
    left_out = set(missing)
    try:
        for path in paths.each(passed):
            if os.path.abspath(path) in left_out:
                passed()
            else:
                yield path
    except NoImages:
        if not none_is_fine:
            raise


def _embed_files(encoding: StreamEncoder, found, writer: StoreWriter, bar: tqdm, threads: int, commit_rows: int) -> None:
    read = map_ordered(
        lambda each: read_found(each, encoding.preprocesses, writer.is_known),
        found,
        ahead=2 * encoding.model.batch_size,
        threads=threads,
    )
    with closing(read):

        def images():
            for item in read:
                bar.update()
                yield item

        def write(images, routed) -> None:
            writer.write(images, routed)
            bar.set_postfix_str(writer.done.shares())

        embed_stream(encoding, writer.to_embed(images()), commit_rows, write, writer.done, bar.unpause)
        with profiling.section("saving"):
            writer.finish()
