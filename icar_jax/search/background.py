"""Background texts: make scores comparable between queries, and detect queries that match nothing in the store.

The cosine of a text and an image is comparable only within one query: some texts are close to every image, some images are
close to every text, and shallow exits give lower cosines. Each hit is therefore scored by how much better the query fits it
than a fixed set of background texts, with the softmax of CLIP training. For image x, query q, K background texts b and
temperature t:

    lift(q, x) = t cos(q, x) - log mean_b exp(t cos(b, x))        score = e^lift / (e^lift + REFERENCE)

The score is the model's probability that x matches q rather than one of REFERENCE background texts. Effects of an image (or
its exit) on all texts cancel. The background is a sample of the store's captions plus a list of plain captions.

The statistic of a query is the maximum of lift + t cos over its first hits: the lift separates subjects best, the cosine
details (docs/search.md measures both). A query below the threshold matches nothing. With captions in the store, the threshold
is the MISS_RATE quantile of their statistics, their own images included; otherwise it is the median statistic of the plain
captions, few of which match a typical collection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from absl import logging
from tqdm import tqdm

from icar_jax.search.access import StoreError, store_errors
from icar_jax.search.plain import PLAIN
from icar_jax.search.store import KEEP_OF_MANY, KEEP_VERSIONS, Store
from icar_jax.search.tables import cleanup_age, vector_column

if TYPE_CHECKING:  # JAX is not imported before it is needed
    from icar_jax.inference.model import Model
    from icar_jax.search.model_process import ModelProcess

TABLE = "background"
OWN_CAPTIONS = 128  # captions sampled from the store
MIN_OWN_CAPTIONS = 32  # with fewer, the threshold comes from the plain captions
REFERENCE = 256
TOP = 10  # hits considered for the statistic of a query
MISS_RATE = 0.05  # fraction of the store's captions that may fall below the threshold
SEED = 0
RESAMPLE_RATIO = 1.5  # resample when the store has grown or shrunk by this factor

SCHEMA_TEXT = [("text", pa.string()), ("path", pa.string()), ("images", pa.int64()), ("model", pa.string())]
Nearest = Callable[[np.ndarray], tuple[np.ndarray, Sequence[str]]]


@dataclass(frozen=True)
class Background:
    """Embedded background texts that queries are compared with.

    Attributes:
        vectors: float [K, D], unit norm.
        paths: [K], path of the image that the caption belongs to; '' for plain captions.
        temperature: the model's softmax temperature, t in the module docstring.
        threshold: queries with a lower statistic match nothing; None before `calibrate`.
    """

    vectors: np.ndarray
    paths: np.ndarray
    temperature: float
    threshold: float | None = None

    def lifts(
        self, cosines: np.ndarray, embeddings: np.ndarray, paths: Sequence[str], leave_out: int | None = None
    ) -> np.ndarray:
        """Lift [n] of n hits, from their cosines with the query [n], embeddings [n, D] and paths.

        A caption is not counted for its own image. `leave_out` excludes one background text by index.
        """
        if not len(cosines):
            return np.zeros(0)
        logits = self.temperature * (self.vectors.astype(np.float32) @ np.asarray(embeddings, np.float32).T)  # [K, n]
        counted = self.paths[:, None] != np.asarray(paths, object)[None, :]
        if leave_out is not None:
            counted[leave_out] = False
        top = logits.max(axis=0)
        mean = np.where(counted, np.exp(logits - top), 0.0).sum(axis=0) / np.maximum(1, counted.sum(axis=0))
        return self.temperature * np.asarray(cosines, np.float64) - top - np.log(np.maximum(mean, 1e-30))

    def statistic(self, cosines: np.ndarray, lifts: np.ndarray) -> float:
        """Statistic of a query from the cosines [n] and lifts [n] of its hits, n >= 1; only the first TOP count."""
        return float(np.max((lifts + self.temperature * np.asarray(cosines))[:TOP]))

    def score(self, lifts: np.ndarray) -> np.ndarray:
        """Score [n] in (0, 1) of lifts [n]."""
        return 1 / (1 + REFERENCE * np.exp(-np.asarray(lifts)))


def threshold_of(own: np.ndarray, plain: np.ndarray) -> float:
    """Threshold from the statistics of the store's own captions and of the plain captions, each [n]."""
    return float(np.quantile(own, MISS_RATE) if len(own) >= MIN_OWN_CAPTIONS else np.median(plain))


def calibrate(background: Background, nearest: Nearest, progress: bool = True) -> Background:
    """The background with its threshold set; `nearest(vector)` returns embeddings [n, D] and paths of the TOP images."""
    own, plain = [], []
    for i, vector in enumerate(
        tqdm(background.vectors, "Calibrating the threshold", unit="query", disable=not progress, leave=False)
    ):
        embeddings, paths = nearest(vector)
        cosines = np.asarray(embeddings, np.float32) @ np.asarray(vector, np.float32)
        if len(paths):
            lifts = background.lifts(cosines, embeddings, paths, leave_out=i)
            (own if background.paths[i] else plain).append(background.statistic(cosines, lifts))
    if not plain:
        raise StoreError("the threshold cannot be calibrated on a store without images")
    threshold = threshold_of(np.array(own), np.array(plain))
    return Background(background.vectors, background.paths, background.temperature, threshold)


def open_background(store: Store, model: Model | ModelProcess, nearest: Nearest, progress: bool = True) -> Background:
    """The background of a store; recomputed and stored if missing, or if the size of the store changed by RESAMPLE_RATIO."""
    images, identity = store.count(), model.identity["clip"]
    rows = _rows(store, identity)
    if rows and images / RESAMPLE_RATIO <= rows[0]["images"] <= images * RESAMPLE_RATIO and _plain(rows) == PLAIN:
        paths = np.array([row["path"] for row in rows], object)
        vectors = np.array([row["vector"] for row in rows], np.float32)
        return Background(vectors, paths, model.temperature, rows[0]["threshold"])
    texts, paths = sample_captions(store)
    texts, paths = [*texts, *PLAIN], np.array([*paths, *[""] * len(PLAIN)], object)
    embedded = {row["text"]: row["vector"] for row in rows}
    unknown = [text for text in texts if text not in embedded]
    if unknown:
        encoded = encode(unknown, model, progress).astype(np.float16)  # rounded as in the store
        embedded |= dict(zip(unknown, encoded, strict=True))
    vectors = np.array([embedded[text] for text in texts], np.float32)
    made = calibrate(Background(vectors, paths, model.temperature), nearest, progress)
    try:
        _write(store, made, texts, images, identity)
    except StoreError as error:
        logging.warning("the background of %s could not be stored and will be recomputed next time: %s", store.uri, error)
    return made


def sample_captions(store: Store) -> tuple[list[str], list[str]]:
    """Up to OWN_CAPTIONS distinct captions sampled from the store, and the paths of their images."""
    rows = store.sample(8 * OWN_CAPTIONS, SEED, ["path", "caption"]).to_pylist()
    # Only the first of several captions, one per line.
    rows = {row["caption"].strip().splitlines()[0]: row["path"] for row in rows if row["caption"] and row["caption"].strip()}
    chosen = np.random.default_rng(SEED).permutation(sorted(rows))[:OWN_CAPTIONS]
    return [str(text) for text in chosen], [rows[text] for text in chosen]


def encode(texts: Sequence[str], model: Model | ModelProcess, progress: bool = True) -> np.ndarray:
    """Embeddings float32 [n, D] of n texts, computed in batches."""
    size = model.batch_size
    starts = range(0, len(texts), size)
    starts = tqdm(starts, "Encoding background captions", unit="batch", disable=not progress, leave=False)
    # No warning: the user of a search cannot shorten the store's captions.
    return np.concatenate([model.encode_text(texts[start : start + size], warn=False) for start in starts])


def _rows(store: Store, identity: str) -> list[dict]:
    """Stored rows for this CLIP, in order; empty if there are none or the table is damaged, since it can be recomputed."""
    try:
        if TABLE not in _tables(store):
            return []
        with store_errors(store.uri, f"reading its table {TABLE}"):
            rows = store.database.open_table(TABLE).search().to_arrow().to_pylist()
            return rows if rows and rows[0]["model"] == identity else []
    except (StoreError, KeyError) as error:
        logging.warning("%s; recomputing the background", error)
        _drop(store)
        return []


def _drop(store: Store) -> None:
    try:
        with store.commit_lock(), store_errors(store.uri, f"removing its table {TABLE}"):
            store.database.drop_table(TABLE, ignore_missing=True)
    except StoreError as error:  # read-only store: recomputed at every start
        logging.warning("%s", error)


def _plain(rows: Sequence[dict]) -> tuple[str, ...]:
    return tuple(row["text"] for row in rows if not row["path"])


def _tables(store: Store) -> list[str]:
    with store_errors(store.uri, "listing its tables"):
        return store.database.list_tables().tables


def _write(store: Store, background: Background, texts: Sequence[str], images: int, identity: str) -> None:
    n = len(texts)
    columns = {
        "text": list(texts), "path": background.paths.tolist(), "images": [images] * n, "model": [identity] * n,
        "threshold": [background.threshold] * n, "vector": vector_column(background.vectors),
    }  # fmt: skip
    width = background.vectors.shape[1]
    schema = pa.schema([*SCHEMA_TEXT, ("threshold", pa.float64()), ("vector", pa.list_(pa.float16(), width))])
    with store.commit_lock(), store_errors(store.uri, f"writing its table {TABLE}"):
        mode = "overwrite" if TABLE in _tables(store) else "create"
        table = store.database.create_table(TABLE, pa.table(columns, schema), mode=mode)
        if (older := cleanup_age(table, KEEP_VERSIONS, KEEP_OF_MANY)) is not None:
            table.optimize(cleanup_older_than=older)
