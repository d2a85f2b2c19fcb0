"""Tokenizers read from the files of other libraries give the ids that those libraries give, for text that is hard to clean."""

import json
import random
import sys

import numpy as np
import pytest

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.parity.reference import declare_torchvision_operators
from icar_jax.convert.tokenizers import sentencepiece as ours
from icar_jax.convert.tokenizers.hf_json import tokenizer_config, tokenizer_json
from icar_jax.convert.vocabulary import find_tokenizer, open_tokenizer
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.text import TextArch
from tests.support.texts import HARD, LETTERS, WORDS
from tests.support.tokenizers import clip_tokenizer, source_of

torch = pytest.importorskip("torch")
if "torchvision" not in sys.modules:
    declare_torchvision_operators(torch)  # before transformers, which imports torchvision
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIZES = {"width": 8, "depth": 1, "heads": 1, "mlp_width": 8, "embed_dim": 8, "end_id": 0}
ENCODER = TextArch(40, 1000, **SIZES, pool="mean", causal=False, post_norm=True, projection="none", pad_id=1)
SIGLIP = TextArch(64, 1000, **SIZES, pool="last", causal=False)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    rng = random.Random(0)
    lines = (" ".join(rng.choices(WORDS, k=12)) for _ in range(3000))
    (folder / "corpus.txt").write_text("\n".join([*lines, LETTERS]), encoding="utf-8")

    def trained(name, **options):
        options = {"input": str(folder / "corpus.txt"), "model_prefix": str(folder / name), "minloglevel": 2, **options}
        spm.SentencePieceTrainer.train(**options)
        return folder / f"{name}.model"

    return trained


def ids_of(tokenizer, text):
    """The ids up to the last end token, which is no padding: a text may spell an end token too."""
    row = tokenizer(text, 400)[0].tolist()
    if tokenizer.pad_id == tokenizer.end_id:
        return row[: row.index(tokenizer.end_id) + 1]
    return row[: len(row) - row[::-1].index(tokenizer.end_id)]


KINDS = {
    "unigram": {"vocab_size": 90, "hard_vocab_limit": False},
    "identity": {"vocab_size": 90, "hard_vocab_limit": False, "normalization_rule_name": "identity"},
    "folded": {"vocab_size": 80, "hard_vocab_limit": False, "normalization_rule_name": "nmt_nfkc_cf"},
    "bpe": {"vocab_size": 120, "model_type": "bpe"},
    "gemma": {
        "vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
        "eos_piece": "<eos>", "bos_piece": "<bos>",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_sentencepiece(kind, train):
    import sentencepiece

    file = train(kind, **KINDS[kind])
    theirs, mine = sentencepiece.SentencePieceProcessor(model_file=str(file)), ours.backend(file)
    for text in HARD:
        if "<s>" not in text:  # a special token that is spelled is text to SentencePiece alone
            assert mine.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


def test_xlm_roberta_equals_transformers(train, tmp_path):
    file = train("xlm", **KINDS["unigram"]).rename(tmp_path / "sentencepiece.bpe.model")
    theirs = transformers.XLMRobertaTokenizer.from_pretrained(tmp_path)
    mine = open_tokenizer(file, ENCODER)
    assert (mine.start_id, mine.pad_id, mine.end_id) == (0, 1, 2) and mine.vocab_size == len(theirs)
    for text in HARD:
        assert ids_of(mine, text) == theirs(text).input_ids, text


@pytest.mark.parametrize("options", [
    {}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False},
    {"do_lower_case": False, "strip_accents": True},
])  # fmt: skip
def test_bert_equals_transformers(options, tmp_path):
    letters = sorted(set("".join(HARD + WORDS).lower()) | set("".join(HARD + WORDS)))
    letters = [c for c in letters if c.strip() and c.isprintable()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*special, *letters, *(f"##{c}" for c in letters), *WORDS, "photo", "##oto"]))
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    mine = open_tokenizer(tmp_path, TextArch(40, 1000, **SIZES, pool="first", causal=False, post_norm=True, projection="none",
                                             pad_id=0))  # fmt: skip
    for text in HARD:
        assert ids_of(mine, text) == theirs(text).input_ids, text


def test_siglip_equals_transformers(train, tmp_path):
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    file = train("siglip", **KINDS["unigram"], **special).rename(tmp_path / "spiece.model")
    theirs = transformers.SiglipTokenizer(str(file))
    mine = open_tokenizer(file, SIGLIP)
    for text in HARD:
        if "<s>" not in text:
            assert ids_of(mine, text) == theirs(text).input_ids, text


def test_siglip_2_lowers_the_case(train, tmp_path):
    """A Gemma-like tokenizer.json without lower case, of one class or the other, and what an export of it gives."""
    file = train("gemma2", **KINDS["gemma"])
    (tmp_path / "tokenizer.json").write_text(ours.backend(file).to_str(), encoding="utf-8")
    for name in ("Siglip2Tokenizer", "GemmaTokenizer", ""):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} if name else {}))
        mine = open_tokenizer(tmp_path / "tokenizer.json", SIGLIP)
        if name == "Siglip2Tokenizer":
            theirs = transformers.Siglip2Tokenizer.from_pretrained(tmp_path)
        assert ids_of(mine, "A Photo of a DOG") == ids_of(mine, "a photo of a dog")
        for text in HARD:
            if text and name == "Siglip2Tokenizer":
                assert ids_of(mine, text)[:-1] == theirs(text, add_special_tokens=False).input_ids, text
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text(tokenizer_json(mine), encoding="utf-8")
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(mine, SIGLIP)))
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    again = open_tokenizer(tmp_path / "out" / "tokenizer.json", SIGLIP)
    for text in HARD:
        if text:
            assert exported(text, add_special_tokens=False).input_ids == ids_of(mine, text)[:-1] == ids_of(again, text)[:-1]


def test_exported_clip_tokenizers_clean_text(tmp_path):
    """Of CLIP's kind and trained here; where CLIPTokenizer itself cleans (accents, spaces), its ids are the same too."""
    arch = TextArch(77, 1000, **SIZES)
    for n, mine in enumerate((clip_tokenizer(), Tokenizer.train(WORDS * 5, 400))):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "tokenizer.json").write_text(tokenizer_json(mine), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(mine, arch)))
        exported = transformers.AutoTokenizer.from_pretrained(folder)
        for text in HARD:
            assert exported(text).input_ids == ids_of(mine, text), text
    content = json.loads(clip_tokenizer().to_json())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    theirs = transformers.CLIPTokenizer(vocab=content["vocab"] | {}, merges=merges)
    mine = clip_tokenizer()
    for text in ("cafe\u0301 na\u0308ive", "A  Photo\tof DOGS", "it's 42 red balls!"):
        assert theirs(text, add_special_tokens=False).input_ids == ids_of(mine, text)[1:-1], text


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_open_clip_cleans_before_the_tokenizer_of_an_encoder(clean, train, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    file = train(f"clean_{clean}", **KINDS["unigram"]).rename(tmp_path / "sentencepiece.bpe.model")
    transformers.XLMRobertaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path / "theirs"), context_length=60, clean=clean)
    text = {"hf_tokenizer_name": "xlm-roberta-base"} | ({} if clean == "whitespace" else {"tokenizer_kwargs": {"clean": clean}})
    mine, origin = find_tokenizer(source_of(tmp_path, text), "", ENCODER)
    assert origin == file.name and mine.cleaning == clean
    np.testing.assert_array_equal(mine(HARD, 60), theirs(HARD).numpy())
    assert Tokenizer.from_json(mine.to_json()).cleaning == clean


@pytest.mark.parametrize("wrong", [{"tokenizer_mode": "clips"}, {"tokenizer_kwargs": {"strip_sep_token": True}}])
def test_other_preparations_of_open_clip_are_refused(wrong, tmp_path):
    with pytest.raises(ConvertError, match="prepares text in a way that is not supported: tokenizer_"):
        find_tokenizer(source_of(tmp_path, {"hf_tokenizer_name": "bert-base-uncased", **wrong}), "", ENCODER)
