"""Average precision equals a plain loop over ranks, for both denominators, with ties and distractors."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.evaluation.metrics import category
from icar_jax.evaluation.metrics.category import LabelSets, average_precision, precisions, summarise
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, Distractors
from tests.support.galleries import galleries, order, scores_of

AT = (1, 3, 10)


def looped_precision(found, k, total):
    """(official, standard) AP@k of the relevance [bool] of a ranked list, by a plain loop."""
    hits, summed = 0, 0.0
    for rank, relevant in enumerate(found[:k], start=1):
        if relevant:
            hits += 1
            summed += hits / rank
    return summed / hits if hits else 0.0, summed / min(k, total) if total else np.nan


def looped(images, texts, owner, labels, distractors, at):
    """Direction -> K -> [N] of (official, standard), by sorting."""
    scores, n_far_images, n_far_texts = scores_of(images, texts, distractors)
    far_labels = list(distractors.labels or [()] * n_far_images) if distractors else []
    image_labels = [*labels, *far_labels]
    text_labels = [labels[i] for i in owner] + [far_labels[i] for i in (distractors.caption_image if distractors else [])]
    found = {direction: {k: [] for k in at} for direction in DIRECTIONS}
    for i in range(len(images)):
        first = list(owner).index(i)
        for direction, row, gallery, n_far in (
            ("text_to_image", scores[first], image_labels, n_far_images),
            ("image_to_text", scores[:, i], text_labels, n_far_texts),
        ):
            relevant = [bool(set(labels[i]) & set(gallery[item])) for item in order(row, n_far)]
            for k in at:
                found[direction][k].append(looped_precision(relevant, k, sum(relevant)))
    return found


@st.composite
def labelled(draw):
    images, texts, owner, distractors = draw(galleries(most_images=7))
    one = st.lists(st.sampled_from(["cat", "dog", "a tree", "sky"]), max_size=2)
    labels = draw(st.lists(one, min_size=len(images), max_size=len(images)))
    labels[draw(st.integers(0, len(images) - 1))] = ["cat"]
    if distractors is not None and draw(st.booleans()):
        n_far = len(distractors.image_embed)
        distractors = dataclasses.replace(distractors, labels=draw(st.lists(one, min_size=n_far, max_size=n_far)))
    return images, texts, owner, labels, distractors


@settings(max_examples=40, deadline=None)
@given(labelled(), st.sampled_from([1, 4, None]))
def test_equals_a_plain_loop(case, query_chunk):
    images, texts, owner, labels, distractors = case
    found = precisions(images, texts, owner, labels, distractors=distractors, at=AT, query_chunk=query_chunk).values
    expected = looped(*case, AT)
    for direction in DIRECTIONS:
        for k in AT:
            official, standard = np.array(expected[direction][k]).T
            np.testing.assert_allclose(found[direction]["official"][k], official, rtol=1e-12)
            np.testing.assert_allclose(found[direction]["standard"][k], standard, rtol=1e-12)


def test_the_two_denominators():
    """Relevant at ranks 1 and 3 of 4, five relevant in the gallery."""
    found = average_precision(np.array([[True, False, True, False], [False] * 4]), np.array([5, 0]), (2, 4))
    np.testing.assert_allclose(found["official"][2], [1.0, 0.0])
    np.testing.assert_allclose(found["official"][4], [(1 + 2 / 3) / 2, 0.0])
    np.testing.assert_allclose(found["standard"][2], [1 / 2, np.nan])
    np.testing.assert_allclose(found["standard"][4], [(1 + 2 / 3) / 4, np.nan])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 200).map(str), max_size=4), min_size=1, max_size=30), st.integers(1, 60))
def test_label_sets_equal_sets(labels, chunk):
    """More labels than bits in a word; relevance counts are computed in chunks."""
    sets, original = LabelSets(labels), category._CHUNK_ELEMENTS
    shares = np.array([[bool(set(a) & set(b)) for b in labels] for a in labels])
    assert (sets.share(sets.of[:, None], sets.of[None]) == shares).all()
    category._CHUNK_ELEMENTS = chunk
    try:
        assert sets.relevant_in(sets.of, sets.of).tolist() == shares.sum(axis=1).tolist()
    finally:
        category._CHUNK_ELEMENTS = original


def random_case(n=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = [[f"c{rng.integers(4)}"] if i % 8 else [] for i in range(n)]
    images, texts = rng.normal(size=(2, n, 8)).astype(np.float32)
    return images, texts, np.arange(n), labels


def test_summary_counts_unlabelled_queries_as_the_official_code_does():
    found = precisions(*random_case())
    summary = summarise(found)
    assert set(summary["text_to_image"]) == {f"map{k}{s}" for k in (10, 50, 100) for s in ("", "_standard")}
    for direction in DIRECTIONS:
        official, standard = found.values[direction]["official"][10], found.values[direction]["standard"][10]
        assert (official[::8] == 0).all() and np.isnan(standard[::8]).all() and not np.isnan(standard[1:8]).any()
        assert summary[direction]["map10"] == pytest.approx(100 * official.mean())
        assert summary[direction]["map10_standard"] == pytest.approx(100 * np.nanmean(standard))
        assert summary[direction]["map10"] > summary[direction]["map10_standard"]


def test_only_first_captions_are_queries():
    images, texts, owner, labels = random_case()
    twice = precisions(images, np.concatenate([texts, -texts]), np.concatenate([owner, owner]), labels)
    once = precisions(images, texts, owner, labels)
    for k in (10, 50):
        np.testing.assert_array_equal(once.values["text_to_image"]["official"][k], twice.values["text_to_image"]["official"][k])


def test_distractors_count_by_their_labels():
    images, texts, owner, labels = random_case()
    near = Distractors(images, texts, owner)  # copies, which rank before their originals
    silent = summarise(precisions(images, texts, owner, labels, distractors=near))
    for direction in DIRECTIONS:
        assert silent[direction]["map10"] < 0.7 * summarise(precisions(images, texts, owner, labels))[direction]["map10"]
    same = dataclasses.replace(near, labels=labels)
    assert summarise(precisions(images, texts, owner, labels, distractors=same))["image_to_text"]["map10"] > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [["a"]]}, r"labels must have one entry per image \(40\).*found 1"),
        ({"labels": [[]] * 40}, "no image has a label"),
        ({"at": (0, 10)}, r"K >= 1, found \(0, 10\)"),
        (
            {"distractors": Distractors(np.eye(2, 8), np.eye(2, 8), np.arange(2), [["a"]])},
            r"distractors.labels .* per image \(2\)",
        ),
    ],
)
def test_errors_are_specific(change, message):
    images, texts, owner, labels = random_case()
    with pytest.raises(ValueError, match=message):
        precisions(images, texts, owner, **({"labels": labels} | change))
