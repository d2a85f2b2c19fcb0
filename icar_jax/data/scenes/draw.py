"""Renders a scene at any size with antialiased signed distance functions, each clipped to its bounding box."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from icar_jax.data.scenes import grammar as g

_TAU = 2 * math.pi


@lru_cache(maxsize=8)
def _axes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixel centres, x as [1, S] and y as [S, 1], float32 fractions of the side."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return axis[None, :], axis[:, None]


def _star(x, y):
    # Fold the plane into one tenth of the star, then compute the distance to that edge's line.
    angle = np.arctan2(x, -y)
    folded = np.abs(np.mod(angle + math.pi / 5, _TAU / 5) - math.pi / 5)
    radius = np.hypot(x, y)
    u, v = radius * np.cos(folded), radius * np.sin(folded)
    tip, dent, turn = 1.0, 0.45, math.pi / 5
    ex, ey = dent * math.cos(turn) - tip, dent * math.sin(turn)
    return ((u - tip) * ey - v * ex) / math.hypot(ex, ey)


def _heart(x, y):
    # A square on its corner with two half discs on its upper sides.
    h, x, y = 0.74, np.abs(x), -(y + 0.07)
    square = (x + np.abs(y) - h) * 0.7071
    return np.minimum(square, np.hypot(x - h / 2, y - h / 2) - 0.7071 * h)


def _arrow(x, y):
    x = np.abs(x)
    head = np.maximum(0.76 * x - 0.65 * (y + 0.98), y - 0.02)
    shaft = np.maximum(x - 0.27, np.maximum(-y - 0.1, y - 0.92))
    return np.minimum(head, shaft)


_SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.88,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.76,
    "triangle": lambda x, y: np.maximum(0.866 * np.abs(x) - 0.5 * (y + 0.98), y - 0.62),
    "diamond": lambda x, y: 0.81 * np.abs(x) + 0.586 * np.abs(y) - 0.57,
    "star": _star,
    "cross": lambda x, y: np.minimum(
        np.maximum(np.abs(x) - 0.29, np.abs(y) - 0.92), np.maximum(np.abs(x) - 0.92, np.abs(y) - 0.29)
    ),
    "heart": _heart,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.92, 0.68 - np.hypot(x - 0.46, y + 0.1)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.69) - 0.23,
    "arrow": _arrow,
}


def _pattern(kind: str, x, y, period: float, scale: float):
    """Returns the weight of the second colour in [0, 1]; ``x``, ``y`` and ``period`` are in units of ``scale`` pixels."""
    if kind == "dotted":
        u, v = x / period, y / period
        gap = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)
        return np.clip((0.34 - gap) * (period * scale) + 0.5, 0, 1)
    wave = np.sin(x * (_TAU / period))
    if kind == "checkered":
        wave = wave * np.sin(y * (_TAU / period))
    return np.clip(wave * (period / _TAU * scale) + 0.5, 0, 1)


def _background(ground: g.Background, size: int) -> np.ndarray:
    """Renders the background as float32 [S, S, 3]."""
    x, y = _axes(size)
    first = np.asarray(ground.rgb[0], np.float32)
    if ground.kind == "plain":
        return np.broadcast_to(first, (size, size, 3)).copy()
    a, b, c, *waves = ground.layout
    if ground.kind == "gradient":
        angle = a * _TAU
        along = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)
        share = np.clip(along / (0.9 * (abs(math.cos(angle)) + abs(math.sin(angle)))) + 0.5, 0, 1)
    elif ground.kind == "cloudy":
        share = sum(
            np.sin(_TAU * (x * math.cos(_TAU * p) + y * math.sin(_TAU * p)) * (1.0 + 0.6 * k) + _TAU * q)
            for k, (p, q) in enumerate(zip(waves[:3], waves[3:6]))
        )
        share = np.clip(0.5 + 0.45 * share, 0, 1)
    else:
        angle = math.pi * a if ground.kind == "striped" else 0.5 * (a - 0.5)
        u = x * math.cos(angle) + y * math.sin(angle) + b
        v = y * math.cos(angle) - x * math.sin(angle) + c
        period = {"striped": 0.24, "dotted": 0.2, "checkered": 0.4}[ground.kind]
        share = _pattern(ground.kind, u, v, period, size)
    return first + share[..., None].astype(np.float32) * (np.asarray(ground.rgb[1], np.float32) - first)


def _draw_confetti(canvas: np.ndarray, pieces: tuple[tuple[float, ...], ...]) -> None:
    """Draws confetti pieces as capsules, all distances in one batch [N, K, K]; K pixels fit the longest piece."""
    size = canvas.shape[0]
    table = np.asarray(pieces, np.float32)
    x, y, angle, length, width = (table[:, k, None, None] for k in range(5))
    side = min(size, int(2 * size * float((length + width).max())) + 3)
    left = np.clip(np.rint(table[:, 0] * size - side / 2), 0, size - side).astype(np.int64)
    top = np.clip(np.rint(table[:, 1] * size - side / 2), 0, size - side).astype(np.int64)
    steps = (np.arange(side, dtype=np.float32) + 0.5) / size
    dx = left[:, None, None] / np.float32(size) + steps[None, None, :] - x
    dy = top[:, None, None] / np.float32(size) + steps[None, :, None] - y
    cos, sin = np.cos(angle), np.sin(angle)
    along = np.maximum(np.abs(dx * cos + dy * sin) - length, 0)
    distance = np.hypot(along, dy * cos - dx * sin) - width
    cover = np.clip(0.5 - distance * size, 0, 1)[..., None]
    rgb = table[:, 5:]
    for n, (i, j) in enumerate(zip(top.tolist(), left.tolist())):
        box = canvas[i : i + side, j : j + side]
        box += cover[n] * (rgb[n] - box)


def _draw_item(canvas: np.ndarray, item: g.Item) -> None:
    size = canvas.shape[0]
    reach = item.radius * 1.08 + 1.5 / size
    low_x, high_x = max(0, int((item.x - reach) * size)), min(size, int((item.x + reach) * size) + 1)
    low_y, high_y = max(0, int((item.y - reach) * size)), min(size, int((item.y + reach) * size) + 1)
    xs, ys = _axes(size)
    dx, dy = (xs[:, low_x:high_x] - item.x) / item.radius, (ys[low_y:high_y] - item.y) / item.radius
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    scale = item.radius * size
    distance = _SHAPES[item.shape](u, v)
    fill = np.asarray(item.rgb, np.float32)
    if item.texture != "plain":
        period = (0.062 + 0.16 * item.radius) / item.radius
        period *= {"striped": 1.0, "dotted": 1.0, "checkered": 1.35}[item.texture]
        tcos, tsin = math.cos(item.texture_angle), math.sin(item.texture_angle)
        share = _pattern(item.texture, u * tcos + v * tsin + 0.25, v * tcos - u * tsin + 0.25, period, scale)
        fill = fill + share[..., None] * (np.asarray(item.accent, np.float32) - fill)
    # A thin dark contour separates an item from a background or container of similar brightness.
    line = np.clip((distance + 0.014 / item.radius) * scale + 0.5, 0, 1)[..., None] * 0.75
    fill = fill + line * (0.06 - fill)
    box = canvas[low_y:high_y, low_x:high_x]
    box += np.clip(0.5 - distance * scale, 0, 1)[..., None] * (fill - box)


def draw_scene(scene: g.Scene, size: int, light: np.ndarray | None = None) -> np.ndarray:
    """Renders a scene as uint8 [size, size, 3]. The layout is the same at every size; only pixel noise differs.

    light: float32 [size, size], factor on the background's brightness.
    """
    canvas = _background(scene.background, size)
    if light is not None:
        canvas = np.clip(canvas * light[..., None], 0, 1)
    if scene.confetti:
        _draw_confetti(canvas, scene.confetti)
    order = (1, 0, 2) if scene.relation == "inside" else range(3)
    for k in order:
        if k < len(scene.items):
            _draw_item(canvas, scene.items[k])
    n = scene.nuisance
    x, y = _axes(size)
    light = 1 + n.illumination * ((x - 0.5) * math.cos(n.light_angle) + (y - 0.5) * math.sin(n.light_angle))
    tint = np.array([1 + n.warmth, 1, 1 - n.warmth], np.float32) * (255 * n.contrast)
    canvas *= light[..., None] * tint
    canvas += 255 * (0.5 - 0.5 * n.contrast + n.brightness)
    np.clip(canvas, 0, 255, out=canvas)
    blurred = Image.fromarray(canvas.astype(np.uint8)).filter(ImageFilter.GaussianBlur(n.blur / 100 * size))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(scene.noise_key)))
    noise = rng.standard_normal((size, size, 3), dtype=np.float32)
    noise *= 255 * n.noise
    noise += np.asarray(blurred)
    noise += 0.5  # the cast truncates, so this rounds to nearest
    np.clip(noise, 0, 255, out=noise)
    return noise.astype(np.uint8)
