"""Grammar of scenes: the vocabulary, the scene dataclasses and the complexity formula.

A scene has one to three *items* (named shapes) on a background, with or without confetti.
Coordinates are fractions of the image side, x to the right and y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "crescent", "ring", "arrow")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "black")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
RELATIONS = ("left", "right", "above", "below", "inside")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
POSITIONS = (
    "top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip

# Shapes too thin for a texture when small.
THIN = ("diamond", "cross", "crescent", "ring", "arrow")

# Shapes with enough room for a small item inside (a ring holds it in its hole).
CONTAINERS = ("circle", "square", "diamond", "heart", "ring")

# Background kind -> contribution to the complexity, in [0, 1]. A gradient has two named colours; patterns have two
# shades of one colour, so that the colours of an image say little about its caption.
BACKGROUNDS = {"plain": 0.0, "gradient": 0.4, "cloudy": 0.7, "striped": 0.8, "dotted": 0.9, "checkered": 1.0}

# (colour, shape) pairs that never occur in the splits 'train', 'calibration' and 'relations': 9 of 100.
# Every shape, and every colour except one, is in exactly one pair, so training covers each word with all others.
HELDOUT_PAIRS = (
    ("red", "cross"), ("orange", "square"), ("yellow", "star"), ("green", "heart"), ("teal", "circle"),
    ("blue", "triangle"), ("purple", "ring"), ("pink", "diamond"), ("white", "crescent"),
)  # fmt: skip

# Colours too similar to overlap; an item never has a colour close to its background's.
_CLOSE = (
    ("red", "orange"), ("orange", "yellow"), ("green", "teal"), ("teal", "blue"), ("blue", "purple"),
    ("purple", "pink"), ("pink", "red"), ("yellow", "white"), ("pink", "white"),
)  # fmt: skip
CLOSE = {c: frozenset({c, *(b for a, b in _CLOSE if a == c), *(a for a, b in _CLOSE if b == c)}) for c in COLOURS}

MAX_CONFETTI = 32
MANY_CONFETTI = 9  # from this count on, captions say 'strewn'; below, 'a little'


@dataclass(frozen=True)
class Item:
    """A named object. ``radius`` is the radius of its circumscribed circle; angles in radians; rgb in [0, 1]."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]
    accent: tuple[float, float, float]
    texture_angle: float


@dataclass(frozen=True)
class Background:
    """Background of a scene. ``colours``: names, two for 'gradient', else one. ``rgb``: one colour for 'plain', else two.
    ``layout``: uniform numbers in [0, 1) for direction and phase."""

    kind: str
    colours: tuple[str, ...]
    rgb: tuple[tuple[float, float, float], ...]
    layout: tuple[float, ...]


@dataclass(frozen=True)
class Nuisance:
    """Image parameters that are independent of captions and complexity.

    Attributes:
        noise: standard deviation of Gaussian pixel noise, in units of the full range.
        blur: standard deviation of the Gaussian blur, in percent of the image side.
        contrast: factor around mid-grey.
        brightness: offset in units of the full range.
        hue: rotation of the whole palette, degrees.
        saturation: factor on the saturation of the whole palette.
        illumination: strength of a linear light gradient across the image.
        light_angle: direction of that gradient, radians.
        warmth: colour of the light; the factor is 1 + warmth on red and 1 - warmth on blue.
    """

    noise: float
    blur: float
    contrast: float
    brightness: float
    hue: float
    saturation: float
    illumination: float
    light_angle: float
    warmth: float


@dataclass(frozen=True)
class Scene:
    """A scene: captions, labels, complexity and the rendered image are derived from it.

    Attributes:
        items: 1 to 3 items; with two or more, ``items[0]`` is <relation> (of) ``items[1]``.
        relation: one of RELATIONS, or None for one item.
        position: one of POSITIONS for one item, else None.
        confetti: pieces as (x, y, angle, half length, half width, r, g, b).
        noise_key: seeds the pixel noise.
        wording: uniform numbers in [0, 1) that select the phrasings.
    """

    items: tuple[Item, ...]
    relation: str | None
    position: str | None
    background: Background
    confetti: tuple[tuple[float, ...], ...]
    nuisance: Nuisance
    noise_key: tuple[int, ...]
    wording: tuple[float, ...]

    @property
    def complexity(self) -> float:
        """Known complexity in [0, 1]; see :func:`complexity`."""
        textures = len({i.texture for i in self.items} - {"plain"})
        colours = len({i.colour for i in self.items})
        return complexity(len(self.items), self.background.kind, textures, colours, len(self.confetti))

    @property
    def labels(self) -> tuple[str, ...]:
        """Distinct shapes of the items, sorted."""
        return tuple(sorted({i.shape for i in self.items}))


def complexity(items: int, background: str, textures: int, colours: int, confetti: int) -> float:
    """Returns the complexity in [0, 1] from the scene's parts.

    0.25 (items - 1) / 2 + 0.15 BACKGROUNDS[background] + 0.10 textures / 3 + 0.10 (colours - 1) / 2
    + 0.40 confetti / MAX_CONFETTI

    Args:
        items: number of named items, 1 to 3.
        background: background kind.
        textures: number of distinct textures on items, 'plain' not counted, 0 to 3.
        colours: number of distinct colours of the items, 1 to 3.
        confetti: number of pieces, 0 to MAX_CONFETTI.
    """
    return (
        0.125 * (items - 1)
        + 0.15 * BACKGROUNDS[background]
        + 0.10 * textures / 3
        + 0.10 * (colours - 1) / 2
        + 0.40 * confetti / MAX_CONFETTI
    )
