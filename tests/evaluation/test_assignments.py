"""Ranks and assignments of the oracle equal brute force; random routing keeps the exit shares."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.evaluation.metrics.retrieval import Distractors, Ranks, ranks, recall
from icar_jax.evaluation.routing.assignments import (
    oracle_exits,
    oracle_exits_at_share,
    random_exits,
    ranks_alone,
    ranks_mixed,
    take_exits,
)
from tests.support.galleries import galleries, sorted_ranks


@settings(max_examples=15, deadline=None)
@given(galleries(most_images=5), st.sampled_from([4, None]), st.integers(0, 2**32 - 1))
def test_ranks_alone_equal_swapping_one_image_at_a_time(gallery, query_chunk, seed):
    images, texts, owner, distractors = gallery
    early = np.random.default_rng(seed).integers(-2, 3, images.shape).astype(np.float32)
    early[0] = images[0]
    found = ranks_alone({3: early, 12: images}, texts, owner, distractors=distractors, query_chunk=query_chunk)
    text_to_image, image_to_text = sorted_ranks(*gallery)
    assert list(found) == [3, 12]
    assert found[12].text_to_image.tolist() == text_to_image.tolist()
    assert found[12].image_to_text.tolist() == image_to_text.tolist()
    for i in range(len(images)):
        swapped = images.copy()
        swapped[i] = early[i]
        text_to_image, image_to_text = sorted_ranks(swapped, texts, owner, distractors)
        assert found[3].image_to_text[i] == image_to_text[i]
        assert found[3].text_to_image[owner == i].tolist() == text_to_image[owner == i].tolist()


@settings(max_examples=20, deadline=None)
@given(galleries(most_images=5), st.sampled_from([4, None]), st.integers(0, 2**32 - 1))
def test_mixed_ranks_equal_separate_rankings(gallery, query_chunk, seed):
    images, texts, owner, distractors = gallery
    rng = np.random.default_rng(seed)

    def exits_of(full):
        return {e: rng.integers(-2, 3, full.shape).astype(np.float32) for e in (3, 6)} | {12: full}

    by_exit, far = exits_of(images), exits_of(distractors.image_embed) if distractors else None
    n, n_far = len(images), len(far[12]) if far else 0
    exits = rng.choice([3, 6, 12], (4, n + n_far))
    found = ranks_mixed(by_exit, texts, owner, exits, far_by_exit=far, distractors=distractors, query_chunk=query_chunk)
    assert len(found) == 4
    for one, row in zip(found, exits):
        mixed = take_exits(by_exit, row[:n])
        away = dataclasses.replace(distractors, image_embed=take_exits(far, row[n:])) if far else None
        text_to_image, image_to_text = sorted_ranks(mixed, texts, owner, away)
        assert one.text_to_image.tolist() == text_to_image.tolist()
        assert one.image_to_text.tolist() == image_to_text.tolist()
    with pytest.raises(ValueError, match=r"no embeddings for exits \[5\]; available exits: \[3, 6, 12\]"):
        ranks_mixed(by_exit, texts, owner, np.full_like(exits, 5), far_by_exit=far, distractors=distractors)


def made_up(seed, n=7, exits=(3, 6, 12)):
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(n), rng.integers(0, n, n)])
    return {e: Ranks(rng.integers(1, 9, 2 * n), rng.integers(1, 9, n), owner) for e in exits}


@pytest.mark.parametrize("seed", range(20))
def test_lossless_oracle_takes_the_cheapest_exit_that_worsens_no_rank(seed):
    alone = made_up(seed)
    for e in (3, 6):  # some images lose nothing at early exits
        alone[e].image_to_text[::2] = alone[12].image_to_text[::2]
        easy = alone[12].caption_image % 2 == 0
        alone[e].text_to_image[easy] = alone[12].text_to_image[easy] - (seed % 2)
    alone[3].image_to_text[0] += 1
    for i, exit in enumerate(oracle_exits(alone)):
        fine = []
        for e, found in alone.items():
            own = found.caption_image == i
            fine += [e] * bool(
                found.image_to_text[i] <= alone[12].image_to_text[i]
                and (found.text_to_image[own] <= alone[12].text_to_image[own]).all()
            )
        assert exit == min(fine)


@pytest.mark.parametrize("counts", [{3: 2, 6: 1, 12: 4}, {3: 3, 12: 4}, {6: 0, 3: 3, 12: 4}, {12: 7}, {3: 1, 6: 5, 12: 1}])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [4, (1, 2, 4)])
def test_oracle_at_share_is_the_best_of_all_assignments(counts, seed, k):
    alone, hits = made_up(seed), {}
    for e, found in alone.items():
        own, of_captions = (np.mean([ranks <= each for each in np.atleast_1d(k)], axis=0)
                            for ranks in (found.image_to_text, found.text_to_image))  # fmt: skip
        hits[e] = own / 7 + np.bincount(found.caption_image, weights=of_captions, minlength=7) / 14
    each = [e for e, count in counts.items() for _ in range(count)]
    best = max(sum(hits[e][i] for i, e in enumerate(order)) for order in set(itertools.permutations(each)))
    found = oracle_exits_at_share(alone, counts, k=k)
    assert sorted(found.tolist()) == sorted(each)
    assert sum(hits[e][i] for i, e in enumerate(found)) == pytest.approx(best)


def test_oracle_beats_random_and_all_early_in_the_mixed_gallery():
    rng = np.random.default_rng(0)
    n = 200
    full = rng.normal(size=(n, 16))
    owner = np.repeat(np.arange(n), 2)
    texts = full[owner] + rng.normal(size=(2 * n, 16))
    noise = np.where(np.arange(n) % 2, 2.0, 0.3)[:, None]  # half of the images lose much recall at early exits
    early = full + noise * rng.normal(size=(n, 16))
    by_exit = {e: x / np.linalg.norm(x, axis=1, keepdims=True) for e, x in {4: early, 9: full}.items()}

    def r5(exits):
        return np.mean(list(recall(ranks(take_exits(by_exit, exits), texts, owner), 5).values()))

    alone = ranks_alone(by_exit, texts, owner)
    exits = oracle_exits_at_share(alone, {4: 100, 9: 100})
    drawn = np.mean([r5(random_exits(exits, seed)) for seed in range(5)])
    assert r5(np.full(n, 4)) < drawn < r5(exits)
    assert np.mean(exits[::2] == 4) > 0.7
    free = oracle_exits(alone)
    assert 0 < np.mean(free == 4) < 1 and r5(free) > 0.98 * r5(np.full(n, 9))


def test_random_routing_keeps_the_shares_and_errors_are_specific():
    exits = np.array([4] * 3 + [9] * 5)
    assert sorted(random_exits(exits, 1).tolist()) == exits.tolist() and (random_exits(exits, 1) != exits).any()
    by_exit = {4: np.zeros((8, 2)), 9: np.ones((8, 2))}
    assert take_exits(by_exit, exits)[:, 0].tolist() == [0] * 3 + [1] * 5
    with pytest.raises(ValueError, match=r"no embeddings for exits \[5\]; available exits: \[4, 9\]"):
        take_exits(by_exit, exits + (exits == 4))
    for counts in ({3: 1, 12: 5}, {3: 1, 5: 6}, {3: -1, 12: 8}):
        with pytest.raises(ValueError, match="must assign all 7 images"):
            oracle_exits_at_share(made_up(0), counts)


@pytest.mark.parametrize(
    ("by_exit", "far", "message"),
    [
        ((3, 12), (12,), r"no distractor embeddings for exits \[3\]; available exits: \[12\]"),
        ((3, 12), (3, 6, 12), r"no embeddings for exits \[6\]; available exits: \[3, 12\]"),
    ],
)
def test_base_images_and_distractors_need_the_same_exits(by_exit, far, message):
    rows, owner = np.eye(2, dtype=np.float32), np.arange(2)
    distractors = Distractors(rows, rows, owner)
    base, away = (dict.fromkeys(exits, rows) for exits in (by_exit, far))
    with pytest.raises(ValueError, match=message):
        ranks_mixed(base, rows, owner, np.full((1, 4), 12), far_by_exit=away, distractors=distractors)
