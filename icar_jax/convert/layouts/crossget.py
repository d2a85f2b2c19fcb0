"""CrossGET's CLIP checkpoints: OpenAI's names and a table of cross tokens in each tower.

The file does not hold how many tokens a block merges; the user says it.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts import open_clip
from icar_jax.convert.layouts.base import Details, Layout, Options, Source
from icar_jax.convert.layouts.clip_export import HEAD_WIDTH
from icar_jax.convert.rules import ROWS, Rule, dropped, rule
from icar_jax.models.clip import ClipArch
from icar_jax.models.reduced_text import PROTECTED
from icar_jax.models.reduction.schedule import constant

_TABLES = {"visual.transformer.cross_image": "vision/cross", "transformer.cross_text": "text/cross"}
_METHODS = ("crossget", "none")


def _arch(source: Source, options: Options) -> ClipArch:
    """The CLIP of the names, with cross tokens and the schedules that `options` name. Raises ConvertError without them."""
    if options.reduce not in _METHODS:
        raise ConvertError(
            f"{source.path} holds CrossGET's cross tokens; pass --reduce crossget, or --reduce none for its towers without "
            f"token reduction; found {options.reduce!r}"
        )
    plain = open_clip.open_clip_arch(source, options, activation="quick_gelu", head_width=HEAD_WIDTH)
    if options.reduce == "none":
        if options.image_r >= 0 or options.text_r >= 0:
            raise ConvertError(f"{source.path}: --reduce none merges no tokens; leave out --image-r and --text-r")
        return plain
    if options.image_r < 0 or options.text_r < 0:
        raise ConvertError(
            f"{source.path} does not hold how many tokens each block merges; pass both, as in its training: --image-r 16 "
            "--text-r 6, 0 for a tower that merges none"
        )
    vision, text = (dataclasses.replace(tower, reduce="crossget") for tower in (plain.vision, plain.text))
    of_image = constant(options.image_r, vision.depth, vision.tokens + 1, vision.protected + 1)
    of_text = constant(options.text_r, text.depth, text.tokens, PROTECTED)
    vision, text = dataclasses.replace(vision, schedule=of_image), dataclasses.replace(text, schedule=of_text)
    return dataclasses.replace(plain, vision=vision, text=text)


def _rules(source: Source, arch: ClipArch | None) -> list[Rule]:
    plain = arch is not None and not arch.vision.has_cross
    tables = [dropped(name, "cross tokens") if plain else rule(name, target, ROWS) for name, target in _TABLES.items()]
    return [*open_clip.open_clip_rules(open_clip.text_prefix(source)), *tables]


def _details(source: Source, options: Options) -> Details:
    if options.reduce == "none":
        return Details(notes=["the cross tokens were left out (--reduce none)"])
    return Details(origin={"image_r": options.image_r, "text_r": options.text_r})


LAYOUT = Layout(
    name="crossget",
    kind="clip",
    detect=lambda source: source.has(*_TABLES),
    arch=_arch,
    rules=_rules,
    preprocess=partial(open_clip.preprocess, preset="openai"),
    details=_details,
    options=frozenset({"preprocess", "exits", "pool", "tokenizer", "reduce", "image_r", "text_r"}),
    precedence=3,
)
