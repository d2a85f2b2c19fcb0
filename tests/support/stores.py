"""Small stores, and rows to fill them with."""

import numpy as np
import pyarrow as pa

from icar_jax.search.opening import create_store
from icar_jax.search.tables import image_schema, now, vector_column

CAPTIONS = ["a dog runs", "a red bird on a tree", "two cats asleep\na second caption", None]


def rows(embeddings, exits, captions=CAPTIONS, prefix="/pictures"):
    n = len(embeddings)
    return pa.table(
        {
            "path": [f"{prefix}/{i:03}.png" for i in range(n)], "sha256": [f"{i:064x}" for i in range(n)],
            "size": [100 + i for i in range(n)], "mtime_ns": [i for i in range(n)],
            "caption": [captions[i % len(captions)] for i in range(n)],
            "complexity": [None if i % 5 == 4 else i / n for i in range(n)],
            "exit": [exits[i % len(exits)] for i in range(n)], "milliseconds": [1.0] * n, "embedded_at": [now()] * n,
            "vector": vector_column(embeddings),
        },
        image_schema(embeddings.shape[1]),
    )  # fmt: skip


def unit(rng, n, dim):
    x = rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def filled(folder, model, n=60, **more):
    store = create_store(folder, model.identity, model.embed_dim, model.exits, str(model.path))
    embeddings = unit(np.random.default_rng(0), n, model.embed_dim)
    # The image of number i < 3 lies on its caption: the answer of that query.
    for i, text in enumerate(["a dog runs", "a red bird on a tree", "two cats asleep"]):
        embeddings[i] = model.encode_text([text])[0]
    store.upsert(rows(embeddings, model.exits, **more))
    return store


IDENTITY = {"clip": "a" * 64, "complexity": "b" * 64}


D = 4


def make(uri, **changes):
    return create_store(
        uri, **{"model_identity": IDENTITY, "embed_dim": D, "exits": (1, 2), "checkpoint": "/bundle", **changes}
    )


def table(entries, at=None):
    """Rows of (path, content, exit)."""
    paths = [path for path, _, _ in entries]
    values = np.array([[hash(content) % 97, 1, exit, 2] for _, content, exit in entries], np.float32).reshape(-1, D)
    return pa.table(
        {
            "path": paths, "sha256": [content for _, content, _ in entries], "size": [len(c) for _, c, _ in entries],
            "mtime_ns": [7] * len(paths), "caption": [None] * len(paths), "complexity": [0.5] * len(paths),
            "exit": [exit for *_, exit in entries], "milliseconds": [1.0] * len(paths),
            "embedded_at": [at or now()] * len(paths), "vector": vector_column(values / 100),
        }
    ).cast(image_schema(D))  # fmt: skip
