"""Searches a store by text or by image: ranked hits, scores comparable between queries, and a no-match verdict."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from icar_jax import checkpoint as ckpt
from icar_jax.checkpoint import CheckpointError
from icar_jax.files import limits
from icar_jax.search import filters, vector_index
from icar_jax.search.access import QueryError, StoreError
from icar_jax.search.background import RESAMPLE_RATIO, SEED, TOP, Background, open_background
from icar_jax.search.opening import open_store
from icar_jax.search.store import Store
from icar_jax.search.tables import vectors
from icar_jax.search.tile_table import Tiles, with_tiles

if TYPE_CHECKING:  # neither JAX nor Pillow is imported before it is needed
    from icar_jax.data.images import ImageLike
    from icar_jax.inference.model import Model
    from icar_jax.search.model_process import ModelProcess

_SHOWN = 200  # characters of a filter in a message
COLUMNS = ("path", "caption", "exit", "complexity", "sha256")
IMAGES_COMPARED = 256  # images sampled from the store as the background of image queries


@dataclass(frozen=True)
class Hit:
    """A search hit.

    Attributes:
        path: absolute path. caption, complexity: None if unknown. exit: executed blocks of its embedding. sha256: of the file.
        cosine: similarity to the query, by which hits are ranked; comparable only within one query.
        score: in (0, 1), comparable between queries, exits and stores of one CLIP: the model's probability that the image
            matches the query rather than one of 256 background texts (for an image query: images of the store).
    """

    path: str
    caption: str | None
    cosine: float
    score: float
    exit: int
    complexity: float | None
    sha256: str


@dataclass(frozen=True)
class Verdict:
    """Whether nothing in the store matches the query.

    Attributes:
        verdict: True if nothing matches.
        statistic: how well the query fits the best of its first hits (see icar_jax.search.background); None without hits and
            for image queries, whose verdict is True only without hits.
        threshold: the verdict is True below it; None like `statistic`.
    """

    verdict: bool
    statistic: float | None = None
    threshold: float | None = None

    def __bool__(self) -> bool:
        return self.verdict


@dataclass(frozen=True)
class Result:
    """The result of a search.

    Attributes:
        hits: best first.
        truncated: whether the query exceeded the model's context length and was truncated.
        nothing_here: whether nothing in the store matches.
        latency_s: seconds of 'encode' (the query) and of 'search' (the store and the scores).
    """

    hits: list[Hit]
    truncated: bool
    nothing_here: Verdict
    latency_s: dict[str, float]


class Searcher:
    """Searches a store; not thread-safe, so use one per thread.

    Raises StoreError if the store was made with another model.
    """

    def __init__(self, store: Store, model: Model | ModelProcess, progress: bool = False):
        store.require_model(model.identity, getattr(model, "path", "this model"))
        self.store, self.model, self._progress = store, model, progress
        self._background: tuple[int, Background] | None = None  # with the number of images at that time
        self._images: tuple[int, Background] | None = None
        self._renewals = store.renewals

    def search_text(
        self, text: str, k: int = 20, where: str | None = None, exact: bool = False, embedding: np.ndarray | None = None
    ) -> Result:
        """The k images closest to a text, or fewer if the store or the filtered part of it is smaller.

        Args:
            where: SQL filter over the columns of the store, such as "complexity < 0.4 AND exit = 6".
            exact: compare every row even if there is a vector index.
            embedding: precomputed embedding of the text [D].

        Raises:
            QueryError: empty text, or invalid filter or k. StoreError: the store cannot be read.
        """
        if not text.strip():
            raise QueryError("the query is empty; describe the image in a few words")
        start = time.perf_counter()
        if embedding is None:
            embedding = self.model.encode_text([text])[0]
        truncated = self.model.is_too_long(text)
        encoded = time.perf_counter()
        rows = self._nearest(embedding, max(k, TOP), where, exact, k)
        if not len(rows):
            return _result(rows, [], [], k, Verdict(True), truncated, start, encoded)
        background = self._text_background()
        cosines = rows["cosine"].to_numpy()
        lifts = background.lifts(cosines, vectors(rows["vector"]), rows["path"].to_pylist())
        statistic = background.statistic(cosines, lifts)
        verdict = Verdict(statistic < background.threshold, statistic, background.threshold)
        return _result(rows, cosines, background.score(lifts), k, verdict, truncated, start, encoded)

    def search_image(self, image: ImageLike, k: int = 20, where: str | None = None, exact: bool = False) -> Result:
        """The k images closest to an image (path, bytes, array or PIL image), which is embedded at full depth.

        `where` and `exact` as for `search_text`. The verdict is True only without hits. Raises as `search_text` and
        icar_jax.data.images.decode.
        """
        start = time.perf_counter()
        embedding = self.model.encode_image([image], exit=self.model.exits[-1])[0]
        encoded = time.perf_counter()
        rows = self._nearest(embedding, k, where, exact, k)
        if not len(rows):
            return _result(rows, [], [], k, Verdict(True), False, start, encoded)
        background, cosines = self._image_background(), rows["cosine"].to_numpy()
        lifts = background.lifts(cosines, vectors(rows["vector"]), rows["path"].to_pylist())
        return _result(rows, cosines, background.score(lifts), k, Verdict(False), False, start, encoded)

    def warm_up(self, images: bool = True) -> None:
        """Compiles what a query runs and opens the background, so that the first search is as fast as later ones."""
        if self.model.encodes_text:
            self.model.encode_text(["warm up"])
        if images:
            side = self.model.preprocess.image_size
            self.model.encode_image([np.zeros((side, side, 3), np.uint8)], exit=self.model.exits[-1])
        if self.model.encodes_text and self.store.count():
            self._text_background()

    def _nearest(self, embedding: np.ndarray, n: int, where: str | None, exact: bool, k: int) -> pa.Table:
        if k < 1:
            raise QueryError(f"k must be at least 1, found {k}")
        if where is not None and (fault := filters.fault_of(where)) is not None:
            raise self._no_filter(where, fault)

        def found(where: str | None) -> pa.Table:
            with self.store.reading() as images:
                query = images.search(embedding.astype(np.float32), vector_column_name="vector")
                query = vector_index.prepare_query(query, exact, filtered=where is not None)
                query = query.limit(n).select([*COLUMNS, "vector", "_distance"])
                most = None if where is None else timedelta(seconds=limits.FILTER_SECONDS)
                rows = (query if where is None else query.where(where)).to_arrow(timeout=most).drop_columns("_distance")
                if "tiles" in self.store.meta:
                    rows = with_tiles(rows, images, Tiles(self.store).nearest(embedding, n), embedding, where)
                return _by_cosine(rows, embedding).slice(0, n)

        try:
            return found(where)
        except StoreError as error:
            if where is None:
                raise
            found(None)  # raises if the store fails rather than the filter
            raise self._no_filter(where, _plain(error.__cause__ or error)) from error

    def _no_filter(self, where: str, why: str) -> QueryError:
        known = ", ".join(name for name in self.store.images.schema.names if name != "vector")
        return QueryError(f"invalid filter {where[:_SHOWN]!r}: {why}; the columns are {known}")

    def _text_background(self) -> Background:
        count = self._count()
        if (
            self._background is None
            or not self._background[0] / RESAMPLE_RATIO <= count <= self._background[0] * RESAMPLE_RATIO
        ):
            self._background = count, open_background(self.store, self.model, self._first, self._progress)
        return self._background[1]

    def _count(self) -> int:
        """Number of images in the store; drops the cached backgrounds if the store was recreated."""
        count = self.store.count()
        if self.store.renewals != self._renewals:
            self._background = self._images = None
            self._renewals = self.store.renewals
        return count

    def _first(self, embedding: np.ndarray) -> tuple[np.ndarray, Sequence[str]]:
        rows = self._nearest(embedding, TOP, None, False, TOP)
        return vectors(rows["vector"]), rows["path"].to_pylist()

    def _image_background(self) -> Background:
        version = self.store.version()
        if self._images is None or self._images[0] != version:
            rows = self.store.sample(IMAGES_COMPARED, SEED, ["path", "vector"])
            paths = np.array(rows["path"].to_pylist(), object)
            self._images = version, Background(vectors(rows["vector"]).astype(np.float32), paths, self.model.temperature)
        return self._images[1]


def open_searcher(
    uri: str | os.PathLike, checkpoint: str | os.PathLike | None = None, *, batch_size: int = 64, dtype: str = "float32",
    progress: bool = False, load: Callable[..., Model | ModelProcess] | None = None,
) -> Searcher:  # fmt: skip
    """Opens a store with the CLIP it was indexed with; the complexity model of a bundle is not loaded.

    Args:
        checkpoint: path of the model, if it has moved since indexing. batch_size, dtype: as for `icar_jax.load`.
        progress: show progress bars; a new store encodes its background captions once.
        load: loads the model, with these arguments; None is `icar_jax.load`.

    Raises:
        StoreError: no store, or its model is missing or differs. CheckpointError: `checkpoint` is not a checkpoint.
    """
    if load is None:
        from icar_jax.inference.loading import load
    store = open_store(uri)
    path = store.meta["checkpoint"] if checkpoint is None else checkpoint
    try:
        folder = ckpt.find(path)
        if ckpt.describe(folder)["kind"] == "bundle":
            folder = folder / "clip"
        model = load(folder, batch_size=batch_size, dtype=dtype)
    except (CheckpointError, OSError) as error:
        if checkpoint is not None:
            raise
        raise StoreError(
            f"store {store.uri} was indexed with {path}, which cannot be opened: {error}; pass the current path of the model "
            "as --checkpoint"
        ) from error
    store.require_model(model.identity, str(path))
    return Searcher(store, model, progress)


def _by_cosine(rows: pa.Table, embedding: np.ndarray) -> pa.Table:
    """Rows with exact `cosine`, best first; LanceDB's own distances have errors of 1e-4, as it rounds queries to float16."""
    if not len(rows):
        return rows.append_column("cosine", pa.array([], pa.float64()))
    found = vectors(rows["vector"]).astype(np.float64)
    cosines = np.clip(found @ embedding / np.linalg.norm(found, axis=1) / np.linalg.norm(embedding), -1, 1)
    order = np.argsort(-cosines, kind="stable")
    return rows.append_column("cosine", pa.array(cosines)).take(order)


def _result(rows, cosines, scores, k, verdict, truncated, start, encoded) -> Result:
    hits = [
        Hit(cosine=float(cosine), score=float(score), **row)
        for row, cosine, score in zip(rows.select(COLUMNS).slice(0, k).to_pylist(), cosines[:k], scores[:k], strict=True)
    ]
    return Result(hits, truncated, verdict, {"encode": encoded - start, "search": time.perf_counter() - encoded})


def _plain(error: Exception) -> str:
    """The first line of a LanceDB error, without locations in its source code."""
    return re.sub(r",? ?\S+\.rs:\d+(:\d+)?.*", "", str(error).strip().splitlines()[0] if str(error).strip() else repr(error))
