"""Contrastive losses in a ring over devices: no device ever holds the full matrix of logits.

Images stay on their device. Text shards are passed around the ring of all devices that share the batch (collective permutes),
and each device computes logits of its images against one chunk of the current texts at a time. Log-sum-exps of the rows
(images) are accumulated locally. Those of the columns (texts) move with their text shard and are complete once it has passed
every device. The backward pass goes around the ring again: it recomputes each chunk of logits from the final log-sum-exps, and
the gradient of each text shard moves with it. With S devices and E exits, memory per device is O(E B/S (chunk + D)), forward
and backward; autodiff through the loop would store the logits of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from icar_jax.config import ConfigError, unknown
from icar_jax.parallel.mesh import BATCH_AXES, batch_shards

Array = jax.Array
ROWS = P(BATCH_AXES)  # [B, D]
EXIT_ROWS = P(None, BATCH_AXES)  # [E, B]


@dataclass(frozen=True)
class _Form:
    """Static settings of the loss."""

    kind: str  # softmax | sigmoid
    direction: str  # of softmax: symmetric | image_to_text
    mesh: Mesh
    chunk: int
    batch: int  # B

    @property
    def rows(self) -> int:
        """Images per device, equal to texts per device."""
        return self.batch // batch_shards(self.mesh)

    @property
    def columns(self) -> bool:
        """Whether the loss includes the text-to-image direction."""
        return self.kind == "softmax" and self.direction == "symmetric"


def per_exit(
    images: dict[int, Array],
    text: Array,
    scales: dict[int, Array],
    biases: dict[int, Array] | None,
    *,
    kind: str,
    direction: str,
    mesh: Mesh,
    chunk: int,
) -> dict[int, Array]:
    """Returns {executed blocks: scalar loss}, equal to `contrastive.per_exit` in value and gradient; one pass for all exits.

    Differentiable once, in reverse mode.

    Args:
        images: {executed blocks: [B, D] float32}, unit norm. B is sharded over the mesh axes data and fsdp; the tensor axis
            repeats the work.
        text: [B, D] float32, unit norm, sharded in the same way.
        scales, biases: {executed blocks: scalar}; biases only for kind 'sigmoid'.
        kind, direction: as in `contrastive.per_exit`.
        chunk: texts per chunk of logits; B/devices or more means whole shards. It need not divide the shard.

    Raises ConfigError for a chunk below 1, an unknown kind, or a batch that the devices do not divide.
    """
    if kind not in ("softmax", "sigmoid"):
        raise unknown("config.loss.kind", kind, ("softmax", "sigmoid"))
    if chunk < 1:
        raise ConfigError(f"config.loss.chunk={chunk} must be at least 1, for example 1024")
    shards = batch_shards(mesh)
    if len(text) % shards:
        raise ConfigError(
            f"config.train.batch_size={len(text)} is not a multiple of the {shards} devices that share the batch "
            f"(config.mesh.data={mesh.shape['data']} x config.mesh.fsdp={mesh.shape['fsdp']}); choose a multiple of {shards}"
        )
    assert kind == "softmax" or biases is not None, "the sigmoid loss needs a bias for each exit"
    scale = jnp.stack([scales[e] for e in images])
    bias = jnp.stack([biases[e] for e in images]) if kind == "sigmoid" else jnp.zeros_like(scale)
    values = _losses(_Form(kind, direction, mesh, chunk, len(text)), tuple(images.values()), text, scale, bias)
    return {e: values[i] for i, e in enumerate(images)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(form: _Form, images: tuple[Array, ...], text: Array, scales: Array, biases: Array) -> Array:
    """images: E of [B, D], text [B, D], scales and biases [E] -> [E]."""
    return _forward(form, images, text, scales, biases)[0]


def _losses_fwd(form: _Form, images: tuple[Array, ...], text: Array, scales: Array, biases: Array):
    values, rows, columns = _forward(form, images, text, scales, biases)
    return values, (images, text, scales, biases, rows, columns)


def _losses_bwd(form: _Form, residuals: tuple, weights: Array):
    return _backward(form, *residuals, weights)


_losses.defvjp(_losses_fwd, _losses_bwd)


# --- the ring. Each device compares its b = B/S images of all E exits (R = E b rows) with c texts at a time. ---


@dataclass(frozen=True)
class _Visit:
    """One chunk of texts and its logits on a device; the last chunk may be padded."""

    texts: Array  # [c, D]
    logits: Array  # [R, c]
    real: Array | None  # [c] bool: False for padding; None if there is no padding
    own: Array  # [R]: index of the image's matching text in the chunk; c if it is not in the chunk

    @property
    def pair(self) -> Array:
        """[R, c] bool: True for matching pairs."""
        return self.own[:, None] == jnp.arange(len(self.texts))


def _round(form: _Form, body: Callable, kept: Any, carried: Any, images: Array, biases: Array, text: Array) -> tuple[Any, Any]:
    """Passes each text shard, and the `carried` state that moves with it, around the ring of devices once.

    images [R, D], multiplied by their scales; biases [R]; text [n, c, D]; carried: leaves [n, ...].
    `body(kept, one chunk of carried, _Visit) -> (kept, carried)`. Returns the final (kept, carried), back on their device.
    """
    shards, (count, size, _) = batch_shards(form.mesh), text.shape
    place = jnp.tile(jnp.arange(form.rows), len(images) // form.rows)
    if shards == 1:
        pass_on = lambda x: x
    else:
        pass_on = partial(lax.ppermute, axis_name=BATCH_AXES, perm=[(i, (i + 1) % shards) for i in range(shards)])

    def score(turn, kept, inputs):
        index, texts, carried = inputs
        logits = _dot("rd,cd->rc", images, texts)
        if form.kind == "sigmoid":
            logits = logits + biases[:, None]
        real = index * size + jnp.arange(size) < form.rows if form.rows % size else None
        own = jnp.where((turn == 0) & (place // size == index), place % size, size)
        return body(kept, carried, _Visit(texts, logits, real, own))

    def step(state, turn):
        kept, text, carried = state
        following = pass_on(text)  # issued before the matrix products, which can hide the communication
        kept, carried = lax.scan(partial(score, turn), kept, (jnp.arange(count), text, carried))
        return (kept, following, jax.tree.map(pass_on, carried)), None

    (kept, _, carried), _ = lax.scan(step, (kept, text, carried), jnp.arange(shards))
    return kept, carried


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)


def _chunks(x: Array, chunk: int) -> Array:
    """[b, ...] -> [n, c, ...] with c <= chunk, as even as possible; the last chunk is padded with zeros."""
    n = -(-len(x) // chunk)
    size = -(-len(x) // n)
    return jnp.pad(x, [(0, n * size - len(x))] + [(0, 0)] * (x.ndim - 1)).reshape(n, size, *x.shape[1:])


def _full(shape: tuple[int, ...], value: float = 0.0) -> Array:
    """A constant marked as varying over devices, as shard_map requires of an accumulator of varying values."""
    return lax.pcast(jnp.full(shape, value, jnp.float32), BATCH_AXES, to="varying")


def _scaled(images: tuple[Array, ...], scales: Array) -> Array:
    """E of [b, D] -> [R, D], multiplied by their scales so that products with texts are logits without another matrix."""
    return jnp.concatenate([scale * image for scale, image in zip(scales, images, strict=True)])


def _on_shards(form: _Form, local: Callable, in_specs: tuple, out_specs: tuple) -> Callable:
    return jax.shard_map(local, mesh=form.mesh, in_specs=in_specs, out_specs=out_specs)


# --- the two passes ---


@dataclass(frozen=True)
class _LogSumExp:
    """Running log-sum-exp, stored as the maximum and the sum of exp(logits - maximum).

    Their combination would be rounded at the size of a logit (1e-5 at 100), which loses the digits of 1 - p for a well-matched
    pair.
    """

    maximum: Array
    total: Array

    @staticmethod
    def empty(shape: tuple[int, ...]) -> _LogSumExp:
        return _LogSumExp(_full(shape, -jnp.inf), _full(shape))

    def add(self, logits: Array, axis: int, real: Array | None = None) -> _LogSumExp:
        maximum = jnp.maximum(self.maximum, jnp.max(logits, axis=axis, where=real, initial=-jnp.inf))
        new = jnp.sum(jnp.exp(logits - jnp.expand_dims(maximum, axis)), axis=axis, where=real)
        return _LogSumExp(maximum, self.total * jnp.exp(self.maximum - maximum) + new)

    def less(self, own: Array) -> Array:
        """log-sum-exp - own: the cross-entropy if `own` is the logit of the correct class."""
        return jnp.log(self.total) + (self.maximum - own)

    def softmax(self, logits: Array) -> Array:
        """exp(logits - log-sum-exp), broadcast."""
        return jnp.exp(logits - self.maximum) / self.total


jax.tree_util.register_dataclass(_LogSumExp)


def _forward(form: _Form, images, text, scales, biases) -> tuple[Array, _LogSumExp | None, _LogSumExp | None]:
    """-> losses [E]; for softmax also the log-sum-exps of each image [E, B] and, if `form.columns`, of each text [E, B]."""

    def softmax(kept, columns, visit):
        rows, own = kept
        rows = rows.add(visit.logits, 1, visit.real)
        own = own + jnp.take_along_axis(visit.logits, visit.own[:, None], axis=1, mode="fill", fill_value=0)[:, 0]
        if form.columns:
            columns = columns.add(visit.logits.reshape(-1, form.rows, visit.logits.shape[1]), 1)
        return (rows, own), columns

    def sigmoid(rows, columns, visit):
        signed = jnp.where(visit.pair, visit.logits, -visit.logits)
        return rows - jnp.sum(jax.nn.log_sigmoid(signed), axis=1, where=visit.real), columns

    def local(images, text, scales, biases):
        exits, rows = len(images), form.rows
        mean = lambda values: lax.psum(jnp.sum(values.reshape(exits, rows), axis=1), BATCH_AXES) / form.batch
        texts = _chunks(text, form.chunk)
        inputs = _scaled(images, scales), jnp.repeat(biases, rows), texts
        zeros = _full((exits * rows,))
        if form.kind == "sigmoid":
            return mean(_round(form, sigmoid, zeros, None, *inputs)[0]), None, None
        columns = _LogSumExp.empty((len(texts), exits, texts.shape[1])) if form.columns else None
        (sums, own), columns = _round(form, softmax, (_LogSumExp.empty(zeros.shape), zeros), columns, *inputs)
        value = mean(sums.less(own))
        if form.columns:
            columns = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(exits, -1)[:, :rows], columns)
            value = (value + mean(columns.less(own.reshape(exits, rows)))) / 2
        return value, jax.tree.map(lambda x: x.reshape(exits, rows), sums), columns

    return _on_shards(form, local, (ROWS, ROWS, P(), P()), (P(), EXIT_ROWS, EXIT_ROWS))(images, text, scales, biases)


def _backward(form: _Form, images, text, scales, biases, rows, columns, weights) -> tuple[tuple, Array, Array, Array]:
    """Gradients of sum_e weights_e loss_e for images, text, scales and biases, from the forward pass's log-sum-exps."""

    def local(images, text, scales, biases, rows, columns, weights):
        exits, count, width = len(images), form.rows, text.shape[1]
        each = lambda values: jnp.repeat(values, count, axis=0)  # [E, ...] -> [R, ...]
        texts = _chunks(text, form.chunk)
        scaled, weight = _scaled(images, scales), each(weights)[:, None] / form.batch
        rows = jax.tree.map(lambda x: x.reshape(-1, 1), rows)

        def slope(columns, visit):
            """d sum_e weights_e loss_e / d logits [R, c]."""
            if form.kind == "sigmoid":
                slope = jnp.where(visit.pair, -jax.nn.sigmoid(-visit.logits), jax.nn.sigmoid(visit.logits))
            else:
                slope = rows.softmax(visit.logits) - visit.pair
                if form.columns:
                    slope = (slope + jax.tree.map(each, columns).softmax(visit.logits) - visit.pair) / 2
            slope = weight * slope
            return slope if visit.real is None else jnp.where(visit.real, slope, 0)

        def body(kept, carried, visit):
            d_scaled, d_biases = kept
            columns, d_texts = carried
            d_logits = slope(columns, visit)
            d_scaled = d_scaled + _dot("rc,cd->rd", d_logits, visit.texts)
            d_texts = d_texts + _dot("rc,rd->cd", d_logits, scaled)
            return (d_scaled, d_biases + jnp.sum(d_logits, axis=1)), (columns, d_texts)

        columns = jax.tree.map(lambda x: _chunks(x.T, form.chunk).swapaxes(1, 2), columns)
        kept, carried = (_full(scaled.shape), _full((exits * count,))), (columns, _full(texts.shape))
        (d_scaled, d_biases), (_, d_texts) = _round(form, body, kept, carried, scaled, each(biases), texts)
        d_scaled = d_scaled.reshape(exits, count, width)
        d_images = tuple(scale * d for scale, d in zip(scales, d_scaled, strict=True))
        d_scales = jnp.stack([jnp.sum(d * image) for d, image in zip(d_scaled, images, strict=True)])
        d_biases = jnp.sum(d_biases.reshape(exits, count), axis=1)
        return d_images, d_texts.reshape(-1, width)[:count], *lax.psum((d_scales, d_biases), BATCH_AXES)

    specs = (ROWS, ROWS, P(), P(), EXIT_ROWS, EXIT_ROWS, P())
    return _on_shards(form, local, specs, (ROWS, ROWS, P(), P()))(images, text, scales, biases, rows, columns, weights)
