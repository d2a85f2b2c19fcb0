"""Initial weights of a ConvNeXt whose layers respond to structure at many scales before any training.

The stem computes the cosine transform of 4 x 4 patches in opponent colours, each downsampling averages its input and adds its
Haar details, and depthwise convolutions are Gabor filters of random orientation, frequency and phase. LayerNorms would
divide by the contrast of each position; a constant channel added to the stem dominates their variance, so that they
divide by nearly the same number everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icar_jax.models.convnext import ConvNeXtArch

Array = jax.Array
_CONSTANT = 3.0  # value of the constant channel; the others have about 1
_OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]]) / np.sqrt(np.array([3, 2, 1.5]))[:, None]
_HAAR = np.array([[[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 4
_GAIN = 1.3  # of a downsampling: averages of natural images vary less than their pixels
_RESIDUAL = 0.1  # of an MLP's output, so that the filters of all stages see the image


def filter_start(params: Mapping[str, Any], arch: ConvNeXtArch, key: Array) -> dict[str, Any]:
    """Returns the parameters of a `ConvNeXt` with its convolutions and norms replaced; `key` draws the Gabor filters."""
    stem = {"conv": _stem(arch.dims[0]), "norm": _linear_norm(params["stem"]["norm"])}
    stages = {}
    for i, (name, stage) in enumerate(sorted(params["stages"].items(), key=lambda item: int(item[0]))):
        keys = jax.random.split(jax.random.fold_in(key, i), len(stage["blocks"]))
        blocks = {
            n: _block(block, keys[j]) for j, (n, block) in enumerate(sorted(stage["blocks"].items(), key=lambda b: int(b[0])))
        }
        stages[name] = {**stage, "blocks": blocks}
        if i:
            norm = _linear_norm(stage["downsample"]["norm"])
            stages[name]["downsample"] = {"norm": norm, "conv": _downsample(arch.dims[i - 1], arch.dims[i])}
    return {**params, "stem": stem, "stages": stages}


def _stem(width: int) -> dict[str, Array]:
    """The `width` - 1 lowest frequencies of the cosine transform, repeated if there are fewer, and the constant channel."""
    n = np.arange(4)
    waves = np.stack([np.cos(np.pi * (n + 0.5) * k / 4) * (np.sqrt(0.5) if k == 0 else 1) for k in range(4)]) / np.sqrt(2)
    order = sorted((u + v + 1.5 * (colour > 0), colour, u, v) for colour in range(3) for u in range(4) for v in range(4))
    kernel = np.zeros((4, 4, 3, width))
    for i in range(width - 1):
        _, colour, u, v = order[i % len(order)]
        kernel[..., i] = waves[u][:, None, None] * waves[v][None, :, None] * _OPPONENT[colour] / 2
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": _constant(width)}


def _downsample(n_in: int, n_out: int) -> dict[str, Array]:
    """Averages of the input channels, Haar details of the first ones, and the constant channel last."""
    kernel = np.zeros((2, 2, n_in, n_out))
    for i in range(n_in - 1):
        kernel[:, :, i, i] = _GAIN / 4
    for i in range(n_in - 1, n_out - 1):
        source, which = divmod(i - (n_in - 1), len(_HAAR))
        kernel[:, :, source % (n_in - 1), i] = _GAIN * _HAAR[which]
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": _constant(n_out)}


def _constant(width: int) -> Array:
    return jnp.zeros(width).at[-1].set(_CONSTANT)


def _linear_norm(norm: Mapping[str, Array]) -> dict[str, Array]:
    """A LayerNorm whose scale undoes the division by the standard deviation of the constant channel."""
    width = norm["scale"].shape[0]
    return {**norm, "scale": jnp.full((width,), _CONSTANT / np.sqrt(width), jnp.float32)}


def _block(block: Mapping[str, Any], key: Array) -> dict[str, Any]:
    conv, mlp = block["conv_dw"], block["mlp"]
    fc1, fc2 = mlp["fc1"], mlp["fc2"]

    def scaled(layer: Mapping[str, Array], gain: float) -> dict[str, Array]:
        n_in, n_out = layer["kernel"].shape
        drawn = jax.random.normal(jax.random.fold_in(key, n_in), (n_in, n_out), jnp.float32)
        return {**layer, "kernel": gain * drawn / np.sqrt(n_in)}

    mlp = {**mlp, "fc1": scaled(fc1, 1.0), "fc2": scaled(fc2, _RESIDUAL)}
    return {**block, "conv_dw": {**conv, "kernel": _gabor(key, *conv["kernel"].shape[::3])}, "mlp": mlp}


def _gabor(key: Array, side: int, channels: int) -> Array:
    """Random Gabor filters [side, side, 1, channels] of unit norm and sum 0."""
    draws = jax.random.uniform(key, (4, channels))
    angle, phase = jnp.pi * draws[0], 2 * jnp.pi * draws[1]
    frequency = 0.5 * (2.2 / 0.5) ** draws[2]  # radians per pixel, from the broadest wave that fits to nearly the finest
    sigma = 1.2 + draws[3]
    y, x = (jnp.asarray(a, jnp.float32)[..., None] for a in np.mgrid[:side, :side] - side // 2)
    window = jnp.exp(-(x**2 + y**2) / (2 * sigma**2))
    wave = window * jnp.cos(frequency * (x * jnp.cos(angle) + y * jnp.sin(angle)) + phase)
    wave = wave - window * wave.sum(axis=(0, 1)) / window.sum(axis=(0, 1))
    return (wave / jnp.sqrt(jnp.square(wave).sum(axis=(0, 1))))[:, :, None, :]
