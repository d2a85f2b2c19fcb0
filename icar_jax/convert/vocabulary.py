"""Finds and checks the tokenizer of converted weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from icar_jax.convert.fields import ConvertError, read_json
from icar_jax.convert.layouts.base import Source
from icar_jax.convert.layouts.open_clip import model_config
from icar_jax.data.tokenizer import CLIP_VOCAB_SIZE, Tokenizer
from icar_jax.models.text import TextArch

MERGES = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's merges in OpenAI's and OpenCLIP's packages
_BESIDE = ("tokenizer.json", "merges.txt", MERGES, MERGES.removesuffix(".gz"))


def find_tokenizer(source: Source, asked: str, text: TextArch) -> tuple[Tokenizer | None, str]:
    """(the tokenizer, its origin), or (None, a warning) where there is none.

    The user's file (`asked`) has priority, then a file beside the weights, then the merges of an installed open_clip_torch.
    Raises ConvertError where the user's file or the one beside the weights does not fit the text tower.
    """
    if asked:
        return open_tokenizer(Path(asked), text), asked
    for name in _BESIDE:
        if (source.folder / name).is_file():
            return open_tokenizer(source.folder / name, text), name
    own_words = model_config(source).section("text_cfg").get("hf_tokenizer_name", str)
    merges = _installed_merges()
    if merges and text.vocabulary == CLIP_VOCAB_SIZE and text.pool != "last" and not own_words:
        return open_tokenizer(merges, text), "the merges of the installed open_clip_torch"
    return None, (
        "no tokenizer was found beside the weights, so this checkpoint cannot encode text yet; add one with "
        "`icar convert CHECKPOINT CHECKPOINT --tokenizer FILE` (CLIP's tokenizer.json or bpe_simple_vocab_16e6.txt.gz)"
    )


def open_tokenizer(file: Path, text: TextArch) -> Tokenizer:
    """The tokenizer in `file`. Raises ConvertError where it cannot be read or does not fit the text tower."""
    try:
        tokenizer = Tokenizer.from_file(file, _pad_token(file))
    except (OSError, ValueError) as error:
        raise ConvertError(str(error)) from error
    siglip = tokenizer.start_id is None
    if siglip != (text.pool == "last"):
        has, needs = ("no", "one") if siglip else ("a", "none")
        raise ConvertError(f"{file} is not this model's tokenizer: it has {has} start token, the text tower expects {needs}")
    # The embeddings of SigLIP and of text encoders may have more rows than there are tokens.
    fits = tokenizer.vocab_size <= text.vocabulary if siglip or text.post_norm else tokenizer.vocab_size == text.vocabulary
    if not fits:
        raise ConvertError(
            f"{file} is not this model's tokenizer: it has {tokenizer.vocab_size} tokens, the text tower {text.vocabulary}"
        )
    if text.pad_id >= 0 and tokenizer.pad_id != text.pad_id:
        raise ConvertError(f"{file} pads with token {tokenizer.pad_id}, the text tower masks token {text.pad_id}")
    if text.pool == "end" and tokenizer.end_id != text.end_id:
        raise ConvertError(f"{file} ends a text with token {tokenizer.end_id}, the text tower pools token {text.end_id}")
    return tokenizer


def _pad_token(file: Path) -> str:
    """The pad token in the tokenizer_config.json beside a tokenizer, or ''; the tokenizer.json of a SigLIP may lack it."""
    config = file.with_name("tokenizer_config.json")
    token = read_json(config).get("pad_token") if config.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _installed_merges() -> Path | None:
    spec = importlib.util.find_spec("open_clip")
    file = Path(spec.origin).parent / MERGES if spec and spec.origin else None
    return file if file and file.is_file() else None
