"""Tokenizers: CLIP's structure from a merges file, training on captions, exact round trips."""

import gzip
import html
import pickle

import ftfy
import numpy as np
import pytest

from icar_jax.data.cleaning import clean
from icar_jax.data.tokenizer import END, START, Tokenizer

CAPTIONS = ["A red ball on a table .", "Two dogs play with a red ball.", "a dog on a table", "The table is red"] * 3
MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "Ã ©</w>", "r e", "re d</w>"]


@pytest.fixture
def merges_file(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(b'"bpe_simple_vocab_16e6.txt#version: 0.2\n' + "\n".join(MERGES).encode() + b"\n"))
    return path


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CAPTIONS, 300)


def test_clean_as_openai():
    assert clean("  A\n Photo&amp;amp;\tof schÃ¶n CATS ") == "a photo& of schön cats"


def test_clip_vocabulary_layout(merges_file):
    tokenizer = Tokenizer.from_file(merges_file)
    size = 512 + len(MERGES) + 2
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (
        size,
        size - 2,
        size - 1,
        0,
    )
    ids = tokenizer("The cat, red!", 12)[0].tolist()
    # ',' is byte 11 of the printable order (0x2c - 0x21); '</w>' forms are 256 higher; merges begin at 512.
    assert ids == [size - 2, 513, 515, 256 + 11, 518, 256, size - 1, 0, 0, 0, 0, 0]
    assert tokenizer("CAFÉ", 8)[0].tolist()[1:5] == [514, 69, 516, size - 1]  # ca, f, é</w>
    assert tokenizer("it's 42", 9)[0].tolist()[1:6] == [72, 83 + 256, 6, 82 + 256, 19 + 256]  # i t</w> ' s</w> 4</w>
    assert tokenizer.decode(tokenizer("The cat, café!", 16)[0]) == "the cat , café !"


def test_merges_plain_text_equals_gzip(merges_file, tmp_path):
    plain = tmp_path / "merges.txt"
    plain.write_bytes(gzip.decompress(merges_file.read_bytes()))
    assert Tokenizer.from_file(plain).to_json() == Tokenizer.from_file(merges_file).to_json()


@pytest.mark.parametrize(
    "text, message",
    [
        ("hello\nt h\n", "neither a tokenizer.json nor a CLIP merges file"),
        ("#version: 0.2\nt h\n", "no merge ends a word"),
        ("#version: 0.2\nt h\nt h e\n", "line 3: expected two symbols"),
        ("#version: 0.2\nzz qq\n", "inconsistent merges"),
        ("#version: 0.2\nt h\nt h\n", "already exists"),
        ("{broken", "not a tokenizer.json"),
        ('{"version": "1.0"}', "not a tokenizer.json"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "file.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_file(path)


def test_missing_file_and_foreign_vocabulary(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match="bpe_simple_vocab"):
        Tokenizer.from_file(tmp_path / "none.json")
    foreign = trained.to_json().replace(START, "[CLS]").replace(END, "[SEP]")
    with pytest.raises(ValueError, match=r"neither a CLIP nor a SigLIP vocabulary.*\[CLS\]"):
        Tokenizer.from_json(foreign)


def test_trained_ids(trained):
    assert trained.pad_id == 0 and trained.start_id == trained.vocab_size - 2 and trained.end_id == trained.vocab_size - 1
    assert trained.vocab_size <= 300
    ids = trained(CAPTIONS, 32)
    assert ids.dtype == np.int32 and ids.shape == (12, 32)
    assert (ids[:, 0] == trained.start_id).all() and (ids.max(1) == trained.end_id).all()
    assert ((ids == trained.end_id).sum(1) == 1).all()
    assert trained.decode(ids[0]) == "a red ball on a table ."


def test_training_is_deterministic(trained):
    assert Tokenizer.train(CAPTIONS, 300).to_json() == trained.to_json()


@pytest.mark.parametrize("text", ["", "   ", "日本語 😀", "\x00\x07", "ẞ é", "x" * 500])
def test_any_text_can_be_encoded(trained, merges_file, text):
    for tokenizer in (trained, Tokenizer.from_file(merges_file)):
        row = tokenizer(text, 2000)[0]
        end = row.tolist().index(tokenizer.end_id)
        assert row[0] == tokenizer.start_id and (row[end + 1 :] == tokenizer.pad_id).all()
        assert end > 1 or not clean(text)
    assert trained.decode(trained(text, 2000)[0]) == clean(text)


def test_truncation_keeps_the_end_token(trained):
    ids, truncated = trained.encode(["a red ball on a table", "a", ""], 4)
    assert truncated.tolist() == [True, False, False]
    assert ids[0, -1] == trained.end_id and ids[1, 2] == trained.end_id and ids[2, 1] == trained.end_id
    exact = int((trained("a red", 20) != 0).sum())
    assert not trained.encode("a red", exact)[1][0] and trained.encode("a red", exact - 1)[1][0]


def test_wrong_arguments(trained):
    with pytest.raises(TypeError, match="number 1 is NoneType"):
        trained(["a", None], 8)
    with pytest.raises(TypeError, match="number 0 is float"):
        Tokenizer.train([float("nan")], 300)
    with pytest.raises(ValueError, match="context_length"):
        trained("a", 1)
    with pytest.raises(ValueError, match="at least 259"):
        Tokenizer.train(CAPTIONS, 200)
    with pytest.raises(ValueError, match="no non-empty captions"):
        Tokenizer.train(["", " "], 300)
    assert trained([], 8).shape == (0, 8)


def test_round_trips_are_exact(trained, merges_file, tmp_path):
    for tokenizer in (trained, Tokenizer.from_file(merges_file)):
        tokenizer.save(tmp_path / "tokenizer.json")
        for copy in (
            Tokenizer.from_json(tokenizer.to_json()),
            Tokenizer.from_file(tmp_path / "tokenizer.json"),
            pickle.loads(pickle.dumps(tokenizer)),
        ):
            assert copy.to_json() == tokenizer.to_json()
            assert (copy(CAPTIONS, 16) == tokenizer(CAPTIONS, 16)).all()
            assert (copy.start_id, copy.end_id, copy.pad_id) == (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)


def test_plain_text_is_cleaned_as_by_the_library_that_it_skips():
    printable = [chr(c) for c in range(32, 127) if chr(c) != "&"]
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(printable, rng.integers(0, 40)))
        assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower(), repr(text)
    assert clean("&amp;lt; l\u2019\u00e9t\u00e9") == "< l'\u00e9t\u00e9", "all other text is repaired"
