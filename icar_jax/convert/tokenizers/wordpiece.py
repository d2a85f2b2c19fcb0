"""Builds BERT's WordPiece tokenizer from a vocab.txt, as the tokenizer_config.json beside it says."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from icar_jax.convert.fields import ConvertError, Fields

_MAX_BYTES = 64 << 20  # published vocabularies have 1 MB
_SPECIAL = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip


def backend(file: Path, config: Fields) -> Backend:
    """The tokenizer of `file`, one token a line; `config` is the content of tokenizer_config.json, empty without one.

    Raises ConvertError for files that hold something else, and for settings that are not supported.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ConvertError(f"{file}: a vocabulary of more than {_MAX_BYTES:,} bytes is not one of BERT's")
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"cannot read {file} as a vocabulary, one token a line: {error}") from error
    tokens = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    ids = {token: i for i, token in enumerate(tokens)}
    special = {name: _token(config, name, usual) for name, usual in _SPECIAL.items()}
    lacking = [special[name] for name in ("unk_token", "sep_token", "pad_token", "cls_token") if special[name] not in ids]
    if lacking or len(ids) != len(tokens):
        wrong = f"it lacks {', '.join(lacking)}" if lacking else f"{len(tokens) - len(ids)} tokens occur twice"
        raise ConvertError(f"{file} is not a vocabulary of BERT, one token a line: {wrong}")
    if not config.get("do_basic_tokenize", bool, True) or config.content.get("never_split"):
        raise ConvertError(f"{config.where}: do_basic_tokenize=false and never_split are not supported; pass a tokenizer.json")
    made = Backend(models.WordPiece(ids, unk_token=special["unk_token"], max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", bool, True),
        strip_accents=config.get("strip_accents", bool),  # None: as for the lower case
        lowercase=config.get("do_lower_case", bool, True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special.values() if t in ids])
    return made


def _token(config: Fields, name: str, usual: str) -> str:
    """A special token, which the config gives as a text or as an object with `content`."""
    if isinstance(config.content.get(name), dict):
        return config.section(name).get("content", str, usual)
    return config.get(name, str, usual)
