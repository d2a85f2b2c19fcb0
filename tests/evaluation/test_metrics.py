"""Recall, its summaries and errors; metrics.json is written atomically. Ranks are tested in test_ranking.py."""

import json
import subprocess
import sys

import numpy as np
import pytest

from icar_jax.evaluation.metrics import retrieval
from icar_jax.evaluation.report import table
from tests.support.galleries import sorted_ranks


def random_gallery(n_images=60, captions=3, width=16, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n_images, width)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(n_images), captions))
    return images, images[owner] + rng.normal(size=(len(owner), width)).astype(np.float32), owner


def test_ranks_of_real_numbers_and_recall():
    images, texts, owner = random_gallery()
    found = retrieval.ranks(images, texts, owner, query_chunk=7)
    text_to_image, image_to_text = sorted_ranks(images, texts, owner)
    np.testing.assert_array_equal(found.text_to_image, text_to_image)
    np.testing.assert_array_equal(found.image_to_text, image_to_text)
    assert 0 < np.mean(text_to_image <= 5) < 1, "the gallery must be neither solved nor hopeless"

    assert retrieval.recall(found, 5) == {
        "text_to_image": pytest.approx(100 * np.mean(text_to_image <= 5)),
        "image_to_text": pytest.approx(100 * np.mean(image_to_text <= 5)),
    }
    summary = retrieval.summarise(found)
    assert summary["text_to_image"]["r5"] == retrieval.recall(found, 5)["text_to_image"]
    assert summary["image_to_text"]["r10"] == retrieval.recall(found, 10)["image_to_text"]
    assert summary["text_to_image"]["median_rank"] == np.median(text_to_image)
    assert summary["image_to_text"]["mean_rank"] == pytest.approx(image_to_text.mean())
    assert set(summary["text_to_image"]) == {"r1", "r5", "r10", "median_rank", "mean_rank"}


def test_mean_summary():
    first = retrieval.summarise(retrieval.ranks(*random_gallery(seed=1)))
    second = retrieval.summarise(retrieval.ranks(*random_gallery(seed=2)))
    mean = retrieval.mean_summary([first, second])
    expected = (first["image_to_text"]["r5"] + second["image_to_text"]["r5"]) / 2
    assert mean["image_to_text"]["r5"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least one"):
        retrieval.mean_summary([])


def test_constant_encoder_gains_nothing():
    owner = np.repeat(np.arange(50), 5)
    found = retrieval.ranks(np.ones((50, 8)), np.ones((250, 8)), owner)
    assert found.text_to_image.tolist() == (owner + 1).tolist()
    assert found.image_to_text.tolist() == (np.arange(50) * 5 + 1).tolist()


def test_chance_recall_is_that_of_random_scores():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(20), 5)
    found = []
    for _ in range(300):
        # One-hot images turn random captions into independent uniform scores.
        found.append(retrieval.summarise(retrieval.ranks(np.eye(20), rng.random((100, 20)), owner)))
    mean, chance = retrieval.mean_summary(found), retrieval.chance_recall(20, 100, 5)
    assert chance["text_to_image"] == 25.0
    assert mean["text_to_image"]["r5"] == pytest.approx(chance["text_to_image"], abs=1.0)
    assert mean["image_to_text"]["r5"] == pytest.approx(chance["image_to_text"], abs=2.5)
    assert retrieval.chance_recall(3, 6, 10) == {"text_to_image": 100.0, "image_to_text": 100.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_embed": np.full((2, 3), np.nan)}, r"image_embed: 2 of 2 rows hold NaN"),
        ({"text_embed": np.array([[1, 0, 0], [0, np.inf, 0], [1, 1, 1]])}, r"text_embed: 1 of 3 rows .*row 1"),
        ({"text_embed": np.full((3, 3), 1e30)}, r"too large"),
        ({"image_embed": np.zeros((0, 3))}, r"image_embed is empty"),
        ({"image_embed": np.zeros(3)}, r"\[items, dimensions\], found \[3\]"),
        ({"text_embed": np.zeros((3, 4))}, r"3 dimensions and text_embed 4"),
        ({"caption_image": np.array([0, 1])}, r"caption_image must be \[3\] integers.*\[2\]"),
        ({"caption_image": np.array([0.0, 1.0, 1.0])}, r"float64"),
        ({"caption_image": np.array([0, 1, 2])}, r"outside \[0, 2\).*caption 2 names image 2"),
        ({"caption_image": np.array([0, -1, 1])}, r"caption 1 names image -1"),
        ({"caption_image": np.array([1, 1, 1])}, r"1 of 2 images have no caption \(first: image 0\)"),
        ({"query_chunk": 0}, r"query_chunk"),
    ],
)
def test_errors_are_specific(change, message):
    good = {"image_embed": np.eye(2, 3), "text_embed": np.eye(3), "caption_image": np.array([0, 1, 1])}
    retrieval.ranks(**good)
    with pytest.raises(ValueError, match=message):
        retrieval.ranks(**(good | change))


def failing_replace(source, target):
    raise OSError("no space")


def test_write_metrics_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "metrics.json"
    table.write_metrics({"a": np.float32(0.5), "b": [np.int64(2), None], "c": np.arange(2), "d": {6: (0.5,)}}, path)
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [2, None], "c": [0, 1], "d": {"6": [0.5]}}
    before = path.read_text()
    for bad, message in [
        ({"runs": {"full": {"r5": float("nan")}}}, "runs/full/r5 is nan"),
        ({"x": [1.0, np.float32("inf")]}, "x/1 is inf"),
        ({"share": {0.5: 6}}, "key 0.5 at share must be text or an integer"),
        ({"flags": {True: 1}}, "key True at flags"),
        ({"x": {1, 2}}, "x is a set"),
        ({"runs": {"full": retrieval.Ranks}}, "runs/full is a type"),
    ]:
        with pytest.raises(ValueError, match=message):
            table.write_metrics(bad, path)
    assert path.read_text() == before
    monkeypatch.setattr(table.os, "replace", failing_replace)
    with pytest.raises(OSError, match="no space"):
        table.write_metrics({"a": 1}, path)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"], "no temporary file is left"


def test_metrics_do_not_import_jax():
    code = "import sys; from icar_jax.evaluation.metrics import bootstrap, retrieval; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
