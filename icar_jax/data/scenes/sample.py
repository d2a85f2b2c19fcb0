"""Samples random scenes: draws the complexity uniformly first, then chooses parts that match it."""

from __future__ import annotations

import colorsys
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from icar_jax.data.scenes import grammar as g


class Draws:
    """Uniform random numbers from a generator, drawn in blocks, which is much faster than one call per number."""

    def __init__(self, rng: np.random.Generator):
        self._rng, self._block, self._next = rng, [], 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        if self._next == len(self._block):
            self._block, self._next = self._rng.random(128).tolist(), 0
        self._next += 1
        return low + (high - low) * self._block[self._next - 1]

    def choice(self, options: Sequence):
        return options[int(self.uniform() * len(options))]

    def several(self, options: Sequence, count: int) -> list:
        """Returns ``count`` distinct members of ``options`` in random order."""
        rest = list(options)
        return [rest.pop(int(self.uniform() * len(rest))) for _ in range(count)]


class _Parts(NamedTuple):
    base: float  # complexity without confetti
    weight: float
    items: int
    background: str
    item_colours: int
    textures: int


def _all_parts() -> list[_Parts]:
    parts = []
    for items in (1, 2, 3):
        for kind in g.BACKGROUNDS:
            for colours in range(1, items + 1):
                for textures in range(items + 1):
                    base = g.complexity(items, kind, textures, colours, 0)
                    # High targets require three items, so fewer items are preferred where possible.
                    weight = 0.7 ** (items - colours) / sum(0.7**k for k in range(items))
                    weight *= (2.0 if kind == "plain" else 1.0) * (4 - items) / (items + 1)
                    parts.append(_Parts(base, weight, items, kind, colours, textures))
    return sorted(parts)


_PARTS = _all_parts()
_BASES = [p.base for p in _PARTS]
_CUMULATIVE = [0.0, *accumulate(p.weight for p in _PARTS)]


def _parts_for(target: float, gap: float, draws: Draws) -> _Parts:
    """Chooses parts whose complexity without confetti lies at most ``gap`` below ``target``."""
    low = bisect_left(_BASES, target - gap - 1e-9)
    high = bisect_right(_BASES, target)
    at = draws.uniform(_CUMULATIVE[low], _CUMULATIVE[high])
    return _PARTS[min(max(bisect_right(_CUMULATIVE, at) - 1, low), high - 1)]


# Hue in degrees, saturation and value of each colour name.
_HSV = {
    "red": (357, 0.88, 0.86), "orange": (27, 0.92, 0.97), "yellow": (50, 0.85, 0.97),
    "green": (122, 0.75, 0.62), "teal": (178, 0.75, 0.75), "blue": (221, 0.85, 0.85),
    "purple": (276, 0.72, 0.62), "pink": (331, 0.42, 0.98), "white": (60, 0.03, 0.97), "black": (240, 0.2, 0.1),
}  # fmt: skip


def _rgb(colour: str, nuisance: g.Nuisance, draws: Draws) -> tuple[float, float, float]:
    hue, saturation, value = _HSV[colour]
    hue = hue + nuisance.hue + draws.uniform(-4, 4)
    saturation *= nuisance.saturation * draws.uniform(0.88, 1.0)
    value *= draws.uniform(0.85, 1.0) if colour != "white" else draws.uniform(0.95, 1.0)
    return colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)


def _mix(a: Sequence[float], b: Sequence[float], share: float) -> tuple[float, float, float]:
    return tuple(p + share * (q - p) for p, q in zip(a, b))


def _ground_rgb(kind: str, names: tuple[str, ...], nuisance: g.Nuisance, draws: Draws):
    """Returns the background's one or two colours; the second colour of a pattern is a shade of the first."""
    rgb = _rgb(names[0], nuisance, draws)
    if kind == "plain":
        return (rgb,)
    if kind == "gradient":
        return rgb, _rgb(names[1], nuisance, draws)
    if names[0] == "black":
        return rgb, _mix(rgb, (1, 1, 1), draws.uniform(0.25, 0.35))
    if names[0] in ("white", "yellow", "pink"):
        return rgb, _mix(rgb, (0, 0, 0), draws.uniform(0.2, 0.32))
    return rgb, _mix(rgb, draws.choice(((0, 0, 0), (1, 1, 1))), draws.uniform(0.3, 0.42))


def _nuisance(draws: Draws) -> g.Nuisance:
    return g.Nuisance(
        noise=draws.uniform(0.0, 0.05),
        blur=draws.uniform(0.3, 1.1),
        contrast=draws.uniform(0.7, 1.0),
        brightness=draws.uniform(-0.08, 0.08),
        hue=draws.uniform(-6, 6),
        saturation=draws.uniform(0.72, 1.0),
        illumination=draws.uniform(0.0, 0.4),
        light_angle=draws.uniform(0, 2 * math.pi),
        warmth=draws.uniform(-0.13, 0.13),
    )


def _places(count: int, relation: str | None, position: str | None, draws: Draws) -> list[tuple[float, float]]:
    """Returns item centres, far enough apart that two large items do not touch, even when swapped."""

    def near(x: float, y: float, by: float = 0.03) -> tuple[float, float]:
        return x + draws.uniform(-by, by), y + draws.uniform(-by, by)

    if relation is None:
        row, column = divmod(g.POSITIONS.index(position), 3)
        return [near(0.26 + 0.24 * column, 0.26 + 0.24 * row, 0.04)]
    far = draws.choice((0.26, 0.74)) if count == 3 else draws.uniform(0.3, 0.7)
    if relation == "inside":
        centre = near(draws.choice((0.29, 0.71)), far) if count == 3 else near(draws.uniform(0.3, 0.7), far)
        third = near(1.04 - centre[0], 1.04 - centre[1], 0.02)
        return [centre, centre, third][:count]
    first, second = near(0.26, far), near(0.74, far)
    third = near(draws.uniform(0.26, 0.74), 1 - far)
    if relation in ("right", "below"):
        first, second = second, first
    places = [first, second, third][:count]
    return places if relation in ("left", "right") else [(y, x) for x, y in places]


def _colours(parts: _Parts, relation: str | None, forced: str | None, draws: Draws) -> tuple[tuple[str, ...], list[str]]:
    """Returns background colours and one colour per item; ``forced`` fixes the first item's colour."""
    grounds = []
    for _ in range(2 if parts.background == "gradient" else 1):
        taken = {c for c in grounds for c in g.CLOSE[c]} | (g.CLOSE[forced] if forced else set())
        grounds.append(draws.choice([c for c in g.COLOURS if c not in taken]))
    taken = {c for b in grounds for c in g.CLOSE[b]} | ({forced} if forced else set())
    free = [c for c in g.COLOURS if c not in taken]
    colours = ([forced] if forced else []) + draws.several(free, parts.item_colours - bool(forced))
    colours += [draws.choice(colours) for _ in range(parts.items - len(colours))]
    if relation == "inside" and colours[1] in g.CLOSE[colours[0]]:
        # The inner item must contrast with its container; at least one free colour is not close to either colour.
        colours[1] = draws.choice([c for c in free if c not in g.CLOSE[colours[0]]])
    return tuple(grounds), colours


def _textures(parts: _Parts, shapes: list[str], radii: list[float], draws: Draws) -> list[str]:
    """Returns one texture per item; items too small or too thin for a visible texture stay plain."""
    shows = [r > 0.15 or (r > 0.11 and s not in g.THIN) for s, r in zip(shapes, radii)]
    kinds = draws.several(g.TEXTURES[1:], min(parts.textures, sum(shows)))
    textures = kinds + [draws.choice(["plain", *kinds]) for _ in range(sum(shows) - len(kinds))]
    textures = draws.several(textures, len(textures))
    return [textures.pop() if s else "plain" for s in shows]


def _shapes(colours: list[str], relation: str | None, forced: tuple[str, str] | None, exclude: bool, draws: Draws):
    """Returns one shape per item: no two items share colour and shape; held-out pairs are excluded if ``exclude``."""
    shapes: list[str] = []
    for k, colour in enumerate(colours):
        if forced and k == 0:
            shapes.append(forced[1])
            continue
        options = g.CONTAINERS if relation == "inside" and k == 1 else g.SHAPES
        taken = {s for s, c in zip(shapes, colours) if c == colour}
        banned = {s for c, s in g.HELDOUT_PAIRS if c == colour} if exclude else set()
        shapes.append(draws.choice([s for s in options if s not in taken and s not in banned]))
    return shapes


def _item(shape, colour, size, texture, place, radius, nuisance, draws) -> g.Item:
    rgb = _rgb(colour, nuisance, draws)
    light = sum(rgb) / 3
    if colour == "black":
        accent = (0.62, 0.62, 0.62)
    elif light > 0.62:  # pale colours need a dark accent for a visible texture
        accent = _mix(rgb, (0.1, 0.1, 0.1), 0.6)
    else:
        accent = _mix(rgb, *draws.choice((((1, 1, 1), 0.72), ((0.02, 0.02, 0.02), 0.72))))
    return g.Item(
        shape, colour, size, texture, *place, radius, draws.uniform(-0.2, 0.2), rgb, accent,
        draws.choice((0.0, 0.25, 0.5, 0.75)) * math.pi if texture == "striped" else draws.uniform(-0.15, 0.15),
    )  # fmt: skip


def sample_scene(
    rng: np.random.Generator,
    noise_key: tuple[int, ...],
    *,
    exclude_heldout: bool,
    force_heldout: bool = False,
    force_relation: bool = False,
) -> g.Scene:
    """Samples one scene.

    Args:
        rng: source of all randomness except the pixel noise.
        noise_key: entropy for the pixel noise, stored in the scene.
        exclude_heldout: use no pair of HELDOUT_PAIRS.
        force_heldout: make the first item one of HELDOUT_PAIRS.
        force_relation: use two or three items, in a relation that has an opposite.
    """
    draws = Draws(rng)
    nuisance = _nuisance(draws)
    wording = tuple(draws.uniform() for _ in range(12))
    while True:
        target = draws.uniform()
        # Either confetti closes the gap to the target, or the parts alone come close to it.
        clean = target <= 0.6 and draws.uniform() < 0.4
        parts = _parts_for(target, 0.03 if clean else 0.4, draws)
        if parts.items > 1 or not force_relation:
            break
    forced = draws.choice(g.HELDOUT_PAIRS) if force_heldout else None
    relation = position = None
    if parts.items == 1:
        position = draws.choice(g.POSITIONS)
    else:
        relation = draws.choice(g.RELATIONS[:4] if force_relation else g.RELATIONS)
    grounds, colours = _colours(parts, relation, forced and forced[0], draws)
    shapes = _shapes(colours, relation, forced, exclude_heldout, draws)
    sizes = [draws.choice(g.SIZES) for _ in range(parts.items)]
    if relation == "inside":
        sizes[:2] = ["small", "large"]
    radii = [draws.uniform(0.195, 0.22) if s == "large" else draws.uniform(0.115, 0.13) for s in sizes]
    if relation == "inside":
        radii[:2] = [draws.uniform(0.092, 0.1), draws.uniform(0.255, 0.27)]
    places = _places(parts.items, relation, position, draws)
    textures = _textures(parts, shapes, radii, draws)
    items = tuple(_item(*attributes, nuisance, draws) for attributes in zip(shapes, colours, sizes, textures, places, radii))
    background = g.Background(
        parts.background,
        grounds,
        _ground_rgb(parts.background, grounds, nuisance, draws),
        tuple(draws.uniform() for _ in range(12)),
    )
    bare = g.Scene(items, relation, position, background, (), nuisance, noise_key, wording)
    pieces = 0 if clean else min(g.MAX_CONFETTI, max(0, round((target - bare.complexity) / 0.4 * g.MAX_CONFETTI)))
    # Confetti in few colours resembles items of these colours in a colour histogram.
    hues = draws.several([c for c in g.COLOURS if c not in grounds], draws.choice((1, 2, 3)))
    return replace(bare, confetti=tuple(_piece(hues, nuisance, draws) for _ in range(pieces)))


def _piece(colours: list[str], nuisance: g.Nuisance, draws: Draws) -> tuple[float, ...]:
    rgb = _rgb(draws.choice(colours), nuisance, draws)
    width = draws.uniform(0.012, 0.024)
    return (
        draws.uniform(), draws.uniform(), draws.uniform(0, math.pi), width * draws.uniform(1.0, 2.5), width, *rgb
    )  # fmt: skip


def twin_of(scene: g.Scene) -> g.Scene:
    """Returns the scene with its first two items swapped. Raises ValueError if the scene's relation has no opposite."""
    if scene.relation not in g.OPPOSITE:
        raise ValueError(f"a twin needs one of the relations {sorted(g.OPPOSITE)}, this scene has {scene.relation!r}")
    a, b, *rest = scene.items
    swapped = (replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y), *rest)
    return replace(scene, items=swapped, relation=g.OPPOSITE[scene.relation])
