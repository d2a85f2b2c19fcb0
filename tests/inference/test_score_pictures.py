"""The contact sheet and the complexity maps: content, order and aspect ratios."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import icar_jax
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError
from icar_jax.data.images import Preprocess
from icar_jax.evaluation.report import explanations, score_sheet
from icar_jax.evaluation.report.explanations import require_folder, write_explanations
from icar_jax.evaluation.report.score_sheet import spread
from icar_jax.inference.explain import Explainer, Explanation, over_picture, seen_box


@pytest.fixture
def pictures(tmp_path):
    files = []
    for i, size in enumerate([(300, 100), (100, 300), (20, 20), (200, 150), (64, 64)]):
        path = tmp_path / f"{'ab'[i % 2]}" / f"{i // 2}.png"
        path.parent.mkdir(exist_ok=True)
        array = np.random.default_rng(i).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(array).save(path)
        files.append(str(path))
    return files


@pytest.fixture(scope="module")
def explainer(complexity_folder):
    return Explainer(icar_jax.load(complexity_folder, batch_size=1))  # compiles one program


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50), st.integers(1, 60))
def test_the_images_shown_are_spread_over_the_ranks(scores, n):
    scores = np.float32(scores)
    shown = spread(scores, n)
    assert len(shown) == len(set(shown.tolist())) == min(n, len(scores))
    assert (np.diff(scores[shown]) >= 0).all()
    assert scores[shown[0]] == scores.min()
    if n > 1:
        assert scores[shown[-1]] == scores.max()
        ranks = np.flatnonzero(np.isin(np.argsort(scores, kind="stable"), shown))
        assert np.ptp(np.diff(ranks)) <= 1 if len(ranks) > 1 else True


@pytest.mark.parametrize("exits, thresholds", [((), ()), ((), (0.5,)), ((2, 4, 6), (0.2, 0.6))])
def test_a_sheet_is_written_for_every_kind_of_model(exits, thresholds, pictures, tmp_path):
    out = tmp_path / "sheets" / "sheet.png"
    scores = np.linspace(0.1, 0.9, len(pictures), dtype=np.float32)
    score_sheet.score_sheet(
        [*pictures[:-1], "gone.png"], scores, out, model="a model", exits=exits, thresholds=thresholds, thumbnails=4
    )
    sheet = Image.open(out)
    assert sheet.format == "PNG" and sheet.width > 5 * 150
    assert [p.name for p in out.parent.iterdir()] == ["sheet.png"]


def test_a_sheet_needs_images():
    with pytest.raises(ValueError, match="found 0 images"):
        score_sheet.score_sheet([], np.zeros(0), "x.png", model="m")


def test_thumbnails_keep_their_proportions(pictures):
    sizes = [score_sheet._thumbnail(file).size for file in pictures]
    assert sizes == [(150, 50), (41, 124), (124, 124), (150, 112), (124, 124)]


@pytest.mark.parametrize("mode, box", [("squash", (0, 0, 90, 30)), ("crop", (30, 0, 60, 30))])
def test_the_map_lies_where_the_model_looked(mode, box):
    preprocess = Preprocess(32, mode)
    assert seen_box((90, 30), preprocess) == box
    found = over_picture(Explanation(Image.new("RGB", (90, 30)), 0.5, np.ones((2, 2), np.float32)), preprocess)
    left, top, right, bottom = box
    assert found.shape == (30, 90) and found.sum() == (right - left) * (bottom - top)
    assert (found[top:bottom, left:right] == 1).all()


def test_the_seen_box_of_a_crop_is_what_the_preprocessing_keeps():
    array = np.zeros((40, 120, 3), np.uint8)
    left, top, right, bottom = seen_box((120, 40), Preprocess(40, "crop"))
    array[top:bottom, left:right] = 255
    assert (Preprocess(40, "crop").resize(Image.fromarray(array)) == 255).all()
    assert seen_box((120, 40), Preprocess(20, "crop", resize_to=40)) == (50, 10, 70, 30)


def test_the_most_complex_come_first_and_names_do_not_collide(explainer, pictures, tmp_path):
    folder = tmp_path / "maps"
    scores = np.array([0.1, 0.9, 0.3, 0.5, 0.7], np.float32)
    written = write_explanations(explainer, pictures, scores, folder, limit=4, npy=True)
    assert written == 4
    rows = list(csv.DictReader((folder / explanations.INDEX).open()))
    order = [pictures[i] for i in (1, 4, 3, 2)]
    assert [row["file"] for row in rows] == order
    # b/0, a/2, b/1, a/1
    assert [row["picture"] for row in rows] == ["0.png", "2.png", "1.png", "1-2.png"]
    expected = explainer.explain(order)
    np.testing.assert_allclose([float(row["score"]) for row in rows], [e.score for e in expected], atol=1e-5)
    for row, each in zip(rows, expected, strict=True):
        np.testing.assert_allclose(np.load((folder / row["picture"]).with_suffix(".npy")), each.map, atol=1e-5)
        assert Image.open(folder / row["picture"]).width > 300


@pytest.mark.parametrize("stem", ["x" * 251, "é" * 125], ids=["ascii", "two bytes"])
def test_maps_of_files_with_the_longest_names(explainer, pictures, tmp_path, stem):
    named = []
    for folder in ("c", "d"):
        (tmp_path / folder).mkdir()
        named.append(str(tmp_path / folder / f"{stem}.png"))
        Image.open(pictures[0]).save(named[-1])
    assert write_explanations(explainer, named, np.array([0.2, 0.3]), tmp_path / "maps", npy=True) == 2
    assert len(list((tmp_path / "maps").glob("*.png"))) == len(list((tmp_path / "maps").glob("*.npy"))) == 2


def test_a_file_that_is_gone_is_left_out(explainer, pictures, tmp_path):
    assert write_explanations(explainer, [pictures[0], "gone.png"], np.array([0.2, 0.3]), tmp_path / "maps") == 1


def test_scores_with_maps_are_those_without(explainer, complexity_folder, pictures):
    np.testing.assert_allclose(
        [e.score for e in explainer.explain(pictures)], icar_jax.load(complexity_folder).score(pictures), atol=1e-5
    )


def test_what_cannot_be_explained(clip_folder, complexity_folder, tmp_path):
    with pytest.raises(CheckpointError, match="cannot score"):
        Explainer(icar_jax.load(clip_folder))
    with pytest.raises(ValueError, match="stage 2, 3, 4, not 7"):
        Explainer(icar_jax.load(complexity_folder), stage=7)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="is a file"):
        require_folder(tmp_path / "a.txt", overwrite=True)
    with pytest.raises(ConfigError, match="not empty"):
        require_folder(tmp_path, overwrite=False)
    assert require_folder(tmp_path / "new", overwrite=False) == tmp_path / "new"
