"""Complexity maps: spatial activation maps of a loaded complexity model, resized to the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from icar_jax.data.images import ImageLike, Preprocess, decode
from icar_jax.errors import ModelError
from icar_jax.inference.files.scoring import require_scorer
from icar_jax.inference.forward import Forward, bucket_sizes
from icar_jax.inference.model import Model
from icar_jax.models.complexity import MAP_STAGE, MAP_STAGES
from icar_jax.models.ops import normalise
from icar_jax.models.token_router import BlocksArch, scorer_class


@dataclass(frozen=True)
class Explanation:
    """The complexity score of an image and its spatial map.

    Attributes:
        picture: the decoded RGB image at its original size.
        score: complexity in [0, 1].
        map: float32 [h, w] over the square crop that the model saw, as log odds of 'complex'; see
            ComplexityModel.score_and_map and TokenRouter.score_and_map.
    """

    picture: Image.Image
    score: float
    map: np.ndarray


class Explainer:
    """Computes complexity scores and maps at the static batch shapes of a model.

    Args:
        model: a loaded model; a bundle uses its complexity model.
        stage: ConvNeXt stage whose features are mapped, one of MAP_STAGES: 2, 3, 4 have a stride of 8, 16, 32 pixels; None
            uses MAP_STAGE. Must be None for a head on the blocks of a vision tower, which maps its patches.
        dtype: of activations. The default is float32 whatever the model uses, since gradients of bfloat16 ones are coarse.

    Raises CheckpointError for a model that cannot score, ModelError for an invalid stage, and ValueError for a changed module
    of another dtype.
    """

    def __init__(self, model: Model, stage: int | None = None, dtype: Any = jnp.float32):
        require_scorer(model)
        model.apply_changes()
        complexity, self.preprocess = model.scorer.complexity, model.scorer.preprocess
        arch = complexity.arch
        if complexity == scorer_class(arch).graph(arch, dtype=model.dtype):
            complexity = scorer_class(arch).graph(arch, dtype=dtype)
        elif jnp.dtype(dtype) != model.dtype:
            raise ValueError(f"model.complexity was modified and computes in {model.dtype}; pass dtype={model.dtype!r}")
        if isinstance(arch, BlocksArch):
            if stage is not None:
                raise ModelError(
                    f"{model.scorer.path} scores patches of a vision tower and has no ConvNeXt stage {stage}; leave it out"
                )
            stride, more = arch.vision.patch_size, ()
        else:
            stage = MAP_STAGE if stage is None else stage
            if stage not in MAP_STAGES:
                raise ModelError(f"a map can be taken after stage {', '.join(map(str, MAP_STAGES))}, not {stage}")
            stride, more = 2 ** (stage + 1), (stage,)
        side = self.preprocess.image_size // stride
        self._shape, self._batch = (side, side), min(model.batch_size, 8)  # gradients keep activations of every block
        p = self.preprocess

        def packed(params, images):  # one array, since Forward returns one
            score, found = complexity.score_and_map(params, normalise(images, p.mean, p.std), *more)
            return jnp.concatenate([score[:, None], found.reshape(len(found), -1)], axis=1)

        self._forward = Forward(packed, model.scorer.forward.params, bucket_sizes(self._batch))

    def maps(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [N] and maps float32 [N, h, w] of preprocessed images uint8 [N, S, S, 3]."""
        parts = [self._forward(pixels[i : i + self._batch]) for i in range(0, len(pixels), self._batch)]
        rows = np.concatenate(parts) if parts else np.zeros((0, 1 + self._shape[0] * self._shape[1]), np.float32)
        return rows[:, 0], rows[:, 1:].reshape(-1, *self._shape)

    def explain(self, images: Sequence[ImageLike]) -> list[Explanation]:
        """Explanations of N paths, PIL images or arrays, all kept in memory; pictures of large files are reduced, to no side
        below three times the model's. Raises as `icar_jax.data.images.decode`."""
        pictures = [decode(image, at_least=self.preprocess.decoded_side) for image in images]
        side = self.preprocess.image_size
        pixels = np.array([self.preprocess.resize(picture) for picture in pictures], np.uint8).reshape(-1, side, side, 3)
        return [Explanation(*each) for each in zip(pictures, *_listed(*self.maps(pixels)), strict=True)]


def _listed(scores: np.ndarray, maps: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    return [float(s) for s in scores], list(maps)


def enlarge(found: np.ndarray, side: int) -> np.ndarray:
    """Resizes a map [h, w] to [side, side] with bilinear interpolation between cell centres."""
    return np.asarray(Image.fromarray(found.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR))


def seen_box(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of the region that the model sees of an image of `size` (width, height)."""
    width, height = size
    if preprocess.resize_mode == "squash":
        return 0, 0, width, height
    side = round(min(size) * preprocess.image_size / preprocess.shortest_side)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return left, top, left + side, top + side


def over_picture(explained: Explanation, preprocess: Preprocess) -> np.ndarray:
    """The map resized to the original image, float32 [height, width]; 0 outside the region that the model saw."""
    left, top, right, bottom = seen_box(explained.picture.size, preprocess)
    found = Image.fromarray(explained.map.astype(np.float32))
    out = np.zeros(explained.picture.size[::-1], np.float32)
    out[top:bottom, left:right] = np.asarray(found.resize((right - left, bottom - top), Image.Resampling.BILINEAR))
    return out
