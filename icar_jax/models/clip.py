"""CLIP with early exits: a vision tower and a text tower with a shared embedding space."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icar_jax import pytree
from icar_jax.errors import ModelError
from icar_jax.models.encoders import ImageEncoder, TextEncoder, unit_norm
from icar_jax.models.functional import Params
from icar_jax.models.layers import DType
from icar_jax.models.reduction.routes import split_route
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.transformer import AttentionFn, Execution
from icar_jax.models.vision import VisionArch, VisionTower

Array = jax.Array
LOGIT_SCALE_START = float(np.log(1 / 0.07))
LOGIT_SCALE_MAX = 100.0
SIGMOID_SCALE_START, LOGIT_BIAS_START = float(np.log(10)), -10.0  # SigLIP's


@dataclass(frozen=True)
class ClipArch:
    """Architecture of both towers, and whether each exit has its own temperature or all share one."""

    vision: VisionArch
    text: TextArch
    temperature: str = "own"  # own (one per exit) | shared
    logit_bias: bool = False  # whether each logit scale has a bias, as in SigLIP

    def __post_init__(self) -> None:
        if self.vision.embed_dim != self.text.embed_dim:
            raise ModelError(
                f"embed_dim of both towers must be equal, got vision {self.vision.embed_dim} and text {self.text.embed_dim}"
            )
        if self.vision.has_cross != self.text.has_cross:
            raise ModelError(
                f"CrossGET guides both towers by cross tokens, but reduce is {self.vision.reduce!r} in the image tower and "
                f"{self.text.reduce!r} in the text tower; use 'crossget' in both (a schedule may be empty) or in none"
            )
        if self.vision.has_cross:
            paired_blocks(self.vision.depth, self.text.depth)


def paired_blocks(vision: int, text: int) -> list[tuple[int, int]]:
    """Returns the pairs (image block, text block), from 0, whose cross tokens CrossGET's cross loss compares.

    Each block of the shallower tower is compared with the last one of its share of the deeper tower. Raises ModelError if the
    depths do not divide.
    """
    few, many = sorted((vision, text))
    if many % few:
        raise ModelError(
            f"the towers cannot be paired block by block: {vision} image blocks and {text} text blocks, and {few} does not "
            f"divide {many}; use a tower of another depth (config.clip.depth)"
        )
    step = many // few
    each = lambda depth, j: j if depth == few else (j + 1) * step - 1
    return [(each(vision, j), each(text, j)) for j in range(few)]


class ClipOutput(NamedTuple):
    """Output of `Clip.__call__`; keys are executed blocks, full depth included. Logits are scale x cosine + bias."""

    image: dict[int, Array]  # float32 [B, D], unit norm, of each exit
    text: Array  # float32 [N, D], unit norm
    logit_scale: dict[int, Array]  # float32 scalars
    logit_bias: dict[int, Array]  # float32 scalars; empty if the model has no biases


class Clip(ImageEncoder, TextEncoder):
    """CLIP (Radford et al. 2021) with early exits in the vision tower; embeddings are float32 with unit norm.

    Args:
        arch: architecture of both towers.
        execution: how the blocks run (remat, scan, sharding); does not change parameters or values.
        attention: attention function of both towers, see `transformer.Attention`; None is `ops.attention`.
        dtype: dtype of activations; parameters are cast to it in each layer.
        param_dtype: dtype of parameters.
        exit_start: 'final' initialises exit heads as copies of ln_post and proj, 'random' draws them.
        rngs: random keys for initialisation.

    Raises TypeError if `arch` is not a ClipArch.
    """

    def __init__(
        self, arch: ClipArch, *, execution: Execution = Execution(), attention: AttentionFn | None = None,
        dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, exit_start: str = "final", rngs: nnx.Rngs,
    ):  # fmt: skip
        if not isinstance(arch, ClipArch):
            raise TypeError(f"arch must be a ClipArch, such as icar_jax.variants['vit_b32'], got {arch!r}")
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.arch = arch
        self.vision = VisionTower(arch.vision, execution=execution, attention=attention, **types)
        self.text = TextTower(arch.text, execution=execution, attention=attention, **types)
        scalar = lambda value: nnx.Param(jnp.float32(value))
        scale = SIGMOID_SCALE_START if arch.logit_bias else LOGIT_SCALE_START
        self.logit_scale = scalar(scale)
        own = arch.vision.exits if arch.temperature == "own" else ()
        self.exit_logit_scale = nnx.Dict({str(e): scalar(scale) for e in own})
        if arch.logit_bias:
            self.logit_bias = scalar(LOGIT_BIAS_START)
            self.exit_logit_bias = nnx.Dict({str(e): scalar(LOGIT_BIAS_START) for e in own})
        if exit_start == "final":
            variables = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(self))}
            for path, source in exit_sources(nnx.to_pure_dict(nnx.state(self))).items():
                # A copy: donated buffers must not be shared between two leaves.
                variables[path][...] = jnp.array(variables[source][...])

    @classmethod
    def init(cls, key: Array, arch: ClipArch, exit_start: str = "final", **kwargs: Any) -> Params:
        """Returns random parameters as a nested dict; arguments are those of the class."""
        params = super().init(key, arch, exit_start="random", **kwargs)
        return start_exits_from_final(params) if exit_start == "final" else params

    def __call__(self, images: Array, tokens: Array) -> ClipOutput:
        """images float [B, S, S, 3], normalised; tokens int [N, L] -> embeddings of all exits and texts, scales, biases."""
        biases = self.logit_biases() if self.arch.logit_bias else {}
        return ClipOutput(self.encode_image_exits(images), self.encode_text(tokens), self.logit_scales(), biases)

    def encode_image_with_cross(
        self, images: Array, exits: Sequence[int], scales: Array | None = None
    ) -> tuple[dict[int, Array], Array]:
        """`encode_image_exits`, and the cross tokens of the blocks that CrossGET's cross loss pairs.

        Returns ({executed blocks: [B, D]}, float32 [B, pairs, D] in the embedding space, not normalised). Full depth must be
        among `exits`.
        """
        found, cross = self.vision.with_cross_embeddings(images, exits, scales)
        return {e: unit_norm(z) for e, z in found.items()}, self._paired(cross, 0)

    def encode_text_with_cross(self, tokens: Array) -> tuple[Array, Array]:
        """`encode_text`, and the cross tokens float32 [B, pairs, D] as of `encode_image_with_cross`."""
        found, cross = self.text.with_cross_embeddings(tokens)
        return unit_norm(found), self._paired(cross, 1)

    def _paired(self, cross: Array, tower: int) -> Array:
        pairs = paired_blocks(self.arch.vision.depth, self.arch.text.depth)
        return jnp.stack([cross[pair[tower]] for pair in pairs], axis=1)

    def logit_scales(self) -> dict[int, Array]:
        """Returns {executed blocks: scalar scale}, full depth included; clipped at 100 as in CLIP, unbounded as in SigLIP."""
        limit = jnp.inf if self.arch.logit_bias else LOGIT_SCALE_MAX
        scales = self._own_or_shared(self.logit_scale, self.exit_logit_scale)
        return {e: jnp.minimum(jnp.exp(s), limit) for e, s in scales.items()}

    def logit_biases(self) -> dict[int, Array]:
        """Returns {executed blocks: scalar bias}, full depth included. Only for models with logit biases (SigLIP)."""
        return self._own_or_shared(self.logit_bias, self.exit_logit_bias)

    def _own_or_shared(self, shared: nnx.Param, own: nnx.Dict) -> dict[int, Array]:
        early = self.arch.vision.exits if self.arch.temperature == "own" else ()
        values = {e: own[str(e)][...] for e in early}
        every = dict.fromkeys((*self.arch.vision.all_exits, *self.arch.vision.depths))
        return {e: values.get(split_route(e)[0], shared[...]) for e in every}


def start_exits_from_final(params: pytree.Tree) -> pytree.Tree:
    """Returns `params` with exit heads, temperatures and biases copied from full depth.

    Exits then start in the embedding space of the full tower.
    """
    flat, sources = pytree.flatten(params), exit_sources(params)
    # jnp.array copies: donated buffers must not be shared between two leaves.
    return pytree.map_with_path(lambda path, leaf: jnp.array(flat[sources[path]]) if path in sources else leaf, params)


def exit_sources(params: Mapping[str, Any]) -> dict[str, str]:
    """Returns {path of an exit's leaf: path of the full-depth leaf it is initialised from}, for parameters or their shapes.

    The residual of an exit head has no counterpart; its last kernel is initialised to zero.
    """
    sources = {}
    for path in pytree.flatten(params):
        match = re.fullmatch(r"vision/exits/\d+/((?!residual/).+)|exit_(logit_scale|logit_bias)/\d+", path)
        if match:
            head, scalar = match.groups()
            sources[path] = scalar or "vision/" + re.sub(r"^ln(?=/)", "ln_post", head)
    return sources
