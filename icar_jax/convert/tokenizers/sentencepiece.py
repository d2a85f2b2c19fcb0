"""Reads SentencePiece models (spiece.model, sentencepiece.bpe.model, tokenizer.model) as tokenizers of `tokenizers`.

Such a file is a protocol buffer: pieces with scores, how it was trained, and how text is normalised. Numbers and limits are
checked as they are read; nothing but the fields below is interpreted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from icar_jax.convert.fields import ConvertError

_MAX_BYTES, _MAX_PIECES = 64 << 20, 2_000_000  # the largest published models are 5 MB with 256,000 pieces
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of pieces
_UNIGRAM, _BPE = 1, 2  # types of models
_SPACE = "\u2581"  # stands for a space in a piece
_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")  # XLM-R's first ids; the file's own first three are dropped


@dataclass(frozen=True)
class Model:
    """The content of a SentencePiece file that decides how text is split."""

    pieces: list[tuple[str, float, int]]  # (text, score, type)
    kind: int  # _UNIGRAM or _BPE
    charsmap: bytes  # precompiled normalisation; empty for the identity
    dummy_prefix: bool  # whether a space is put before the text
    trims: bool  # whether spaces around the text and repeated ones are removed
    byte_fallback: bool  # whether unknown characters become bytes


def read(file: Path) -> Model:
    """The content of a SentencePiece file. Raises ConvertError, naming the file, for anything else."""
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise ConvertError(f"{file}: {size:,} bytes are more than a SentencePiece model has ({_MAX_BYTES:,} at most)")
        data = file.read_bytes()
    except OSError as error:
        raise ConvertError(f"cannot read {file}: {error}") from error
    try:
        return _model(data)
    except (ValueError, IndexError, struct.error) as error:
        raise ConvertError(f"{file} is not a SentencePiece model, or damaged: {error}") from error


def _model(data: bytes) -> Model:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            if len(pieces) == _MAX_PIECES:
                raise ValueError(f"more than {_MAX_PIECES:,} pieces")
            pieces.append(_piece(dict(_fields(value))))
        elif number in (2, 3) and isinstance(value, bytes):
            (trainer if number == 2 else normalizer).update(_fields(value))
    kind, charsmap = trainer.get(3, _UNIGRAM), normalizer.get(2, b"")
    if not pieces or not isinstance(charsmap, bytes):
        raise ValueError("it has no pieces" if not pieces else "its normalisation is no map")
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(f"models of type {kind!r} are not supported; expected 1 (unigram) or 2 (BPE)")
    if trainer.get(24):
        raise ValueError("whitespace as a suffix (treat_whitespace_as_suffix) is not supported")
    byte_fallback = any(kind == _BYTE for _, _, kind in pieces)
    return Model(pieces, int(kind), charsmap, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)), byte_fallback)


def _piece(fields: dict[int, int | bytes]) -> tuple[str, float, int]:
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, _NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
        raise ValueError("a piece has fields of another type")
    return text.decode("utf-8"), struct.unpack("<f", score)[0], kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: an integer, or bytes. Raises ValueError where it ends too early."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes begins {len(data) - at} bytes before the end")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def backend(file: Path, fairseq: bool = False, extra: tuple[str, ...] = ()) -> Backend:
    """The tokenizer that a SentencePiece file describes.

    `fairseq` shifts the ids as XLM-R has them: <s>, <pad>, </s>, <unk>, the file's pieces from the fourth on, <mask>. `extra`
    are tokens added at the end. Raises ConvertError for files that are damaged or describe what is not supported.
    """
    model = read(file)
    pieces = [(text, score, kind) for text, score, kind in model.pieces]
    if fairseq:
        pieces = [(text, 0.0, _CONTROL) for text in _FAIRSEQ] + pieces[3:]
        pieces[3] = ("<unk>", 0.0, _UNKNOWN)
        extra = (*extra, "<mask>")
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    if unknown is None:
        raise ConvertError(f"{file}: the model has no piece for unknown characters")
    texts = [text for text, _, _ in pieces]
    if len(set(texts)) != len(texts):
        raise ConvertError(f"{file}: {len(texts) - len(set(texts))} pieces occur twice")
    try:
        if model.kind == _UNIGRAM:
            made = Backend(models.Unigram([(t, s) for t, s, _ in pieces], unk_id=unknown, byte_fallback=model.byte_fallback))
        else:
            made = Backend(models.BPE(
                vocab={text: i for i, text in enumerate(texts)}, merges=_merges(pieces), unk_token=texts[unknown],
                fuse_unk=True, byte_fallback=model.byte_fallback,
            ))  # fmt: skip
        if steps := _normalizers(model):
            made.normalizer = normalizers.Sequence(steps)
            made.normalizer.normalize_str("the dog \u00e9 \ufb01 \U0001f600")  # a damaged map panics when it is used
    except BaseException as error:  # the library raises bare Exception, and panics, which are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConvertError(f"{file}: {error}") from error
    scheme = "always" if model.dummy_prefix else "never"
    spaces = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=model.kind == _UNIGRAM)
    # Repeated spaces disappear with the empty words between them.
    words = pre_tokenizers.Split(" ", "removed")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, spaces]) if model.trims else spaces
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [text for text, _, kind in pieces if kind in (_CONTROL, _UNKNOWN)]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    made.add_tokens([AddedToken(text, normalized=False) for text, _, kind in pieces if kind == _USER_DEFINED])
    made.add_special_tokens([AddedToken(text, special=True, normalized=False, lstrip=text == "<mask>") for text in extra])
    return made


def _normalizers(model: Model) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.trims:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The merges of a BPE model, best first: every way to make a piece of two others."""
    ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in (_NORMAL, _USER_DEFINED, _UNUSED)}
    found = []
    for text, score, kind in pieces:
        if kind == _NORMAL:
            halves = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
            found += [(-score, ids[a], ids[b], a, b) for a, b in sorted(halves, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    return [(a, b) for _, _, _, a, b in sorted(found, key=lambda merge: merge[0])]


CANONICAL = [  # SigLIP's own cleaning of text: lower case, no punctuation, single spaces
    normalizers.Lowercase(),
    normalizers.Replace(Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"), ""),
    normalizers.Replace(Regex(r"\s+"), " "),
    normalizers.Strip(),
]
