"""tokenizer.json and tokenizer_config.json as other libraries read them: with special tokens, and cleaning as rules."""

from __future__ import annotations

import html.entities
import json
import re
import string
from collections.abc import Iterator
from functools import cache
from typing import Any

from ftfy import chardata
from tokenizers import Regex, normalizers, processors

from icar_jax.data.tokenizer import PAD, Tokenizer
from icar_jax.models.text import TextArch

# Code points that text names by number, such as "&#39;": the marks of ASCII, spaces, dashes, quotes and dots.
_NUMBERED = (*map(ord, string.punctuation), 32, 160, 8211, 8212, 8216, 8217, 8220, 8221, 8230)
_ZERO_OR_ODD = r"[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"  # characters that ftfy removes


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json that cleans text and adds the start and end tokens, as other libraries expect of it.

    The cleaning is that of `data.cleaning.clean` except the repair of mojibake, which rules cannot express, and entities that
    are rare: ids are equal for decomposed accents, quotes, ligatures, full-width letters, and the entities of HTML 4.
    """
    content = json.loads(tokenizer.backend_json())
    if tokenizer.cleaning:
        steps = [*_repairs(), *_case(tokenizer.cleaning)]
        kept = [content["normalizer"]] if content.get("normalizer") else []
        content["normalizer"] = {"type": "Sequence", "normalizers": [*steps, *kept]}
    if tokenizer.start_id is not None and content.get("post_processor") is None:
        start, end = (tokenizer.token(i) for i in (tokenizer.start_id, tokenizer.end_id))
        template = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)]
        )
        content["post_processor"] = json.loads(template.__getstate__())
    return json.dumps(content, ensure_ascii=False)


def tokenizer_config(tokenizer: Tokenizer, text: TextArch) -> dict[str, Any]:
    """tokenizer_config.json for the plain class, which reads everything else from tokenizer.json."""
    pad = tokenizer.token(tokenizer.pad_id)
    end = tokenizer.token(tokenizer.end_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text.context_length,
        "eos_token": end,
        # CLIP pads with an ordinary token ('!'), which the library would then split from its word. The causal tower ignores
        # everything behind the first end token, so the end token can pad.
        "pad_token": end if tokenizer.start_id is not None and pad != PAD and not text.post_norm else pad,
    }
    if tokenizer.start_id is not None:
        config["bos_token"] = tokenizer.token(tokenizer.start_id)
    if text.post_norm:
        config |= {"cls_token": config["bos_token"], "sep_token": end}
    return config


def _case(cleaning: str) -> Iterator[dict[str, Any]]:
    if cleaning == "canonicalize":
        yield _rule(normalizers.Replace("_", " "))
        yield _rule(normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""))
    yield _rule(normalizers.Replace(Regex(r"\s+"), " "))
    yield _rule(normalizers.Strip())
    if cleaning != "whitespace":
        yield _rule(normalizers.Lowercase())


@cache
def _repairs() -> tuple[dict[str, Any], ...]:
    """Entities, which may be escaped twice, and the repairs of single characters."""
    made: list[normalizers.Normalizer] = 2 * [normalizers.Replace(Regex("&(?:amp;?|AMP;?|#0*38;?|#[xX]0*26;?)"), "&")]
    made += [normalizers.Replace(Regex(pattern), to) for pattern, to in _entities()]
    made += [normalizers.Replace(Regex(_ZERO_OR_ODD), "")]
    made += [normalizers.Replace(chr(c), to) for c, to in chardata.LIGATURES.items()]
    made += [normalizers.Replace(chr(c), to) for c, to in chardata.WIDTH_MAP.items()]
    made += [normalizers.Replace(Regex(chardata.SINGLE_QUOTE_RE.pattern), "'")]
    made += [normalizers.Replace(Regex(chardata.DOUBLE_QUOTE_RE.pattern), '"'), normalizers.NFC()]
    return tuple(_rule(step) for step in made)


def _entities() -> Iterator[tuple[str, str]]:
    """(pattern, text) of entities but the ampersand; longer names first, for they may begin with a shorter one."""
    open_ended = {name for name in html.entities.html5 if not name.endswith(";")}
    for name, code in sorted(html.entities.name2codepoint.items(), key=lambda item: -len(item[0])):
        if name != "amp":
            yield f"&{name};{'?' if name in open_ended else ''}", chr(code)
    for code in _NUMBERED:
        if code != ord("&"):
            yield f"&#(?:0*{code}(?!\\d)|[xX]0*(?i:{code:x})(?![0-9a-fA-F]));?", chr(code)


def _rule(step: normalizers.Normalizer) -> dict[str, Any]:
    return json.loads(step.__getstate__())
