"""Error messages for incompatible initial weights: how checkpoint and run differ, and the flags that fix it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from icar_jax import pytree
from icar_jax.config import ConfigError
from icar_jax.models import variants
from icar_jax.models.clip import ClipArch
from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.token_router import ScorerArch

# _SIZES are set by the variant. MANNERS are read from the checkpoint: parameter shapes do not show them and no config field
# sets them.
_SIZES = ("width", "depth", "mlp_width", "embed_dim", "patch_size")
MANNERS = (
    "activation", "heads", "norm_eps", "head", "class_token", "patch_bias", "pre_norm", "causal", "proj_bias", "registers",
    "ffn", "projection", "projection_width", "exit_eps",
)  # fmt: skip
RESIDUAL = re.compile(r"vision/exits/\d+/residual/")


def refusal(start: str, lines: Iterable[str], hints: Iterable[str]) -> ConfigError:
    """Returns the error about `start` (config.train.init=PATH) that lists every difference in `lines`.

    Below them come the flags in `hints` that fix them.
    """
    listed = "\n  ".join(lines)
    fixes = "\n  ".join(dict.fromkeys(hint for hint in hints if hint))
    return ConfigError(
        f"{start} does not fit the model that the configuration describes:\n  {listed}"
        + (f"\nTo start from these weights:\n  {fixes}" if fixes else "")
    )


def _differing(tower: str, run: Any, saved: Any, names: Iterable[str]) -> list[str]:
    pairs = {name: (getattr(saved, name), getattr(run, name)) for name in names if hasattr(run, name)}
    return [f"{tower} {name}: {a!r} in the checkpoint, {b!r} in the run" for name, (a, b) in pairs.items() if a != b]


def size_differences(arch: ClipArch, saved: ClipArch) -> list[str]:
    """Returns one line for each size in which the towers, or the blocks that their heads read, differ."""
    heads = [("vision", arch.vision, saved.vision), ("text", arch.text, saved.text)]
    return _variant_differences(arch, saved) + [line for each in heads for line in _differing(*each, ("head_blocks",))]


def _variant_differences(arch: ClipArch, saved: ClipArch) -> list[str]:
    return _differing("vision", arch.vision, saved.vision, _SIZES) + _differing("text", arch.text, saved.text, _SIZES)


def manner_differences(arch: ClipArch, saved: ClipArch) -> list[str]:
    """Returns one line for each setting that shapes do not show, such as another activation or pooled token."""
    vision, text = (*MANNERS,), (*MANNERS, "pool")
    if set(arch.vision.exits) & set(saved.vision.exits):
        vision += ("pool",)
    if saved.text.pool == "end":
        text += ("end_id",)
    return _differing("vision", arch.vision, saved.vision, vision) + _differing("text", arch.text, saved.text, text)


def clip_hints(arch: ClipArch, saved: ClipArch, leaves: Mapping[str, Any], shapes: pytree.Tree) -> list[str]:
    """Returns the flags that make a run compatible with a CLIP whose parameters `leaves` do not match `shapes`."""
    hints = size_hints(arch, saved)
    if arch.text.vocabulary != saved.text.vocabulary or arch.text.end_id != saved.text.end_id:
        hints.append(
            f"the tokenizer has {arch.text.vocabulary} tokens, the checkpoint's had {saved.text.vocabulary}: leave "
            "config.data.tokenizer empty to use the checkpoint's tokenizer, or pass the file it was trained with"
        )
    if arch.text.context_length > saved.text.context_length:
        hints.append(f"--config.clip.context_length={saved.text.context_length} or less")
    wanted = pytree.flatten(shapes)
    extra = [name for name in leaves if name not in wanted]
    if any(RESIDUAL.match(name) for name in extra) and arch.vision.exit_head != saved.vision.exit_head:
        hints.append(f"--config.clip.exit_head={saved.vision.exit_head}")
    if saved.vision.exit_sum and (every := tuple(sorted({*saved.vision.exits, *arch.vision.exits}))) != arch.vision.exits:
        hints.append(f"--config.clip.exits={every}: its full depth sums the heads of all its exits")
    elif any(name.startswith("exit_logit_scale/") for name in extra):
        hints.append(f"--config.clip.temperature={saved.temperature}")
    if "logit_bias" in extra:
        hints.append("--config.loss.kind=sigmoid: it was trained with a logit bias")
    if arch.vision.pool != saved.vision.pool and set(arch.vision.exits) & set(saved.vision.exits):
        hints.append(f"--config.clip.pool={saved.vision.pool}")
    return hints


def size_hints(arch: ClipArch, saved: ClipArch) -> list[str]:
    """Returns the flags of the variant with the sizes of `saved`, and of heads that read as many blocks, where they differ."""
    hints = [clip_variant(saved)] if _variant_differences(arch, saved) else []
    for name, own, theirs in (("head_blocks", arch.vision, saved.vision), ("text_head_blocks", arch.text, saved.text)):
        if own.head_blocks != theirs.head_blocks:
            hints.append(f"--config.clip.{name}={theirs.head_blocks}")
    return hints


def clip_variant(saved: ClipArch) -> str:
    """Returns the flags of the variant with these sizes."""
    same = [n for n, a in variants.CLIP.items() if not [x for x in _variant_differences(a, saved) if " patch_size" not in x]]
    if not same:
        return "no variant of models/variants.py has its sizes; add one"
    exact = next((n for n in same if variants.CLIP[n].vision.patch_size == saved.vision.patch_size), None)
    patch = "" if exact else f" --config.clip.patch_size={saved.vision.patch_size}"
    return f"--config.clip.variant={exact or same[0]}{patch}"


def backbone_variant(saved: ConvNeXtArch) -> str:
    """Returns the flag of the variant with this backbone."""
    plain = dataclasses.replace(saved, num_classes=0)
    name = next((name for name, arch in variants.CONVNEXT.items() if arch == plain), None)
    return f"--config.complexity.variant={name}" if name else "no variant of models/variants.py has its sizes; add one"


def complexity_hints(arch: ScorerArch, saved: ScorerArch) -> list[str]:
    """Returns the flags that make a run compatible with the complexity model `saved`."""
    if not isinstance(saved, ComplexityArch):
        return ["the checkpoint is a head on the blocks of a CLIP; start from a ConvNeXt"]
    hints = [backbone_variant(saved.backbone)] if arch.backbone != saved.backbone else []
    return hints + ([f"--config.complexity.head={saved.head}"] if arch.head != saved.head else [])
