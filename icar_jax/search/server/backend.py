"""The search backend of the server: the worker that calls the model, store information, and counts of returned images."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from icar_jax.data.images import ImageError, decode
from icar_jax.inference.forward import count_compilations
from icar_jax.search.access import QueryError, StoreError
from icar_jax.search.local_socket import Answer, Request, Unanswered
from icar_jax.search.query import Result, Searcher
from icar_jax.search.server import schemas
from icar_jax.search.server.errors import RequestError, store_unreadable
from icar_jax.search.server.metrics import Metrics
from icar_jax.search.server.worker import Worker
from icar_jax.search.store import Store

TEXT_BATCH = 8  # most queries encoded together; the batch size with which `icar serve` loads the model
NOTE_EVERY_S = 30.0


@dataclass(frozen=True)
class TextQuery:
    """A text query for k hits; `where` is an SQL filter over the store's columns. `note`: count the hits as returned."""

    text: str
    k: int
    where: str | None
    exact: bool
    note: bool = True


@dataclass(frozen=True)
class ImageQuery:
    """An image query with a decoded RGB image; other fields as in TextQuery."""

    image: Image.Image
    k: int
    where: str | None
    exact: bool
    note: bool = True


class Backend:
    """Runs searches for the server.

    Args:
        searcher: used only by the worker thread once this is started.
        store: a separate handle for this object; other threads look up files and counts in it during searches.
        queue: most searches that may wait.
        note_every_s: interval in seconds at which returned images are counted in the store.
    """

    def __init__(self, searcher: Searcher, store: Store, queue: int, note_every_s: float = NOTE_EVERY_S):
        self._searcher, self._store, self._note_every_s = searcher, store, note_every_s
        self.metrics = Metrics()
        self.worker = Worker(
            self._handle, queue, {"text": TEXT_BATCH}, lambda kind, n: self.metrics.batch.labels(kind).observe(n)
        )
        self.image_side: int = searcher.model.preprocess.image_size
        self._lock = threading.Lock()  # guards the store
        self._info: tuple[tuple[int, int], dict[str, Any]] | None = None  # (version, renewals) and counts
        self._returned: list[str] = []
        self._returned_lock = threading.Lock()
        self._stopping = threading.Event()
        self._noting = threading.Thread(target=self._note_returned, name="icar-notes", daemon=True)
        self.metrics.gauge("icar_queue_depth", "Searches waiting in the queue", lambda: self.worker.waiting)
        self.metrics.gauge("icar_store_rows", "Images in the store", self._count)

    def warm_up(self) -> None:
        """Compiles everything that searches run; call it before `start`."""
        self._searcher.warm_up(images=True)
        if self._searcher.model.encodes_text:
            self._searcher.model.encode_text(["warm up"] * TEXT_BATCH)
        if self._store.count():
            self._searcher.search_image(np.zeros((self.image_side, self.image_side, 3), np.uint8), k=1)

    def start(self) -> None:
        """Starts the worker and the counting thread."""
        self.worker.start()
        self._noting.start()

    def stop(self) -> None:
        """Stops the threads: finishes the running search, rejects waiting ones, and stores the counts."""
        self.worker.stop()
        self._stopping.set()
        self._noting.join(10.0)

    def require_ready(self) -> None:
        """Raises StoreError if the store cannot be read."""
        with self._lock:
            self._store.count()

    def paths_of(self, sha256: str) -> list[str]:
        """Paths of the indexed files with this SHA-256."""
        with self._lock:
            return sorted(self._store.rows("sha256", [sha256], ["path"])["path"].to_pylist())

    def roots(self) -> list[str] | None:
        """Folders below which files may be served; None if the store has not recorded them."""
        with self._lock:
            return self._store.roots()

    def info(self, limits: schemas.Limits) -> schemas.StoreInfo:
        """Current contents of the store; counts are cached until it changes."""
        with self._lock:
            version = self._store.version()
            state = (version, self._store.renewals)
            if self._info is None or self._info[0] != state:
                self._info = state, self._counts()
            meta, counts = self._store.meta, self._info[1]
        images = counts["images"]
        shares = [
            schemas.ExitShare(exit=exit, images=n, share=n / max(1, images)) for exit, n in sorted(counts["exits"].items())
        ]
        return schemas.StoreInfo(
            images=images, scored=counts["scored"], exits=shares, embed_dim=self._store.embed_dim, model=meta["model"],
            checkpoint=meta["checkpoint"], created_at=meta["created_at"], version=version, limits=limits,
        )  # fmt: skip

    def _counts(self) -> dict[str, Any]:
        with self._store.reading() as images:
            count = images.count_rows
            exits = {exit: count(f"exit = {exit}") for exit in self._store.exits}
            return {"images": count(), "scored": count("complexity IS NOT NULL"), "exits": exits}

    def _count(self) -> float:
        try:
            with self._lock:
                return self._store.count()
        except StoreError:  # keep serving the other metrics
            return math.nan

    def answer(self, found: Result, parts_s: Mapping[str, float]) -> schemas.Answer:
        """Converts a Result to the API schema; `parts_s` are latencies in seconds by part."""
        hits = [
            schemas.Hit(
                id=hit.sha256, name=os.path.basename(hit.path), path=hit.path, caption=hit.caption, score=hit.score,
                cosine=hit.cosine, complexity=hit.complexity, exit=hit.exit,
            )
            for hit in found.hits
        ]  # fmt: skip
        latency = schemas.Latency(**{name: 1000 * seconds for name, seconds in parts_s.items()})
        nothing = found.nothing_here
        verdict = schemas.Verdict(nothing_here=nothing.verdict, statistic=nothing.statistic, threshold=nothing.threshold)
        return schemas.Answer(hits=hits, verdict=verdict, truncated=found.truncated, latency_ms=latency)

    def answer_locally(self, request: Request, dtype: str, timeout_s: float) -> Answer:
        """Answers a request of `local_socket.ask`; `dtype` is that of the model, and `timeout_s` the limit of a search.

        Raises QueryError, StoreError, and Unanswered if this server cannot answer.
        """
        if request["dtype"] != dtype:
            raise Unanswered(f"the server computes in {dtype}")
        options = {name: request[name] for name in ("k", "where", "exact", "note")}
        with self._lock:
            uri, images = self._store.uri, self._store.count()
        if not images:
            raise StoreError(f"store {uri} is empty; add images with `icar index FOLDER --store {uri}`")
        try:
            kind = "text" if request["image"] is None else "image"
            of = TextQuery(request["text"], **options) if kind == "text" else ImageQuery(decode(request["image"]), **options)
            job = self.worker.submit(kind, of)
            try:
                return asdict(job.future.result(timeout_s))
            finally:
                job.future.cancel()  # a search that still waits never runs
        except RequestError as error:
            raise (QueryError if error.kind == "query" else Unanswered)(error.reason) from error
        except (TimeoutError, ImageError) as error:
            raise Unanswered(f"the server failed: {error}") from error

    def _handle(self, kind: str, queries: Sequence[TextQuery] | Sequence[ImageQuery]) -> list[Result | Exception]:
        with count_compilations() as compiled:
            encoded = None
            if kind == "text":
                start = time.perf_counter()
                encoded = self._searcher.model.encode_text([query.text for query in queries], warn=False)
                encode_s = time.perf_counter() - start
            results = [self._search(query, None if encoded is None else encoded[i]) for i, query in enumerate(queries)]
            if compiled():
                self.metrics.compilations.inc(compiled())
        if encoded is not None:
            for found in results:
                if isinstance(found, Result):
                    found.latency_s["encode"] += encode_s
        noted = [query.note for query in queries]
        paths = [hit.path for found, note in zip(results, noted) if isinstance(found, Result) and note for hit in found.hits]
        with self._returned_lock:
            self._returned += paths
        return results

    def _search(self, query: TextQuery | ImageQuery, embedding: np.ndarray | None) -> Result | Exception:
        options = {"k": query.k, "where": query.where, "exact": query.exact}
        try:
            if embedding is None:
                return self._searcher.search_image(query.image, **options)
            return self._searcher.search_text(query.text, embedding=embedding, **options)
        except QueryError as error:
            return RequestError(422, "query", str(error))
        except StoreError as error:
            return store_unreadable(error)
        except Exception as error:  # fail only this query, not those encoded with it
            return error

    def _note_returned(self) -> None:
        """Counts returned images in the store at intervals, since each update is a commit."""
        while True:
            last = self._stopping.wait(self._note_every_s)
            with self._returned_lock:
                paths, self._returned = self._returned, []
            if paths:
                try:
                    with self._lock:
                        self._store.note_returned(paths)
                except StoreError as error:
                    logging.warning("returned images cannot be counted for `--pass refine --order returned`: %s", error)
            if last:
                return
