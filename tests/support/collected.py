"""Small collections of pictures and the stores made of them, for tests of search."""

import numpy as np
from PIL import Image

import icar_jax
from icar_jax.data.sources.files import ImagePaths
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.evaluation.routing.thresholds import thresholds_for_shares
from icar_jax.search.indexing import index_files
from icar_jax.search.opening import open_store
from icar_jax.search.tables import vectors


def bundle(clip_folder, complexity_folder, folder, shares=(0.3, 0.3, 0.4)):
    """A bundle below `folder` whose thresholds send these shares of 23 drawn pictures to each exit."""
    scores = icar_jax.load(complexity_folder, batch_size=8).score(sorted(draw(folder / "drawn", 23).iterdir()))
    return make_bundle(clip_folder, complexity_folder, folder / "bundle", thresholds=thresholds_for_shares(scores, shares))


def picture(seed):
    """uint8 [H, W, 3], noise of some strength."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 60, size=2)
    return rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 6))


def draw(folder, n, seed=0):
    """n different PNG files; returns the folder."""
    folder.mkdir(exist_ok=True, parents=True)
    for i in range(n):
        Image.fromarray(picture(1000 * seed + i)).save(folder / f"{seed}_{i:03}.png")
    return folder


def index(model, folder, store, **options):
    """Indexes a folder with a model that is loaded already."""
    folders = [str(folder)] if not isinstance(folder, list) else [str(each) for each in folder]
    checkpoint = options.pop("checkpoint", model.path.parent)
    return index_files(store, ImagePaths(folders), checkpoint, lambda _: model, **{"commit_rows": 10, **options})


def rows(store, *columns):
    """Path -> the row of the columns, or all but the times; vectors as lists."""
    table = open_store(store).images.search().to_arrow()
    columns = columns or ("sha256", "size", "mtime_ns", "caption", "complexity", "exit")
    return {row["path"]: tuple(row[name] for name in columns) for row in table.select(["path", *columns]).to_pylist()}


def embeddings(store):
    """Path -> vector float16 [D]."""
    table = open_store(store).images.search().select(["path", "vector"]).to_arrow()
    return dict(zip(table["path"].to_pylist(), vectors(table["vector"]), strict=True))
