"""A slow reference of the regret of early exits."""

import numpy as np


def unit(rng, *shape):
    z = rng.normal(size=shape).astype(np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def plain_regret(exit, full, text, scale, weighed=False):
    """The InfoNCE terms of a pair in a gallery in which its image alone leaves early, less those in the gallery of all full.

    Weighed: the terms of the pair in the divergence of the softmax with the early image from that without.
    """

    def chances(i, images):
        logits = np.exp(scale * images.astype(np.float64) @ text.T.astype(np.float64))
        return np.array([logits[i, i] / logits[i].sum(), logits[i, i] / logits[:, i].sum()])

    found = []
    for i in range(len(full)):
        mixed = full.copy()
        mixed[i] = exit[i]
        late = chances(i, full)
        found.append(np.mean((late if weighed else 1) * np.log(late / chances(i, mixed))))
    return np.array(found)
