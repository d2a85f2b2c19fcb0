"""Finds and checks the tokenizer of converted weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend

from icar_jax.convert.fields import ConvertError, Fields, read_json
from icar_jax.convert.layouts.base import Source
from icar_jax.convert.layouts.open_clip import model_config
from icar_jax.convert.tokenizers import sentencepiece, wordpiece
from icar_jax.data.cleaning import CLEANINGS
from icar_jax.data.tokenizer import CLIP_VOCAB_SIZE, Tokenizer
from icar_jax.models.text import TextArch

MERGES = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's merges in OpenAI's and OpenCLIP's packages
VOCABULARY, PIECES = "vocab.txt", ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
# Files of tokenizers; in a folder the first is taken.
BESIDE = ("tokenizer.json", "merges.txt", MERGES, MERGES.removesuffix(".gz"), VOCABULARY, *PIECES)
_CONFIG, _SENTENCE, _ADDED = TOKENIZER_CONFIGS = "tokenizer_config.json", "sentence_bert_config.json", "added_tokens.json"
# Arguments of OpenCLIP's tokenizers with the values under which ours gives the same ids; None: any.
_OPEN_CLIP_ARGUMENTS: dict[str, tuple | None] = {
    "clean": ("lower", "whitespace", "canonicalize"), "context_length": None, "cache_dir": None, "strip_sep_token": (False,),
    "language": (None,), "reduction_mask": ("", None), "additional_special_tokens": (None, []),
}  # fmt: skip


def find_tokenizer(source: Source, asked: str, text: TextArch) -> tuple[Tokenizer | None, str]:
    """(the tokenizer, its origin), or (None, a warning) where there is none.

    The user's file or folder (`asked`) has priority, then a file beside the weights, then the merges of an installed
    open_clip_torch. Raises ConvertError where the user's file or the one beside the weights does not fit the text tower, and
    for text that the source prepares in a way that is not supported.
    """
    cleaning = stated_cleaning(source)
    if asked:
        return open_tokenizer(Path(asked), text, cleaning), asked
    if file := _in_folder(source.folder):
        return open_tokenizer(file, text, cleaning), file.name
    named = model_config(source).section("text_cfg").get("hf_tokenizer_name", str)
    merges = _installed_merges()
    if merges and text.vocabulary == CLIP_VOCAB_SIZE and text.pool != "last" and not named:
        return open_tokenizer(merges, text, cleaning), "the merges of the installed open_clip_torch"
    what = f"the files of {named}, its tokenizer" if named else "CLIP's tokenizer.json or bpe_simple_vocab_16e6.txt.gz"
    if text.post_norm and not named:
        what = "its tokenizer.json, vocab.txt or sentencepiece.bpe.model"
    return None, (
        "no tokenizer was found beside the weights, so this checkpoint cannot encode text yet; add one with "
        f"`icar convert CHECKPOINT CHECKPOINT --tokenizer FILE` ({what})"
    )


def open_tokenizer(file: Path, text: TextArch, cleaning: str | None = None) -> Tokenizer:
    """The tokenizer in `file`, or in the folder of that name.

    `cleaning` None is what the file says, or the vocabulary. Raises ConvertError where it cannot be read or does not fit the
    text tower.
    """
    if file.is_dir():
        found = _in_folder(file)
        if found is None:
            raise ConvertError(f"{file} holds no tokenizer; expected one of {', '.join(BESIDE)}")
        file = found
    try:
        tokenizer = _opened(file, text, cleaning)
    except (OSError, ValueError) as error:
        raise ConvertError(str(error)) from error
    _require_fitting(tokenizer, file, text)
    return tokenizer


def stated_cleaning(source: Source) -> str | None:
    """How OpenCLIP cleans the model's text; None without its config. Raises ConvertError for what is not supported."""
    text = model_config(source).section("text_cfg")
    if not text:
        return None
    given = text.section("tokenizer_kwargs").content
    fits = lambda name, value: (known := _OPEN_CLIP_ARGUMENTS.get(name, ())) is None or value in known
    wrong = [f"tokenizer_kwargs.{name}={value!r}" for name, value in given.items() if not fits(name, value)]
    if text.get("tokenizer_mode", str, ""):
        wrong.append(f"tokenizer_mode={text.content['tokenizer_mode']!r}")
    if wrong:
        raise ConvertError(f"{text.where} prepares text in a way that is not supported: {', '.join(wrong)}")
    cleaning = given.get("clean", "whitespace" if text.get("hf_tokenizer_name", str) else "lower")
    assert cleaning in CLEANINGS
    return cleaning


def _in_folder(folder: Path) -> Path | None:
    return next((folder / name for name in BESIDE if (folder / name).is_file()), None)


def _opened(file: Path, text: TextArch, cleaning: str | None) -> Tokenizer:
    config = _config(file)
    if file.suffix == ".model":
        if not file.is_file():
            raise ConvertError(f"tokenizer file {file} not found")
        return Tokenizer(_pieces(file, text, config), f"tokenizer file {file}", cleaning)
    if file.name == VOCABULARY and file.is_file():
        backend = wordpiece.backend(file, config)
        _add_tokens(backend, file)
        return Tokenizer(_lower_first(backend, file, text), f"tokenizer file {file}", cleaning)
    tokenizer = Tokenizer.from_file(file, _token(config, "pad_token"), cleaning)
    if text.pool != "last" and not _sentence_lowers(file):
        return tokenizer
    backend = Backend.from_str(tokenizer.backend_json())
    lowered = _lower_first(backend, file, text)
    return Tokenizer(lowered, f"tokenizer file {file}", cleaning) if lowered is not backend else tokenizer


def _pieces(file: Path, text: TextArch, config: Fields) -> Backend:
    """The tokenizer of a SentencePiece file, with the ids that the text tower's kind of model has."""
    if text.post_norm:  # XLM-R
        backend = sentencepiece.backend(file, fairseq=True)
        _add_tokens(backend, file)
        return backend
    if text.pool != "last":
        raise ConvertError(f"{file} is a SentencePiece model, which CLIP's text towers do not read; pass CLIP's tokenizer.json")
    backend = sentencepiece.backend(file)
    if _is_gemma(backend):
        return _lower_first(backend, file, text)
    if not config.get("do_lower_case", bool, True):
        raise ConvertError(f"{config.where}: do_lower_case=false is not supported")
    before = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*sentencepiece.CANONICAL, *before])
    if _token(config, "pad_token"):
        backend.enable_padding(pad_id=backend.token_to_id(_token(config, "pad_token")), pad_token=_token(config, "pad_token"))
    return backend


def _is_gemma(backend: Backend) -> bool:
    return all(backend.token_to_id(token) is not None for token in ("<pad>", "<eos>", "<bos>"))


def _lower_first(backend: Backend, file: Path, text: TextArch) -> Backend:
    """The tokenizer with the lower case that its model learned with, where the file itself does not say so.

    SigLIP 2 has the vocabulary of Gemma, which keeps the case, and learned with lower-cased text; its class (Siglip2Tokenizer)
    does this before the rules of the file. sentence-transformers does it where its own config says so.
    """
    siglip_2 = text.pool == "last" and _is_gemma(backend)
    if not (siglip_2 or _sentence_lowers(file)) or '"Lowercase"' in json.dumps(json.loads(backend.to_str())["normalizer"]):
        return backend
    lowered = Backend.from_str(backend.to_str())
    before = [] if lowered.normalizer is None else [lowered.normalizer]
    lowered.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return lowered


def _sentence_lowers(file: Path) -> bool:
    sentence = file.with_name(_SENTENCE)
    return sentence.is_file() and Fields(str(sentence), read_json(sentence)).get("do_lower_case", bool, False)


def _add_tokens(backend: Backend, file: Path) -> None:
    """Adds the tokens of the added_tokens.json beside a tokenizer.

    Raises ConvertError for ids that do not follow the others.
    """
    beside = file.with_name(_ADDED)
    content = read_json(beside) if beside.is_file() else {}
    for token, id in sorted(content.items(), key=lambda item: item[1] if isinstance(item[1], int) else -1):
        if backend.token_to_id(token) is None:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if backend.token_to_id(token) != id:
            raise ConvertError(f"{beside}: {token!r} has the id {id!r}, expected {backend.token_to_id(token)}, the next one")


def _require_fitting(tokenizer: Tokenizer, file: Path, text: TextArch) -> None:
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


def _config(file: Path) -> Fields:
    """The tokenizer_config.json beside a tokenizer; empty where there is none."""
    config = file.with_name(_CONFIG)
    return Fields(str(config), read_json(config) if config.is_file() else {})


def _token(config: Fields, name: str) -> str:
    """A special token of tokenizer_config.json, or ''; the tokenizer.json of a SigLIP may lack its pad token."""
    token = config.content.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _installed_merges() -> Path | None:
    spec = importlib.util.find_spec("open_clip")
    file = Path(spec.origin).parent / MERGES if spec and spec.origin else None
    return file if file and file.is_file() else None
