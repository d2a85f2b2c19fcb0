"""icar index --tiles: one embedding a tile, hits joined by picture, and HiRED's budget of tokens."""

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import cli
from icar_jax.config import ConfigError
from icar_jax.models.reduction.budget import quadrants, tile_budgets, whole_budget
from icar_jax.models.reduction.routes import route
from icar_jax.search.opening import open_store
from icar_jax.search.query import Searcher
from icar_jax.search.tile_table import Tiles
from icar_jax.search.tiles import Grid, TileBudget, index_tiles, parse_grid
from tests.support.collected import draw, index
from tests.support.places import FIXTURES
from tests.support.scorers import write_clip


@pytest.mark.parametrize("rate,alpha", [(0.4, 0.5), (0.2, 0.5), (0.1, 0.25), (0.9, 0.5)])
def test_budgets_are_those_of_the_official_code(rate, alpha):
    """Its tiles are strips of consecutive patches; see docs/token_reduction.md."""
    case = np.load(FIXTURES / "reduction" / "hired_case.npz")
    first, late = (case[f"{name}_layer_cls_attention"].sum(1) for name in ("first", "late"))
    budgets = tile_budgets(first[:1], np.arange(16) // 4, rate, alpha)[0]
    kept = np.zeros((5, 16), bool)
    for row, budget in enumerate((whole_budget(16, 4, rate, alpha), *budgets)):
        kept[row, np.argsort(-late[row], kind="stable")[:budget]] = True
    np.testing.assert_array_equal(kept, case[f"mask_{rate}_{alpha}"])


def test_a_patch_belongs_to_the_tile_that_shows_its_centre():
    assert quadrants(4, 2, 2).reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert quadrants(3, 1, 2).reshape(3, 3)[0].tolist() == [0, 1, 1] and quadrants(7, 2, 3).max() == 5


def test_tiles_cover_a_picture():
    array = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    parts = [np.asarray(part) for part in Grid(2, 2).cut(Image.fromarray(array))]
    rows = [np.concatenate(parts[:2], axis=1), np.concatenate(parts[2:], axis=1)]
    np.testing.assert_array_equal(np.concatenate(rows), array)
    assert len(Grid(4, 4).cut(Image.new("RGB", (2, 2)))) == 16
    for text in ("2", "1x1", "5x4", "2x", "x2", "-1x2"):
        with pytest.raises(ConfigError, match="write rows x columns, such as 2x2"):
            parse_grid(text)


def test_hits_are_joined_by_picture(model, pictures, tmp_path):
    index(model, pictures, tmp_path / "store")
    store, grid = open_store(tmp_path / "store"), Grid(2, 2)
    done = index_tiles(store, model, grid, commit_rows=16)
    assert (done.pictures, done.tiles, done.unchanged, Tiles(store).count()) == (23, 92, 0, 92)
    files = sorted(map(str, pictures.iterdir()))
    searcher = Searcher(open_store(tmp_path / "store"), model)
    tile = grid.cut(Image.open(files[5]).convert("RGB"))[2]
    part = model.route([tile]).embeddings[0]
    hits = searcher.search_text("anything", k=23, embedding=part, exact=True).hits
    assert hits[0].path == files[5] and hits[0].cosine > 0.999 and len({hit.path for hit in hits}) == len(hits) == 23
    alone = {row["path"]: row["vector"] for row in store.images.search().select(["path", "vector"]).to_arrow().to_pylist()}
    assert all(hit.cosine >= np.asarray(alone[hit.path], np.float64) @ part - 2e-3 for hit in hits)
    assert [hit.cosine for hit in hits] == sorted((hit.cosine for hit in hits), reverse=True)
    few = searcher.search_text("anything", k=3, where=f"path != '{files[5]}'", embedding=part).hits
    assert len(few) == 3 and files[5] not in {hit.path for hit in few}


def test_only_missing_and_changed_pictures_are_cut_and_gone_ones_never_found(model, tmp_path):
    pictures = draw(tmp_path / "pictures", 6)
    index(model, pictures, tmp_path / "store")
    index_tiles(open_store(tmp_path / "store"), model, Grid(1, 2))
    files = sorted(pictures.iterdir())
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(files[0])
    files[1].unlink()
    index(model, pictures, tmp_path / "store", prune=True)
    store = open_store(tmp_path / "store")
    searcher = Searcher(store, model)
    query = model.encode_text(["a circle"])[0]
    assert str(files[1]) not in {hit.path for hit in searcher.search_text("x", k=9, embedding=query).hits}
    done = index_tiles(store, model, Grid(1, 2))
    assert (done.pictures, done.unchanged) == (1, 4)
    assert index_tiles(store, model, Grid(2, 2)).pictures == 5  # another grid replaces the tiles
    assert set(Tiles(store).contents("2x2")) == {str(f) for f in pictures.iterdir()}
    assert str(files[2]) not in Tiles(store).contents("1x2")


def test_a_budget_spends_patches_where_the_class_token_looks(tmp_path):
    drop = {"reduce": "drop", "reduce_after": 1, "reduce_r": (2,), "reduce_routes": (0.8, 0.6), "exits": (), "merge": ()}
    clip = icar_jax.load(write_clip(tmp_path / "clip", **drop), batch_size=4)
    budget = TileBudget(clip, Grid(2, 2), 0.4)
    kept = {exit: clip.arch.vision.at_route(exit)[0].tokens_after(4) - 1 for exit in clip.exits}
    assert sorted(kept.values()) == list(kept.values()) and budget.whole == 4 == route(4)  # 16 of 16 patches
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    routes = budget.routes(pixels)
    assert routes.shape == (6, 4) and set(routes.ravel().tolist()) <= set(clip.exits)
    assert TileBudget(clip, Grid(2, 2), 0.05).whole == min(kept, key=kept.get)
    pictures = draw(tmp_path / "pictures", 5)
    store = str(tmp_path / "store")
    cli.main(["index", str(pictures), "--store", store, "--checkpoint", str(tmp_path / "clip"), "--tiles", "2x2",
              "--tile-budget", "0.4"])  # fmt: skip
    table = open_store(store).database.open_table("tiles").search().select(["exit"]).to_arrow()
    assert len(table) == 20 and set(table["exit"].to_pylist()) <= set(clip.exits)
    assert set(open_store(store).state()["exit"].to_pylist()) == {4}


def test_what_does_not_go_together_is_named(model, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--tile-budget 0.4 chooses among routes .* and .* has none; train a CLIP with"):
        TileBudget(model, Grid(2, 2), 0.4)
    with pytest.raises(ConfigError, match=r"--tile-budget 2 must lie in \(0, 1\]"):
        TileBudget(model, Grid(2, 2), 2)
    for flags, message in (
        (["--tile-budget", "0.4"], "--tile-budget without --tiles"),
        (["--tiles", "2x2", "--tile-budget", "0.4", "--exit", "1"], "--tile-budget chooses the exits itself"),
        (["--tiles", "2x2", "--pass", "cheap"], "--tiles with --pass"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["index", str(tmp_path), "--store", str(tmp_path / "store"), *flags])
        assert message in capsys.readouterr().err
