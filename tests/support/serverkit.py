"""A store of drawn pictures and a server over it, for tests that need a real one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from icar_jax.evaluation.routing import calibration
from icar_jax.search import opening, tables


def fill(uri, model, files, captions=None):
    """A new store of `files`, routed by a bundle; `captions` by path."""
    files = [str(file) for file in files]
    routed = model.route(files)
    store = opening.create_store(uri, model.identity, model.embed_dim, model.exits, str(model.path))
    contents = [Path(file).read_bytes() for file in files]
    columns = {
        "path": files,
        "sha256": [hashlib.sha256(content).hexdigest() for content in contents],
        "size": [len(content) for content in contents],
        "mtime_ns": [Path(file).stat().st_mtime_ns for file in files],
        "caption": [(captions or {}).get(file) for file in files],
        "complexity": np.asarray(routed.scores, np.float32),
        "exit": np.asarray(routed.exits, np.int32),
        "milliseconds": np.ones(len(files), np.float32),
        "embedded_at": [tables.now()] * len(files),
        "vector": tables.vector_column(routed.embeddings),
    }
    schema = tables.image_schema(model.embed_dim)
    store.upsert(pa.table([pa.array(columns[f.name], f.type) if isinstance(columns[f.name], list) else columns[f.name]
                           for f in schema], schema=schema))  # fmt: skip
    return store


@contextlib.contextmanager
def running(backend, settings):
    """Address of a server over `backend` on a free port, in a thread of this process."""
    import uvicorn

    from icar_jax.search.server.run import bind, configuration

    bound = bind(settings)
    server = uvicorn.Server(configuration(backend, settings))
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def draw(folder, n=24, seed=0):
    """n pictures of different sizes and complexity, half of them JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    files = []
    for i in range(n):
        height, width = rng.integers(40, 160, size=2)
        coarse = Image.fromarray(rng.integers(0, 256, (int(rng.integers(1, 12)), 6, 3), np.uint8))
        files.append(folder / f"{i:03}.{'jpg' if i % 2 else 'png'}")
        coarse.resize((int(width), int(height)), Image.Resampling.NEAREST).save(files[-1])
    return files


def make_bundle(clip_folder, complexity_folder, folder):
    """A bundle of tiny random models; its images leave at all three exits, more or less."""
    return calibration.make_bundle(clip_folder, complexity_folder, folder, thresholds=(0.4, 0.6))


def backend(uri, model, queue=8, note_every_s=3600.0):
    """The search behind a server."""
    from icar_jax.search.query import Searcher
    from icar_jax.search.server.backend import Backend

    made = Backend(Searcher(opening.open_store(uri), model), opening.open_store(uri), queue, note_every_s)
    made.warm_up()
    return made


def sent(image, kind="PNG", **options):
    """Bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
