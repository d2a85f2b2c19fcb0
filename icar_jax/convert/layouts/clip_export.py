"""Parts that exports of a CLIP share: refusals, the removal of early exits, and tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tokenizers import Regex, normalizers, processors

from icar_jax import pytree
from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts.base import ExportSource
from icar_jax.convert.rules import Leaf, Rule
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

HEAD_WIDTH = 64  # of every tower in OpenAI's code
NO_TOKENIZER = "the checkpoint holds no tokenizer, so none was written"


def refuse(layout: str, wrong: Mapping[str, bool]) -> None:
    """Raises ConvertError listing the keys of `wrong` whose value is true: reasons why `layout` cannot hold a model."""
    reasons = [what for what, is_wrong in wrong.items() if is_wrong]
    if reasons:
        raise ConvertError(f"the {layout} layout cannot hold this model: {'; '.join(reasons)}")


def beyond_clip(arch: ClipArch) -> dict[str, bool]:
    """{difference from the two towers of CLIP: whether this model has it}."""
    v, t = arch.vision, arch.text
    return {
        "its image tower has an attention-pool head (SigLIP)": v.head == "map",
        "its image tower has no class token": not v.class_token,
        "its patch embedding has a bias": v.patch_bias,
        "its image tower has no norm before the blocks": not v.pre_norm,
        "its text projection has a bias": t.proj_bias,
        "its embeddings are sums over the heads of its exits (exit_sum)": v.exit_sum,
        **beyond_vit(v),
        f"its image tower pools {v.head!r}": v.head not in ("cls", "map"),
        f"its image tower has the projection {v.projection!r}": v.projection != "linear",
    }


def beyond_vit(vision: VisionArch) -> dict[str, bool]:
    """{difference from the blocks and tokens of a plain vision transformer: whether this tower has it}."""
    return {
        f"its image tower has {vision.registers} registers": vision.registers > 0,
        f"its image tower has another feed-forward part ({vision.ffn})": vision.ffn != "mlp",
        **_reduces(vision),
    }


def beyond_tower(vision: VisionArch) -> dict[str, bool]:
    """{what was added to a bare tower: whether this one has it}."""
    return {
        f"it has early exits, after {', '.join(map(str, vision.exits))} blocks": bool(vision.exits),
        f"it has a projection ({vision.projection})": vision.projection != "none",
        **_reduces(vision),
    }


def _reduces(vision: VisionArch) -> dict[str, bool]:
    return {
        f"it merges patch tokens between blocks (merge={vision.merge})": any(vision.merge),
        f"it reduces tokens by {vision.reduce!r} (schedule {vision.schedule})": vision.reduce != "none",
    }


def pools_other_than_highest(text: TextArch) -> bool:
    """Whether the text tower pools another token than the highest id."""
    return text.pool == "last" or (text.pool == "end" and text.end_id != text.vocabulary - 1)


def weights_without_exits(source: ExportSource, rules: list[Rule]) -> tuple[dict[str, Leaf], list[str]]:
    """({source name: tensor} of everything but early exits, notes that name the exits left out)."""
    left_out = ("vision/exits/", "exit_logit_")
    flat = {path: array for path, array in pytree.flatten(source.params).items() if not path.startswith(left_out)}
    leaves = engine.export_weights(pytree.unflatten(flat), rules, source.where)
    if not source.arch.vision.exits:
        return leaves, []
    exits = ", ".join(map(str, source.arch.vision.exits))
    return leaves, [f"this layout holds no early exits: those after {exits} blocks were left out"]


def tokenizer_files(tokenizer: Tokenizer | None) -> tuple[dict[str, str], list[str]]:
    """({"tokenizer.json": text}, no notes), or (no file, a note) where the checkpoint has no tokenizer."""
    return ({}, [NO_TOKENIZER]) if tokenizer is None else ({"tokenizer.json": tokenizer_json(tokenizer)}, [])


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json that collapses whitespace and adds the start and end tokens, as other libraries expect of it.

    Such a file cannot express the other repairs of `data.tokenizer.clean` (mojibake, HTML entities).
    """
    content = json.loads(tokenizer.to_json())
    if tokenizer.start_id is None:
        return json.dumps(content, ensure_ascii=False)
    spaces = [json.loads(n.__getstate__()) for n in (normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip())]
    kept = [content["normalizer"]] if content.get("normalizer") else []
    content["normalizer"] = {"type": "Sequence", "normalizers": [*spaces, *kept]}
    if content.get("post_processor") is None:
        start, end = (tokenizer.token(i) for i in (tokenizer.start_id, tokenizer.end_id))
        template = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)]
        )
        content["post_processor"] = json.loads(template.__getstate__())
    return json.dumps(content, ensure_ascii=False)
