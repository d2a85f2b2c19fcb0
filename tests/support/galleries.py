"""Small random galleries with many ties, and retrieval measured by plain sorting: what evaluation/ is compared with."""

import numpy as np
from hypothesis import strategies as st

from icar_jax.evaluation.metrics.retrieval import Distractors


def order(scores, n_far):
    """Indices by falling score; of equal scores the last `n_far` (distractors) first, then by index. Slow and plain."""
    n_own = len(scores) - n_far
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i < n_own, i))


def scores_of(image_embed, text_embed, distractors):
    """(scores [M + B, N + A] float64, A, B), distractors behind."""
    images, texts = (a.astype(np.float64) for a in (image_embed, text_embed))
    if distractors is None:
        return texts @ images.T, 0, 0
    far_images, far_texts = distractors.image_embed, distractors.text_embed
    scores = np.concatenate([texts, far_texts]) @ np.concatenate([images, far_images]).T
    return scores, len(far_images), len(far_texts)


def sorted_ranks(image_embed, text_embed, caption_image, distractors=None):
    scores, n_far_images, n_far_texts = scores_of(image_embed, text_embed, distractors)
    text_to_image = [1 + order(scores[c], n_far_images).index(owner) for c, owner in enumerate(caption_image)]
    image_to_text = []
    for i in range(len(image_embed)):
        found = order(scores[:, i], n_far_texts)
        image_to_text.append(min(1 + found.index(c) for c, owner in enumerate(caption_image) if owner == i))
    return np.array(text_to_image), np.array(image_to_text)


@st.composite
def galleries(draw, most_images=9):
    """(images, texts, caption_image, distractors or None) with one caption an image or more, in any order.

    Small integers: float32 products are exact, so equal scores are exact ties, and ties are common.
    """
    n_images = draw(st.integers(1, most_images))
    extra = draw(st.lists(st.integers(0, n_images - 1), max_size=20))
    caption_image = np.array(draw(st.permutations([*range(n_images), *extra])))
    n_far = draw(st.integers(0, 6))
    width, top = draw(st.sampled_from([1, 3])), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def embeddings(count):
        return rng.integers(-top, top + 1, (count, width)).astype(np.float32)

    images, texts = embeddings(n_images), embeddings(len(caption_image))
    if not n_far:
        return images, texts, caption_image, None
    far_owner = rng.integers(0, n_far, rng.integers(1, 9))
    return images, texts, caption_image, Distractors(embeddings(n_far), embeddings(len(far_owner)), far_owner)


def real_gallery(n_images=150, n_far=70, width=24, seed=0):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.concatenate([np.arange(n_images), rng.integers(0, n_images, 2 * n_images)]))
    images = rng.normal(size=(n_images, width)).astype(np.float32)
    texts = images[owner] + 1.5 * rng.normal(size=(len(owner), width)).astype(np.float32)
    far_owner = np.repeat(np.arange(n_far), 2)
    far = [rng.normal(size=(n, width)).astype(np.float32) for n in (n_far, 2 * n_far)]
    return images, texts, owner, Distractors(*far, far_owner)
