"""Parts that exports of a CLIP share: refusals, the removal of early exits, and tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icar_jax import pytree
from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts.base import ExportSource
from icar_jax.convert.rules import Leaf, Rule
from icar_jax.convert.tokenizers.hf_json import tokenizer_config, tokenizer_json
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
    t = arch.text
    return {
        "its text projection has a bias": t.proj_bias,
        "its text tower is a BERT, with norms after the residuals": t.post_norm,
        f"its text tower has the projection {t.projection!r}": t.projection != "linear",
        **several_blocks(t),
        **beyond_image_tower(arch.vision),
    }


def several_blocks(text: TextArch) -> dict[str, bool]:
    """{difference from a text tower of other libraries, whose head reads one block: whether this tower has it}."""
    return {f"its text head reads the last {text.head_blocks} blocks (head_blocks)": text.head_blocks > 1}


def beyond_image_tower(v: VisionArch) -> dict[str, bool]:
    """{difference from CLIP's image tower: whether this one has it}."""
    return {
        "its image tower has an attention-pool head (SigLIP)": v.head == "map",
        "its image tower has no class token": not v.class_token,
        "its patch embedding has a bias": v.patch_bias,
        "its image tower has no norm before the blocks": not v.pre_norm,
        "its embeddings are sums over the heads of its exits (exit_sum)": v.exit_sum,
        **beyond_vit(v),
        f"its image tower pools {v.head!r}": v.head not in ("cls", "map"),
        f"its image tower has the projection {v.projection!r}": v.projection != "linear",
    }


def beyond_vit(vision: VisionArch) -> dict[str, bool]:
    """{difference from the blocks and tokens of a plain vision transformer: whether this tower has it}."""
    return {
        f"its image tower has {vision.registers} registers": vision.registers > 0,
        f"its image heads read the last {vision.head_blocks} blocks (head_blocks)": vision.head_blocks > 1,
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


def tokenizer_files(source: ExportSource, text: TextArch, config: bool = False) -> tuple[dict[str, Any], list[str]]:
    """({"tokenizer.json": text, with `config` also tokenizer_config.json}, no notes), or no file and a note without one."""
    if source.tokenizer is None:
        return {}, [NO_TOKENIZER]
    files: dict[str, Any] = {"tokenizer.json": tokenizer_json(source.tokenizer)}
    return files | ({"tokenizer_config.json": tokenizer_config(source.tokenizer, text)} if config else {}), []
