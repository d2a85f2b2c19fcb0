"""Tokenizers based on the `tokenizers` library: CLIP's vocabulary, one trained on the captions, SigLIP's, or a text encoder's.

CLIP and trained tokenizers clean text as OpenAI's CLIP does and encode a caption as [start, tokens..., end, pad...]. The end
token has the highest id in both vocabularies, so the first end token and the argmax of the ids are the same position. SigLIP's
has no start token ([tokens..., end, pad...]). Those of BERT, RoBERTa and their kin have one ([CLS] or <s>). Both kinds clean
text by the rules in their own files alone, unless a `cleaning` is given, as OpenCLIP does with them.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Backend

from icar_jax.data.cleaning import CLEANINGS, clean
from icar_jax.errors import DataError, require_list
from icar_jax.files import limits
from icar_jax.files.opening import read_regular

CLIP_CONTEXT_LENGTH = 77
CLIP_VOCAB_SIZE = 49408
CLIP_END_ID = CLIP_VOCAB_SIZE - 1
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
# Names of (start, end) that published CLIP vocabularies use.
_SPECIAL_PAIRS = ((START, END), ("<start_of_text>", "<end_of_text>"))
# (start, end, pad) of text encoders: WordPiece of BERT; byte-level BPE and SentencePiece of RoBERTa and XLM-R.
_ENCODERS = (("[CLS]", "[SEP]", "[PAD]"), ("<s>", "</s>", "<pad>"))
_SIGLIP = {"</s>": "</s>", "<eos>": "<pad>"}  # end token -> pad token of SigLIP and of SigLIP 2
_CLIP_WORDS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)"""
_CLIP_MERGES = CLIP_VOCAB_SIZE - 2 * 256 - 2
_MIN_TRAINED_VOCAB = 256 + 3
# How a JSON text begins whose tokenizer cleans otherwise than its vocabulary says; the rest is a tokenizer.json.
_CLEANING = re.compile(r'\{"cleaning": "(\w*)", ')


class Tokenizer:
    """Encodes captions as int32 ids.

    Attributes:
        start_id, end_id: special tokens around every caption; start_id is None for SigLIP.
        pad_id: padding. In CLIP's vocabulary it is 0, also an ordinary token ('!'), and in SigLIP's (version 1) it is the end
            token, so find a caption's length by its first end token, never by the padding.
        vocab_size: number of ids, special tokens included.
        cleaning: of a text before the rules of the vocabulary apply; see `data.cleaning.clean`.
    """

    def __init__(self, backend: _Backend, where: str = "tokenizer", cleaning: str | None = None):
        """Wraps a `tokenizers.Tokenizer`; prefer `from_file`, `from_json` and `train`.

        `cleaning` None: 'lower' for vocabularies of CLIP and those trained here, none for others.

        Raises:
            ValueError: the vocabulary has no known start and end token.
        """
        if cleaning is not None and cleaning not in CLEANINGS:
            raise DataError(f"{where}: cleaning {cleaning!r} must be one of {CLEANINGS}")
        padding = backend.padding
        backend.no_truncation()
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._backend = backend
        self._usual = self.cleaning = "lower"
        self.start_id: int | None = None
        for start, end in _SPECIAL_PAIRS:
            if backend.token_to_id(start) is not None and backend.token_to_id(end) is not None:
                self.start_id, self.end_id = backend.token_to_id(start), backend.token_to_id(end)
                break
        else:
            self._usual = self.cleaning = ""
            if not self._open_encoder():
                self._open_siglip(padding, where)
        if cleaning is not None:
            self.cleaning = cleaning
        if self._usual != "lower":
            return
        backend.no_padding()
        pad_id = backend.token_to_id(PAD)
        self.pad_id = 0 if pad_id is None else pad_id
        if self.end_id != self.vocab_size - 1:
            raise DataError(
                f"{where}: the end token has id {self.end_id}, expected the highest id, {self.vocab_size - 1}, because"
                " pooling finds the end token by the argmax of the ids. Remove tokens that were added after it."
            )

    def _open_encoder(self) -> bool:
        """Whether this is the vocabulary of a text encoder; sets its special tokens."""
        for names in _ENCODERS:
            ids = [self._backend.token_to_id(name) for name in names]
            if None not in ids:
                self.start_id, self.end_id, self.pad_id = ids
                self._backend.no_padding()
                return True
        return False

    def _open_siglip(self, padding: dict | None, where: str) -> None:
        backend = self._backend
        end = next((t for t in _SIGLIP if backend.token_to_id(t) is not None), None)
        pad = padding["pad_token"] if padding else _SIGLIP.get(end)
        if end is None or backend.token_to_id(pad) is None:
            found = sorted(str(token.content) for token in backend.get_added_tokens_decoder().values())
            raise DataError(
                f"{where}: neither a CLIP nor a SigLIP vocabulary; expected one of the pairs {_SPECIAL_PAIRS}, or one of"
                f" {tuple(_SIGLIP)}; found the special tokens {found}. Use a tokenizer of CLIP or SigLIP, or one trained by"
                " this package."
            )
        self.end_id, self.pad_id = backend.token_to_id(end), backend.token_to_id(pad)
        # Stored in the JSON, so that `from_json` finds the pad token; the length is set when texts are encoded.
        backend.enable_padding(pad_id=self.pad_id, pad_token=pad, length=1)

    @classmethod
    def from_file(cls, path: str | Path, pad_token: str = "", cleaning: str | None = None) -> Tokenizer:
        """Reads a `tokenizer.json`, or CLIP's merges file (`bpe_simple_vocab_16e6.txt`, optionally gzipped).

        pad_token: for a SigLIP tokenizer.json that does not name its pad token.
        cleaning: as of the class; None is what the file says, or the vocabulary.

        Raises:
            FileNotFoundError, ValueError: with the path, what was expected and what was found.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"tokenizer file {path} not found; pass CLIP's tokenizer.json or bpe_simple_vocab_16e6.txt.gz"
            )
        most = limits.TOKENIZER_BYTES
        try:
            data = read_regular(path, most)
            if data[:2] == b"\x1f\x8b":
                with gzip.open(io.BytesIO(data)) as stream:
                    data = stream.read(most + 1)
            if len(data) > most:
                raise DataError(f"tokenizer file {path}: unpacks to more than the limit of {most:,} bytes")
            text = data.decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise DataError(f"tokenizer file {path}: not readable as (gzipped) UTF-8 text: {error}") from error
        if text.lstrip().startswith("{"):
            return cls.from_json(text, f"tokenizer file {path}", pad_token, cleaning)
        return cls(_clip_backend(text, str(path)), f"tokenizer file {path}", cleaning)

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer JSON", pad_token: str = "", cleaning: str | None = None) -> Tokenizer:
        """Restores a tokenizer from `to_json` exactly; the text has the layout of a Hugging Face tokenizer.json."""
        if own := _CLEANING.match(text):
            cleaning, text = own[1] if cleaning is None else cleaning, "{" + text[own.end() :]
        try:
            backend = _Backend.from_str(text)
            if backend.padding is None and backend.token_to_id(pad_token) is not None:
                backend.enable_padding(pad_id=backend.token_to_id(pad_token), pad_token=pad_token)
            return cls(backend, where, cleaning)
        except ValueError:
            raise
        except BaseException as error:
            # The library raises bare Exception on malformed JSON, and a panic, which is none, for impossible numbers in it.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{where}: not a tokenizer.json of the tokenizers library: {error}") from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
        """Trains a byte-level BPE on cleaned captions; pad is id 0, start and end are the two highest ids.

        Every byte is in the vocabulary, so any text can be encoded. A small corpus may yield fewer than `vocab_size`
        tokens, so size the embedding by `.vocab_size`.

        Raises:
            ValueError: `vocab_size` below 259 (256 bytes and 3 special tokens), or no captions.
        """
        if vocab_size < _MIN_TRAINED_VOCAB:
            raise DataError(f"vocab_size must be at least {_MIN_TRAINED_VOCAB} (256 bytes, 3 special tokens), got {vocab_size}")
        require_list("captions", captions)
        cleaned = [clean(_check_text(caption, i)) for i, caption in enumerate(captions)]
        if not any(cleaned):
            raise DataError("cannot train a tokenizer: no non-empty captions were given")
        backend = _Backend(models.BPE())
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=min_frequency,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[PAD],
            show_progress=False,
        )
        backend.train_from_iterator(cleaned, trainer)
        backend.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
        tokenizer = cls(backend, where="trained tokenizer")
        if tokenizer.vocab_size < vocab_size:
            logging.info("The captions yield %d tokens, fewer than the requested %d.", tokenizer.vocab_size, vocab_size)
        return tokenizer

    def encode(self, texts: str | Sequence[str], context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts as token ids, and reports which were truncated.

        Text that spells a special token is encoded as that token, as in CLIP.

        Returns:
            ids int32 [N, L] and truncated bool [N]. A text that is too long keeps its first tokens, with the end
            token in the last position. An empty text is [start, end].

        Raises:
            TypeError: an element that is not a string. ValueError: context_length below 2.
        """
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 (start and end token), got {context_length}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        texts = [_check_text(text, i) for i, text in enumerate(texts)]
        start = [] if self.start_id is None else [self.start_id]
        room = context_length - len(start) - 1
        ids = np.full((len(texts), context_length), self.pad_id, np.int32)
        truncated = np.zeros(len(texts), bool)
        for row, body in enumerate(self._bodies(texts)):
            truncated[row] = len(body) > room
            tokens = [*start, *body[:room], self.end_id]
            ids[row, : len(tokens)] = tokens
        return ids, truncated

    def _bodies(self, texts: list[str]) -> list[list[int]]:
        """Returns token ids of each text without special tokens and padding."""
        if self.cleaning:
            texts = [clean(text, self.cleaning) for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        if self.start_id is not None:
            return [encoding.ids for encoding in encodings]
        # SigLIP's tokenizer pads to at least one position.
        return [[i for i, keep in zip(e.ids, e.attention_mask) if keep] for e in encodings]

    def __call__(self, texts: str | Sequence[str], context_length: int) -> np.ndarray:
        """Returns token ids int32 [N, L]; see `encode`, which also reports which texts were truncated."""
        return self.encode(texts, context_length)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of one row of ids without special tokens and padding; this is the cleaned text."""
        ids = [int(i) for i in ids]
        begin = ids.index(self.start_id) + 1 if self.start_id is not None and self.start_id in ids else 0
        stop = ids.index(self.end_id) if self.end_id in ids else len(ids)
        return self._backend.decode(ids[begin:stop], skip_special_tokens=True).strip()

    def same_ids(self, other: Tokenizer) -> bool:
        """Returns whether both map the same tokens to the same ids, regardless of the names of start and end tokens."""
        special = [(t.start_id, t.end_id, t.pad_id) for t in (self, other)]
        words = [
            {i: token for token, i in t._backend.get_vocab(with_added_tokens=True).items() if i not in (t.start_id, t.end_id)}
            for t in (self, other)
        ]
        return special[0] == special[1] and words[0] == words[1] and self.cleaning == other.cleaning

    def token(self, id: int) -> str:
        """Returns the token with this id, as spelled in the vocabulary."""
        return self._backend.id_to_token(id)

    def to_json(self) -> str:
        """Returns the complete tokenizer as JSON text; `from_json` restores it exactly.

        It is a Hugging Face tokenizer.json, with a field `cleaning` first where that is not the vocabulary's usual one.
        """
        text = self.backend_json()
        return text if self.cleaning == self._usual else f'{{"cleaning": "{self.cleaning}", {text[1:]}'

    def backend_json(self) -> str:
        """Returns the tokenizer without its cleaning as a Hugging Face tokenizer.json."""
        return self._backend.to_str()

    def save(self, path: str | Path) -> None:
        """Writes `to_json` to a file that `from_file` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def _check_text(text: object, position: int) -> str:
    if not isinstance(text, str):
        raise TypeError(f"captions must be strings; number {position} is {type(text).__name__}: {text!r:.80}")
    return text


def _byte_characters() -> list[str]:
    """Returns the printable character that represents each byte, in the order of CLIP's (and GPT-2's) vocabulary.

    Printable bytes represent themselves and come first; the others follow as characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(b) for b in printable] + [chr(0x100 + n) for n in range(others)]


def _clip_backend(text: str, where: str) -> _Backend:
    """Builds CLIP's BPE from its merges file: a header, then one merge per line; the first 48,894 are used."""
    lines = text.split("\n")
    if not lines[0].startswith(("#version", '"bpe_simple_vocab')):
        raise DataError(
            f"tokenizer file {where}: neither a tokenizer.json nor a CLIP merges file; a merges file starts with a"
            f" header line such as '#version: 0.2', found {lines[0]!r:.80}"
        )
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines[1 : _CLIP_MERGES + 1], start=2):
        pair = tuple(line.split())
        if not pair and number >= len(lines):
            break  # the newline at the end of the file
        if len(pair) != 2:
            raise DataError(f"tokenizer file {where}, line {number}: expected two symbols to merge, found {line!r:.80}")
        merges.append(pair)
    characters = _byte_characters()
    tokens = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise DataError(f"tokenizer file {where}: {len(tokens) - len(vocabulary)} merges produce a token that already exists")
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="")
    except Exception as error:  # the library raises bare Exception for a merge of unknown symbols
        raise DataError(f"tokenizer file {where}: inconsistent merges: {error}") from error
    if not any(second.endswith("</w>") for _, second in merges):
        raise DataError(
            f"tokenizer file {where}: no merge ends a word (</w>), so these are not CLIP's merges but another model's, such as"
            " GPT-2's; pass CLIP's bpe_simple_vocab_16e6.txt.gz or its tokenizer.json"
        )
    backend = _Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    backend.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return backend
