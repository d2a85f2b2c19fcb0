"""Captions of a scene: three true sentences, of which the first two are complete.

The third omits the background's colour and other details: the background covers most of the image, so its colour is
what a colour histogram predicts best.
"""

from __future__ import annotations

from icar_jax.data.scenes import grammar as g

# Every attribute has two phrasings; a scene uses one in its first caption and the other in its second.
_SIZE = {"large": ("large", "big"), "small": ("small", "little")}
_TEXTURE = {
    "plain": ("", ""), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}  # fmt: skip
_RELATION = {
    "left": ("to the left of", "left of"), "right": ("to the right of", "right of"), "above": ("above", "over"),
    "below": ("below", "under"), "inside": ("inside", "in"), "around": ("around", "surrounding"),
}  # fmt: skip
_CONVERSE = g.OPPOSITE | {"inside": "around"}
_COLOURED = {
    "plain": ("on a plain {0} background", "against solid {0}"),
    "gradient": ("on a background fading from {0} to {1}", "against {0} fading to {1}"),
    "cloudy": ("on a cloudy {0} background", "against {0} clouds"),
    "striped": ("on a striped {0} background", "against {0} stripes"),
    "dotted": ("on a dotted {0} background", "against {0} with dots"),
    "checkered": ("on a checkered {0} background", "against {0} checks"),
}
_KIND = {
    "plain": ("on a plain background", "against a plain backdrop"),
    "gradient": ("on a shaded background", "against fading colours"),
    "cloudy": ("on a cloudy background", "against clouds"),
    "striped": ("on a striped background", "against stripes"),
    "dotted": ("on a dotted background", "against dots"),
    "checkered": ("on a checkered background", "against checks"),
}
_FEW, _MANY = ("with a little confetti", "with some confetti"), ("strewn with confetti", "full of confetti")


def _place(position: str, form: int) -> str:
    if position == "centre":
        return ("in the centre", "in the middle")[form]
    if " " in position:
        return f"{('at', 'in')[form]} the {position}{('', ' corner')[form]}"
    if position in ("left", "right"):
        return (f"on the {position}", f"near the {position} edge")[form]
    return (f"at the {position}", f"near the {position} edge")[form]


def _noun(item: g.Item, form: int, *, size: bool = True, texture: bool = True) -> str:
    words = [_SIZE[item.size][form]] if size else []
    words += [_TEXTURE[item.texture][form]] if texture and item.texture != "plain" else []
    words += [item.colour, item.shape]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _ground(scene: g.Scene, form: int, *, colour: bool = False, confetti: bool = True) -> str:
    kind, colours = scene.background.kind, scene.background.colours
    phrase = _COLOURED[kind][form].format(*colours) if colour else _KIND[kind][form]
    if not scene.confetti or not confetti:
        return phrase
    return f"{phrase} {(_MANY if len(scene.confetti) >= g.MANY_CONFETTI else _FEW)[form]}"


def _subject(scene: g.Scene, form: int, *, converse: bool = False, **detail: bool) -> str:
    """Describes the items with their relation, or a single item with its position."""
    nouns = [_noun(item, form, **detail) for item in scene.items]
    if len(nouns) == 1:
        return f"{nouns[0]} {_place(scene.position, form)}"
    relation = scene.relation
    if converse:
        nouns[0], nouns[1], relation = nouns[1], nouns[0], _CONVERSE[relation]
    # With three items, long phrasings would exceed 26 words.
    text = f"{nouns[0]} {_RELATION[relation][1 if len(nouns) == 3 else form]} {nouns[1]}"
    return text if len(nouns) == 2 else f"{text}, with {nouns[2]},"


def describe(scene: g.Scene) -> tuple[str, str, str]:
    """Returns three captions: complete; complete in other words; without background colour, confetti and either sizes
    or textures.

    All are true of the scene, at most 26 words long, and a function of the scene only.
    """
    flips = [int(w >= 0.5) for w in scene.wording]
    forms, three = flips[:6], len(scene.items) == 3
    ground = [1, 1] if three else [forms[1], 1 - forms[1]]
    first = f"{_subject(scene, forms[0], converse=bool(flips[6]))} {_ground(scene, ground[0], colour=True)}"
    other = _subject(scene, 1 - forms[0], converse=not flips[6])
    back = _ground(scene, ground[1], colour=True)
    second = f"{back}, {other}".rstrip(",") if flips[7] else f"{other} {back}"
    detail = {"size": False} if flips[8] else {"texture": False}
    third = f"{_subject(scene, forms[2], converse=bool(flips[9]), **detail)} {_ground(scene, forms[3], confetti=False)}"
    return tuple(text[0].upper() + text[1:] + "." for text in (first, second, third))
