"""Tokenizers read from vocab.txt and SentencePiece files; test_tokenizers_live.py compares them with the libraries."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from icar_jax import checkpoint
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts.open_clip_encoder import LAYOUT as ENCODER_LAYOUT
from icar_jax.convert.source import open_source
from icar_jax.convert.tokenizers import sentencepiece
from icar_jax.convert.tokenizers.hf_json import tokenizer_json
from icar_jax.convert.vocabulary import find_tokenizer, open_tokenizer
from icar_jax.data.cleaning import clean
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.text import TextArch
from tests.support import parity_cases
from tests.support.texts import HARD
from tests.support.tokenizers import PIECES, clip_tokenizer, field, model_file, source_of

SIZES = {"width": 8, "depth": 1, "heads": 1, "mlp_width": 8, "embed_dim": 8, "end_id": 0, "causal": False}
XLM = TextArch(40, 1000, **SIZES, pool="mean", post_norm=True, projection="none", pad_id=1)
BERT = dataclasses.replace(XLM, pad_id=0)
SIGLIP = TextArch(64, 1000, **SIZES, pool="last")


def best(text, scores):
    """The best way to split a text into pieces: all ways are tried."""
    words = "\u2581" + "\u2581".join(text.split())
    found = []
    for cuts in itertools.product((False, True), repeat=len(words) - 1):
        at = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(words)]
        parts = [words[a:b] for a, b in itertools.pairwise(at)]
        if all(part in scores for part in parts):
            found.append((sum(scores[part] for part in parts), parts))
    return max(found)[1]


def test_the_best_pieces_are_found(tmp_path):
    backend = sentencepiece.backend(model_file(tmp_path / "spiece.model"))
    scores = {text: score for text, score, type in PIECES if type == 1}
    for text in ("the dog", "  the  dog ", "he dog", "dogd", "t h e", "og the"):
        assert backend.encode(text, add_special_tokens=False).tokens == best(text, scores), text


def test_xlm_robertas_ids_are_shifted(tmp_path):
    tokenizer = open_tokenizer(model_file(tmp_path / "sentencepiece.bpe.model"), XLM)
    assert (tokenizer.start_id, tokenizer.pad_id, tokenizer.end_id) == (0, 1, 2)
    ids = tokenizer("the dog \u00e9", 9)[0].tolist()
    assert ids == [0, 4 + 1, 6 + 0, 7, 4 + 0, 3, 2, 1, 1]  # <s>, the file's pieces one higher, <unk> 3
    assert tokenizer.token(len(PIECES) + 1) == "<mask>"


def test_bpe_merges_the_best_pair_first(tmp_path):
    pieces = [("<unk>", 0, 2), ("<pad>", 0, 3), ("<eos>", 0, 3), ("<bos>", 0, 3), ("ab", -0, 1), ("bc", -1, 1), ("abc", -2, 1),
              *((c, -9, 1) for c in "\u2581abc")]  # fmt: skip
    backend = sentencepiece.backend(model_file(tmp_path / "m.model", pieces, kind=2, dummy_prefix=False, trims=False))
    assert backend.encode("abc", add_special_tokens=False).tokens == ["abc"]
    assert backend.encode("abbc", add_special_tokens=False).tokens == ["ab", "bc"]
    tokenizer = open_tokenizer(tmp_path / "m.model", SIGLIP)  # a vocabulary of Gemma in a SigLIP tower: lower case
    assert tokenizer("ABC", 4)[0].tolist() == tokenizer("abc", 4)[0].tolist() == [6, 2, 1, 1]


def test_siglips_own_text_has_no_punctuation(tmp_path):
    tokenizer = open_tokenizer(model_file(tmp_path / "spiece.model"), SIGLIP)
    assert tokenizer(" The, DOG!", 9)[0].tolist() == tokenizer("the dog", 9)[0].tolist()


@pytest.mark.parametrize("cut", [0, 1, 7, 40, -1])
def test_a_damaged_model_is_refused(cut, tmp_path):
    whole = model_file(tmp_path / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(whole[:cut])
    with pytest.raises(ConvertError, match="spiece.model is not a SentencePiece model, or damaged"):
        sentencepiece.read(tmp_path / "spiece.model")


@pytest.mark.parametrize("data, message", [
    (b"\xff" * 30, "more than ten bytes"),
    (b"\x0a\xff\xff\xff\xff\xff\x7fabc", "a field of"),
    (b"\x0b", "unknown wire type 3"),
    (field(1, field(1, b"\xff\xfe")), "codec can't decode"),
    (field(2, field(3, 3)) + field(1, field(1, b"a")), "type 3 are not supported"),
    (field(2, field(24, 1)) + field(1, field(1, b"a")), "whitespace as a suffix"),
])  # fmt: skip
def test_what_is_no_model_is_refused(data, message, tmp_path):
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(ConvertError, match=message):
        sentencepiece.read(tmp_path / "spiece.model")


def test_pieces_must_fit_together(tmp_path):
    for pieces, message in ((PIECES[1:], "no piece for unknown"), (PIECES + PIECES[-1:], "1 pieces occur twice")):
        with pytest.raises(ConvertError, match=message):
            open_tokenizer(model_file(tmp_path / "spiece.model", pieces), SIGLIP)
    with pytest.raises(ConvertError, match="which CLIP's text towers do not read"):
        open_tokenizer(model_file(tmp_path / "spiece.model"), TextArch(9, 99, **SIZES))


VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "caf", "##e", "##\u00e9", "caf\u00e9", "Dog", "dog", "\u4e2d",
    "\u4e2d\u56fd", "\u56fd", "##\u56fd", ",", "a",
]  # fmt: skip


@pytest.mark.parametrize("config, text, tokens", [
    ({}, "Dog, CAF\u00c9 \u4e2d\u56fd", ["dog", ",", "caf", "##e", "\u4e2d", "\u56fd"]),
    ({"do_lower_case": False}, "Dog caf\u00e9 dog", ["Dog", "caf\u00e9", "dog"]),
    ({"strip_accents": False}, "CAF\u00c9", ["caf\u00e9"]),
    ({"tokenize_chinese_chars": False}, "\u4e2d\u56fd", ["\u4e2d\u56fd"]),
    ({}, "zebra", ["[UNK]"]),
])  # fmt: skip
def test_word_pieces(config, text, tokens, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path, BERT)
    ids = [VOCABULARY.index(token) for token in ("[CLS]", *tokens, "[SEP]")]
    assert tokenizer(text, len(ids) + 1)[0].tolist() == [*ids, 0]


def test_added_tokens_follow_the_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 17, "a": 16}))
    assert open_tokenizer(tmp_path, BERT)("<new>a", 4)[0].tolist() == [2, 17, 16, 3]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 19}))
    with pytest.raises(ConvertError, match="'<new>' has the id 19, expected 17, the next one"):
        open_tokenizer(tmp_path, BERT)


def test_sentence_transformers_may_lower_the_case(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert open_tokenizer(tmp_path, BERT)("Dog", 3)[0].tolist() == [2, VOCABULARY.index("dog"), 3]


def test_broken_vocabularies_are_refused(tmp_path):
    for content, message in (("a\nb\n", r"lacks \[UNK\]"), ("\n".join([*VOCABULARY, "a"]), "1 tokens occur twice")):
        (tmp_path / "vocab.txt").write_text(content)
        with pytest.raises(ConvertError, match=message):
            open_tokenizer(tmp_path / "vocab.txt", BERT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvertError, match=r"holds no tokenizer; expected one of tokenizer.json"):
        open_tokenizer(tmp_path / "empty", BERT)


def test_a_cleaning_is_kept_with_the_tokenizer():
    tokenizer = clip_tokenizer()
    assert tokenizer.cleaning == "lower" and tokenizer.to_json() == tokenizer.backend_json()
    other = Tokenizer.from_json(tokenizer.to_json(), cleaning="canonicalize")
    again = Tokenizer.from_json(other.to_json())
    assert again.cleaning == "canonicalize" and again.to_json() == other.to_json() and not again.same_ids(tokenizer)
    assert again("The_cat!", 6).tolist() == tokenizer("the cat", 6).tolist()
    assert [clean(" A_b &amp; C!\n", how) for how in ("", "whitespace", "lower", "canonicalize")] == [
        " A_b &amp; C!\n", "A_b & C!", "a_b & c!", "a b c",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="cleaning 'upper' must be one of"):
        Tokenizer.from_json(tokenizer.to_json(), cleaning="upper")


@pytest.mark.parametrize("cleaning", ["lower", "whitespace", "canonicalize"])
def test_rules_of_a_file_clean_alike(cleaning):
    from tokenizers import Tokenizer as Backend

    tokenizer = Tokenizer.from_json(clip_tokenizer().to_json(), cleaning=cleaning)
    rules = Backend.from_str(tokenizer_json(tokenizer))
    for text in HARD:
        row = tokenizer(text, 400)[0].tolist()
        assert rules.encode(text).ids == row[: row.index(tokenizer.end_id) + 1], text


@pytest.mark.parametrize("text, cleaning", [
    ({"hf_tokenizer_name": "xlm-roberta-base"}, "whitespace"), ({}, None),
    ({"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "lower", "context_length": 9}}, "lower"),
])  # fmt: skip
def test_open_clips_cleaning_is_followed(text, cleaning, tmp_path):
    model_file(tmp_path / "sentencepiece.bpe.model")
    tokenizer, origin = find_tokenizer(source_of(tmp_path, text), "", XLM)
    assert (tokenizer.cleaning, origin) == (cleaning or "", "sentencepiece.bpe.model")


@pytest.mark.parametrize("wrong", [
    {"tokenizer_mode": "clips"}, {"tokenizer_kwargs": {"clean": "odd"}}, {"tokenizer_kwargs": {"strip_sep_token": True}},
    {"tokenizer_kwargs": {"use_fast": False}},
])  # fmt: skip
def test_other_preparations_are_refused_by_name(wrong, tmp_path):
    with pytest.raises(ConvertError, match="prepares text in a way that is not supported: tokenizer_"):
        find_tokenizer(source_of(tmp_path, wrong), "", XLM)


# --- OpenCLIP's text encoders ------------------------------------------------------------------------------------------------


def edited(tmp_path, config=None, encoder=None, name="open_clip_xlm_roberta"):
    """The case with other fields in text_cfg and in the encoder's config.json; None: without the latter."""
    case = parity_cases.load(name)
    files = json.loads(json.dumps(case.files))
    files["open_clip_config.json"]["model_cfg"]["text_cfg"] |= config or {}
    if encoder is None:
        del files["config.json"]
    else:
        files["config.json"] |= encoder
    return parity_cases.write_source(dataclasses.replace(case, files=files), tmp_path / "source")


@pytest.mark.parametrize("config, encoder, message", [
    ({}, None, "names the text encoder 'tiny-encoder', whose heads and epsilon are unknown; known are xlm-roberta-base"),
    ({"hf_model_name": "FacebookAI/xlm-roberta-base"}, None, "vocab_size: text_cfg.hf_model_name FacebookAI/xlm-rob"),
    ({"hf_model_name": None}, {}, "nothing says which one"),
    ({"hf_pooler_type": "max_pooler"}, {}, "hf_pooler_type='max_pooler' with hf_proj_type='mlp' is not supported"),
    ({"hf_proj_type": "linear"}, {}, r"text.proj.0.weight"),
    ({}, {"model_type": "mt5"}, "'mt5' model"),
    ({"context_length": 30}, {}, "text_cfg.context_length 30 must lie in 2 to 18"),
])  # fmt: skip
def test_other_encoders_are_refused(config, encoder, message, tmp_path):
    with pytest.raises(ConvertError, match=message):
        convert(edited(tmp_path, config, encoder), tmp_path / "out", Options())


def test_a_published_encoder_needs_no_config(tmp_path):
    """Sizes that the published name contradicts are refused above; the same name in a folder beside is read there."""
    folder = edited(tmp_path, {"hf_model_name": "encoders/tiny"})
    about = parity_cases.load("open_clip_xlm_roberta").files["config.json"]
    (folder / "encoders" / "tiny").mkdir(parents=True)
    (folder / "encoders" / "tiny" / "config.json").write_text(json.dumps(about))
    report = convert(folder, tmp_path / "out", Options(context_length=6))
    text = report.description["arch"]["text"]
    assert (text["context_length"], text["projection"], text["pool"], text["pad_id"]) == (6, "mlp", "mean", 1)
    assert report.description["source"]["text_encoder"]["name"] == "encoders/tiny"
    assert "the files of" not in " ".join(report.notes) and "sentencepiece.bpe.model" in " ".join(report.notes)
    assert ENCODER_LAYOUT.name == report.layout and np.isfinite(report.parameters)


@pytest.mark.parametrize("name", ["open_clip_xlm_roberta", "open_clip_bert"])
def test_an_encoder_goes_back_where_it_came_from(name, tmp_path):
    """Positions beyond the context are zero afterwards, and the type of tokens is part of the others; all else is the same."""
    case = parity_cases.load(name)
    source = parity_cases.write_source(case, tmp_path / "source")
    convert(source, tmp_path / "model")
    made = export(tmp_path / "model", tmp_path / "out", "open_clip")
    config = json.loads((made.path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    original = case.files["open_clip_config.json"]["model_cfg"]["text_cfg"]
    assert {key: config[key] for key in original} == original
    assert ("beyond 10 tokens are zero" in " ".join(made.notes)) == (name == "open_clip_xlm_roberta")
    (made.path / "config.json").write_text(json.dumps(case.files["config.json"]))
    convert(made.path, tmp_path / "again")
    first, second = (checkpoint.read(tmp_path / folder, "clip") for folder in ("model", "again"))
    assert first.description["arch"] == second.description["arch"]
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    shapes = {key: array.shape for key, array in case.weights.items()}
    assert {key: tensor.shape for key, tensor in open_source(made.path).tensors.items()} == shapes


def test_an_encoder_without_a_known_name_is_not_exported(tmp_path):
    convert(parity_cases.write_source(parity_cases.load("open_clip_bert"), tmp_path / "source"), tmp_path / "model")
    checkpoint.amend(tmp_path / "model", {"source": {}})
    with pytest.raises(ConvertError, match="names a text encoder of transformers, and none is known that has the sizes"):
        export(tmp_path / "model", tmp_path / "out", "open_clip")
    for layout in ("hf", "openai", "icar"):
        with pytest.raises(ConvertError, match="its text tower is a BERT"):
            export(tmp_path / "model", tmp_path / "out", layout)
