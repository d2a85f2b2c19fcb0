"""Tiles of pictures in a store: each picture is cut into a grid, and each tile has an embedding of its own.

    STORE/tiles.lance   one row per tile: key, path and sha256 of the picture, grid, tile, exit, embedding

The whole pictures are rows of the table `images`, as without tiles. Searches compare a query with both and join the tiles of a
picture with it. Tiles whose picture has left the store, or has other content now, are never returned.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from icar_jax.data.images import Preprocess, decode
from icar_jax.errors import ConfigError
from icar_jax.inference.files.stream import StreamEncoder
from icar_jax.inference.model import Model
from icar_jax.inference.reading import BadFile, map_ordered, read_or_bad
from icar_jax.models.ops import normalise
from icar_jax.models.reduction.budget import first_attention, quadrants, tile_budgets, whole_budget
from icar_jax.parallel import distributed
from icar_jax.search.scan import is_below, process_share
from icar_jax.search.store import Store
from icar_jax.search.tables import vector_column
from icar_jax.search.tile_table import Tiles, tile_schema

MOST_TILES = 16


@dataclass(frozen=True)
class Grid:
    """Rows and columns that a picture is cut into."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def cut(self, picture: Image.Image) -> list[Image.Image]:
        """The tiles of a picture, row by row; they do not overlap and cover it."""
        width, height = picture.size
        x, y = (
            np.linspace(0, side, count + 1).round().astype(int) for side, count in ((width, self.columns), (height, self.rows))
        )
        return [picture.crop((x[c], y[r], max(x[c + 1], x[c] + 1), max(y[r + 1], y[r] + 1)))
                for r in range(self.rows) for c in range(self.columns)]  # fmt: skip


def parse_grid(text: str) -> Grid:
    """'2x2' -> Grid. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    grid = Grid(int(found[1]), int(found[2])) if found else Grid(0, 0)
    if not 2 <= grid.tiles <= MOST_TILES:
        raise ConfigError(f"--tiles {text}: write rows x columns, such as 2x2 or 2x3; from 2 to {MOST_TILES} tiles")
    return grid


class TileBudget:
    """The tokens that a picture and its tiles keep, by routes of a CLIP that drops patches (HiRED).

    A tile takes the dearest route that keeps no more patches than its budget, else the cheapest. Raises ConfigError for a model
    without such routes, or a rate outside (0, 1].
    """

    def __init__(self, model: Model, grid: Grid, rate: float):
        vision = model.arch.vision
        if not 0 < rate <= 1:
            raise ConfigError(f"--tile-budget {rate} must lie in (0, 1], the share of all patches that is kept")
        kept = {vision.at_route(exit)[0].tokens_after(vision.depth) - vision.prefix: exit
                for exit in model.exits if vision.at_route(exit)[1] == vision.depth}  # fmt: skip
        if vision.reduce != "drop" or len(kept) < 2:
            raise ConfigError(
                f"--tile-budget {rate} chooses among routes that keep different numbers of patches, and {model.path} has "
                f"{'none' if vision.reduce != 'drop' else len(kept)}; train a CLIP with --config.clip.reduce=drop and "
                "--config.clip.reduce_routes=(0.8, 0.6), or leave it out"
            )
        self.rate, self._levels, self._grid, self._model = rate, sorted(kept.items()), grid, model
        self._parts = quadrants(vision.grid, grid.rows, grid.columns)
        p, graph = model.preprocess, model.graph
        self._attention = jax.jit(
            lambda params, pixels: first_attention(graph.vision.merge(params), normalise(pixels, p.mean, p.std))
        )

    @property
    def whole(self) -> int:
        """The route of whole pictures."""
        return self._route(whole_budget(len(self._parts), self._grid.tiles, self.rate))

    def routes(self, pixels: np.ndarray) -> np.ndarray:
        """Whole pictures uint8 [n, S, S, 3] -> int [n, tiles], the route of each tile."""
        size = self._model.batch_size
        padded = np.concatenate([pixels, np.zeros((-len(pixels) % size, *pixels.shape[1:]), np.uint8)])
        parts = [np.asarray(self._attention(self._model.params["vision"], padded[i : i + size]))
                 for i in range(0, len(padded), size)]  # fmt: skip
        budgets = tile_budgets(np.concatenate(parts)[: len(pixels)], self._parts, self.rate)
        return np.vectorize(self._route, otypes=[int])(budgets)

    def _route(self, budget: int) -> int:
        fitting = [exit for kept, exit in self._levels if kept <= budget]
        return fitting[-1] if fitting else self._levels[0][1]


@dataclass
class TileResult:
    """Counts of a run: pictures cut, tiles embedded, pictures whose tiles were there, files that could not be read."""

    pictures: int = 0
    tiles: int = 0
    unchanged: int = 0
    bad: int = 0
    seconds: float = 0.0

    def report(self) -> str:
        return f"Tiles: {self.tiles:,} of {self.pictures:,} pictures in {self.seconds:.1f} s; {self.unchanged:,} had theirs" + (
            f", {self.bad:,} could not be read" if self.bad else ""
        )


def index_tiles(
    store: Store,
    model: Model,
    grid: Grid,
    roots: Sequence[str] = (),
    *,
    exit: int | None = None,
    budget: float | None = None,
    tile_budget: TileBudget | None = None,
    commit_rows: int = 1000,
    threads: int = 0,
) -> TileResult:
    """Embeds the tiles of all pictures of the store below `roots` (empty: of all) that have none of this grid and content.

    Tiles are embedded like pictures of their own: at `exit`, routed by `budget` or by the bundle, or by `tile_budget`. Each
    commit of about `commit_rows` tiles is atomic, so an interrupted run is resumed by the same call. Raises StoreError.
    """
    start, done, tiles = time.perf_counter(), TileResult(), Tiles(store)
    encoder = None if tile_budget else StreamEncoder(model, exit=exit, budget=budget)
    preprocesses = {"clip": model.preprocess} if encoder is None else encoder.preprocesses
    wanted = _wanted(store, tiles, grid, roots, done)
    read = map_ordered(
        lambda row: (row, read_or_bad(row["path"], lambda path: _read(path, row["sha256"], grid, preprocesses))),
        wanted, ahead=2 * model.batch_size, threads=threads,
    )  # fmt: skip
    with closing(read), tqdm(total=len(wanted), desc="tiles", unit=" pictures", disable=not distributed.is_main()) as bar:
        while some := list(islice(read, max(1, commit_rows // grid.tiles))):
            bar.update(len(some))
            done.bad += sum(isinstance(pixels, BadFile) for _, pixels in some)
            cut = [(row, pixels) for row, pixels in some if not isinstance(pixels, BadFile)]
            if cut:
                store.set_meta(tiles=str(grid))
                tiles.write(_rows(cut, grid, model, encoder, tile_budget))
                done.pictures, done.tiles = done.pictures + len(cut), done.tiles + len(cut) * grid.tiles
    done.seconds = time.perf_counter() - start
    return done


def _wanted(store: Store, tiles: Tiles, grid: Grid, roots: Sequence[str], done: TileResult) -> list[dict[str, Any]]:
    """Rows (path, sha256) of the pictures whose tiles are missing or stale."""
    mine, there = process_share(jax.process_index(), jax.process_count()), tiles.contents(str(grid))
    rows = [row for row in store.state().select(["path", "sha256"]).to_pylist()
            if mine(row["path"]) and (not roots or is_below(row["path"], roots))]  # fmt: skip
    wanted = [row for row in rows if there.get(row["path"]) != row["sha256"]]
    done.unchanged = len(rows) - len(wanted)
    return wanted


def _read(path: str, sha256: str, grid: Grid, preprocesses: Mapping[str, Preprocess]) -> list[dict[str, np.ndarray]]:
    """The whole picture and its tiles, preprocessed. Raises ImageError, OSError."""
    side = max(p.decoded_side for p in preprocesses.values()) * max(grid.rows, grid.columns)
    picture = decode(path, at_least=side)
    return [{name: p.resize(part) for name, p in preprocesses.items()} for part in (picture, *grid.cut(picture))]


def _rows(
    cut: Sequence[tuple[dict[str, Any], list[dict[str, np.ndarray]]]], grid: Grid, model: Model,
    encoder: StreamEncoder | None, tile_budget: TileBudget | None,
) -> pa.Table:  # fmt: skip
    """Rows of the table of tiles."""
    pixels = [part for _, parts in cut for part in parts[1:]]
    if tile_budget is None:
        assert encoder is not None
        made = encoder.embed_batches(_batches(pixels, model.batch_size))
        vectors, exits = made.embeddings, made.exits
    else:
        exits = tile_budget.routes(np.stack([parts[0]["clip"] for _, parts in cut])).ravel()
        vectors = np.zeros((len(pixels), model.embed_dim), np.float32)
        for exit in np.unique(exits).tolist():
            at = np.flatnonzero(exits == exit)
            vectors[at] = model.embed(_batches([pixels[i] for i in at], model.batch_size), exit=exit).embeddings
    each = [(row["path"], row["sha256"], tile) for row, _ in cut for tile in range(grid.tiles)]
    return pa.table(
        {
            "key": [f"{path}\n{grid} {tile}" for path, _, tile in each],
            "path": [path for path, _, _ in each],
            "sha256": [content for _, content, _ in each],
            "grid": [str(grid)] * len(each),
            "tile": [tile for *_, tile in each],
            "exit": exits.tolist(),
            "vector": vector_column(vectors),
        }
    ).cast(tile_schema(model.embed_dim))


def _batches(pixels: Sequence[dict[str, np.ndarray]], size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(pixels), size):
        some = pixels[start : start + size]
        yield {name: np.stack([part[name] for part in some]) for name in some[0]}
