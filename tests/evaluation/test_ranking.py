"""Ranks and best items equal plain sorting: exact ties, ragged captions, distractors, chunk edges, several devices."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.evaluation.metrics import ranking, retrieval
from icar_jax.evaluation.metrics.ranking import Ranker
from icar_jax.evaluation.metrics.retrieval import Distractors, summarise
from tests.support.galleries import galleries, order, real_gallery, sorted_ranks
from tests.support.places import ROOT

CHUNKS = st.sampled_from([1, 4, None])


@settings(max_examples=50, deadline=None)
@given(galleries(), CHUNKS)
def test_ranks_equal_sorting(gallery, query_chunk):
    *plain, distractors = gallery
    found = retrieval.ranks(*plain, distractors=distractors, query_chunk=query_chunk)
    text_to_image, image_to_text = sorted_ranks(*gallery)
    assert found.text_to_image.tolist() == text_to_image.tolist()
    assert found.image_to_text.tolist() == image_to_text.tolist()


@settings(max_examples=40, deadline=None)
@given(galleries(), CHUNKS, st.sampled_from([1, 3, 50]))
def test_best_items_equal_sorting(gallery, query_chunk, k):
    images, texts, _, distractors = gallery
    far = distractors.image_embed if distractors else images[:0]
    found = Ranker((far, images), query_chunk=query_chunk).best(texts, k)
    assert found.shape == (len(texts), min(k, len(far) + len(images)))
    scores = texts @ np.concatenate([far, images]).T
    assert found.tolist() == [order(row, 0)[:k] for row in scores]


@settings(max_examples=40, deadline=None)
@given(galleries(), CHUNKS, st.integers(-5, 5))
def test_rank_with_another_score(gallery, query_chunk, score):
    """The rank of an item with another score equals sorting with that score substituted."""
    images, texts, owner, _ = gallery
    scores = texts @ images.T
    scores[np.arange(len(texts)), owner] = score
    found = Ranker((images,), query_chunk=query_chunk).ranks_of_scores(texts, np.full(len(texts), score), owner)
    assert found.tolist() == [1 + order(row, 0).index(i) for row, i in zip(scores, owner)]


def test_distractors_worsen_ranks_and_are_not_queries():
    *plain, far = real_gallery()
    alone, among = retrieval.ranks(*plain), retrieval.ranks(*plain, distractors=far)
    assert among.text_to_image.shape == alone.text_to_image.shape and among.image_to_text.shape == (150,)
    assert (among.text_to_image >= alone.text_to_image).all() and among.text_to_image.mean() > alone.text_to_image.mean()
    assert (among.image_to_text >= alone.image_to_text).all() and among.image_to_text.mean() > alone.image_to_text.mean()
    assert 0 < summarise(among)["text_to_image"]["r5"] < summarise(alone)["text_to_image"]["r5"]
    text_to_image, image_to_text = sorted_ranks(*plain, far)
    assert among.text_to_image.tolist() == text_to_image.tolist()
    assert among.image_to_text.tolist() == image_to_text.tolist()


@pytest.mark.parametrize("width", [3, 768])
def test_one_point_for_everything_gains_nothing(width):
    """Distractors rank first; among the base images each rank occurs once, regardless of rounding in the products."""
    point = np.random.default_rng(0).normal(size=width).astype(np.float32)
    owner = np.repeat(np.arange(103), 5)
    many = lambda n: np.tile(point / np.linalg.norm(point), (n, 1))
    far = Distractors(many(201), many(409), np.arange(409) % 201)
    found = retrieval.ranks(many(103), many(515), owner, distractors=far)
    assert found.text_to_image.tolist() == (201 + owner + 1).tolist()
    assert found.image_to_text.tolist() == (409 + 5 * np.arange(103) + 1).tolist()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_other_types_are_scored_in_float32(dtype):
    """Scores of half-precision embeddings equal those of the same numbers in float32."""
    images, texts, owner, far = real_gallery(seed=3)
    images, texts, near, away = (a.astype(dtype) for a in (images, texts, far.image_embed, far.text_embed))
    found = retrieval.ranks(images, texts, owner, distractors=Distractors(near, away, far.caption_image))
    wide = [a.astype(np.float32) for a in (images, texts, near, away)]
    expected = retrieval.ranks(*wide[:2], owner, distractors=Distractors(*wide[2:], far.caption_image))
    assert found.text_to_image.tolist() == expected.text_to_image.tolist()
    assert found.image_to_text.tolist() == expected.image_to_text.tolist()
    rounded = (wide[1] @ wide[0].T).astype(dtype)
    assert dtype == np.float64 or len(np.unique(rounded)) < rounded.size / 2, "halved scores would tie"


def test_chunks_follow_the_budget(monkeypatch):
    images, texts, owner, far = real_gallery()
    whole = retrieval.ranks(images, texts, owner, distractors=far)
    monkeypatch.setattr(ranking, "SCORE_BYTES", 4 * 256 * 16)
    assert Ranker((far.image_embed, images))._chunk == 16
    cut = retrieval.ranks(images, texts, owner, distractors=far)
    assert cut.text_to_image.tolist() == whole.text_to_image.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_embed": np.full((2, 3), np.nan)}, r"distractors.image_embed: 2 of 2 rows hold NaN"),
        ({"text_embed": np.zeros((0, 3))}, r"distractors.text_embed is empty"),
        ({"text_embed": np.zeros((3, 4))}, r"3 dimensions and distractors.text_embed 4"),
        ({"caption_image": np.array([0, 1])}, r"distractors.caption_image must be \[3\] integers"),
        ({"caption_image": np.array([0, 1, 2])}, r"distractors.caption_image: .*caption 2 names image 2"),
    ],
)
def test_errors_for_distractors_are_specific(change, message):
    good = {"image_embed": np.eye(2, 3), "text_embed": np.eye(3), "caption_image": np.array([0, 0, 0])}
    plain = (np.eye(2, 3), np.eye(3), np.array([0, 1, 1]))
    retrieval.ranks(*plain, distractors=Distractors(**good))
    with pytest.raises(ValueError, match=message):
        retrieval.ranks(*plain, distractors=Distractors(**(good | change)))


DEVICES = """
import jax, numpy as np
from icar_jax.config import MeshConfig
from icar_jax.evaluation.metrics import ranking, retrieval
from icar_jax.parallel.mesh import make_mesh
from tests.support.galleries import real_gallery
assert jax.device_count() == 8
*plain, far = real_gallery()
few = np.round(np.concatenate([far.image_embed, plain[0]]))[:, :2]  # many ties
one = retrieval.ranks(*plain, distractors=far)
for mesh in (ranking.local_mesh(), make_mesh(MeshConfig(2, 2, 2))):
    found = retrieval.ranks(*plain, distractors=far, mesh=mesh)
    assert (found.text_to_image == one.text_to_image).all() and (found.image_to_text == one.image_to_text).all()
    for k in (5, 100):
        several = ranking.Ranker((few,), mesh=mesh)
        assert len(several._gallery.addressable_shards) == 8 and several._gallery.addressable_shards[0].data.shape[0] == 64
        alone = ranking.Ranker((few,))
        assert (several.best(few, k) == alone.best(few, k)).all()
    own = np.arange(len(few))
    scores = np.round(plain[1][: len(few), 0])
    assert (several.ranks_of_scores(few, scores, own) == alone.ranks_of_scores(few, scores, own)).all()
    choice = np.random.default_rng(0).integers(0, 2, (3, len(few)))
    pair = [[ranking.Ranker((rows,), mesh=m) for rows in (few, few[::-1])] for m in (mesh, None)]
    mixed = [ranking.mixed_ranks(r, few, own, choice) for r in pair]
    assert (mixed[0] == mixed[1]).all()
    assert (several.ranks(few, own[:, None]) == alone.ranks(few, own[:, None])).all()
"""


@pytest.mark.check
def test_eight_devices_rank_as_one():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, "-c", DEVICES], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
