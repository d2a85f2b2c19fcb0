"""The model card (README.md) of a checkpoint or an export: what it is, what it was made from, its exits and what each costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icar_jax import checkpoint
from icar_jax.convert.layouts.base import arch_of
from icar_jax.models import flops
from icar_jax.models.clip import ClipArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.reduction.routes import route_name
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch
from icar_jax.version import VERSION

FILE = "README.md"
PLACE = "OWNER/NAME"  # stands in a card until the repository is known
MARK = "Written by icar_jax"  # in every card
_KINDS = {
    "clip": "A CLIP: an image tower and a text tower with a common embedding space.",
    "vision": "An image tower.",
    "text": "A text tower.",
    "complexity": "A complexity model, which scores images between 0 and 1.",
    "convnext": "A ConvNeXt backbone.",
    "bundle": "A CLIP with early exits, a complexity model, and thresholds on its score that choose the exit of each image.",
}
# {layout: (library of the hub, how it is opened)}; a layout may be missing.
_LAYOUTS = {
    "icar_jax": ("icar_jax", 'import icar_jax\n\nmodel = icar_jax.load("{}")'),
    "hf": ("transformers", 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{}")'),
    "open_clip": (
        "open_clip", 'import open_clip\n\nmodel, train, transform = open_clip.create_model_and_transforms("hf-hub:{}")'
    ),
    "timm": ("timm", 'import timm\n\nmodel = timm.create_model("hf-hub:{}", pretrained=True)'),
    "openai": ("", 'import clip\n\nmodel, transform = clip.load("model.pt")'),
    "stablehlo": ("", 'from jax import export\n\nrun = export.deserialize(open("NAME.stablehlo", "rb").read())'),
}  # fmt: skip


def of_checkpoint(folder: Path, layout: str = "icar_jax", notes: Sequence[str] = ()) -> str:
    """The card of a checkpoint or bundle in `folder`, as it is or exported to `layout` with `notes`. Raises CheckpointError."""
    description = checkpoint.describe(folder)
    if description["kind"] != "bundle":
        return card({description["kind"]: description}, layout, notes)
    parts = {name: checkpoint.describe(folder / name) for name in ("clip", "complexity")}
    return card(parts, layout, notes, description.get("routing"))


def card(
    parts: Mapping[str, Mapping[str, Any]],
    layout: str,
    notes: Sequence[str] = (),
    routing: Mapping[str, Any] | None = None,
    keeps_exits: bool = True,
) -> str:
    """Markdown with the metadata of the hub first; `parts` are {kind: content of icar.json} of one model."""
    archs = {kind: arch_of(kind, about["arch"], f"{kind}: arch") for kind, about in parts.items()}
    library, opened = _LAYOUTS.get(layout, ("", ""))
    kind = "bundle" if len(parts) > 1 else next(iter(parts))
    lines = ["---", *_metadata(library, kind, parts), "---", "", f"# {PLACE}", "", _KINDS[kind]]
    form = "as a checkpoint" if layout == "icar_jax" else f"in the layout `{layout}` of `icar export`"
    lines += ["", f"{MARK} {VERSION} {form}.", "", "## Made from", ""]
    lines += [f"- {name}: {_origin(about.get('source', {}))}" for name, about in parts.items()]
    lines += [f"- {note}" for note in notes]
    lines += ["", "## Inputs and exits", "", *(f"- {line}" for line in _inputs(parts, archs, keeps_exits, routing))]
    lines += ["", "## Cost", "", "FLOPs are counted from the architecture: two for each multiply-add of matrix products and",
              "convolutions.", "", "| part | GFLOPs | of full depth |", "| --- | --- | --- |"]  # fmt: skip
    lines += [f"| {name} | {cost / 1e9:.4g} | {share} |" for name, cost, share in _costs(parts, archs, keeps_exits)]
    if opened:
        lines += ["", "## Use", "", "```python", *opened.format(PLACE).splitlines(), "```"]
    return "\n".join(lines) + "\n"


def _metadata(library: str, kind: str, parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if library:
        yield f"library_name: {library}"
    if kind in ("clip", "bundle"):
        yield "pipeline_tag: zero-shot-image-classification"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("icar_jax", kind))
    bases = sorted({name for about in parts.values() for name in _repositories(about.get("source", {}))})
    if bases:
        yield "base_model:"
        yield from (f"- {name}" for name in bases)


def _repositories(source: Mapping[str, Any]) -> Iterator[str]:
    if "repository" in source:
        yield source["repository"]
    for value in source.values():
        if isinstance(value, Mapping):
            yield from _repositories(value)


def _origin(source: Mapping[str, Any]) -> str:
    """What weights were made from, as `source` of icar.json states it."""
    if "joined" in source:
        return " and ".join(f"the {tower} tower of {_origin(about)}" for tower, about in source["joined"].items())
    if "repository" in source:
        place = f"[{source['repository']}](https://huggingface.co/{source['repository']}) at commit `{source['commit']}`"
    else:
        place = "weights"
    if "layout" in source:
        place = f"`{source.get('file', '')}` ({source['layout']}, SHA-256 `{source.get('sha256', '')}`) of {place}"
    if isinstance(source.get("adapter"), Mapping):
        place += f", with the adapter {_origin({'layout': 'LoRA', **source['adapter']})}"
    stated = [f"{name} {source[name]}" for name in ("model_name", "pretrained", "positions") if source.get(name)]
    return (place if place != "weights" or stated else "trained with icar_jax") + "".join(f"; {each}" for each in stated)


def _inputs(
    parts: Mapping[str, Mapping[str, Any]], archs: Mapping[str, Any], keeps_exits: bool, routing: Mapping[str, Any] | None
) -> Iterator[str]:
    for kind, about in parts.items():
        if pixels := about.get("preprocess"):
            size = pixels["image_size"]
            yield f"images ({kind}): {size} x {size} pixels, {pixels['resize_mode']}, {pixels['interpolation']}"
        arch = archs[kind]
        text = arch.text if isinstance(arch, ClipArch) else arch if isinstance(arch, TextArch) else None
        vision = _vision_of(arch)
        if text is not None:
            yield f"texts: {text.context_length} tokens; embeddings of {text.embed_dim} dimensions"
        if vision is not None:
            early = [route_name(exit) for exit in vision.all_exits[:-1]] if keeps_exits else []
            yield f"exits: {', '.join(f'after {name}' for name in early) or 'none before full depth'}; full depth is " + (
                f"{vision.depth} blocks"
            )
    if routing:
        levels = ", ".join(f"{value:.4g}" for value in routing["thresholds"])
        yield f"routing: exits {', '.join(map(str, routing['exits']))}; an image runs on where its complexity is above {levels}"


def _vision_of(arch: Any) -> VisionArch | None:
    return arch.vision if isinstance(arch, ClipArch) else arch if isinstance(arch, VisionArch) else None


def _costs(
    parts: Mapping[str, Mapping[str, Any]], archs: Mapping[str, Any], keeps_exits: bool
) -> Iterator[tuple[str, float, str]]:
    """(part, FLOPs of one image or caption, fraction of an image at full depth)."""
    full = next((flops.vision_flops(v) for arch in archs.values() if (v := _vision_of(arch)) is not None), 0)
    share = lambda cost: f"{cost / full:.1%}" if full else "-"
    for kind, arch in archs.items():
        vision = _vision_of(arch)
        if vision is not None:
            for exit in vision.all_exits if keeps_exits else vision.all_exits[-1:]:
                cost = flops.vision_flops(vision, exit)
                yield (
                    f"an image, {'full depth' if exit == vision.all_exits[-1] else f'exit after {route_name(exit)}'}",
                    cost,
                    share(cost),
                )
        if isinstance(arch, ClipArch | TextArch):
            yield "a text", flops.text_flops(arch.text if isinstance(arch, ClipArch) else arch), "-"
        if isinstance(arch, ConvNeXtArch):
            size = parts[kind]["preprocess"]["image_size"]
            yield "an image", flops.convnext_flops(dataclasses.replace(arch), size), "-"
        if kind == "complexity":
            cost = flops.router_flops(arch) if full else flops.complexity_flops(arch)
            yield "the complexity score of an image", cost, share(cost)
