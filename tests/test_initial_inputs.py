"""A run that starts from a checkpoint: its own tokenizer, and a word where pictures are prepared otherwise."""

import shutil

import pytest
from conftest import CAPTIONS, tiny_config

from icar_jax import checkpoint
from icar_jax.config import ConfigError
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.training.initial import note_preprocessing
from icar_jax.training.opening import tokenizer_of


@pytest.fixture
def config(clip_folder):
    made = tiny_config()
    made.train.init = str(clip_folder)
    return made


def test_the_one_of_the_checkpoint_and_an_equal_file_are_taken(config, clip_folder, tmp_path):
    theirs = (clip_folder / checkpoint.TOKENIZER).read_text()
    assert tokenizer_of(config, None, None).to_json() == theirs
    config.data.tokenizer = str(tmp_path / "same.json")
    renamed = theirs.replace("<|startoftext|>", "<start_of_text>").replace("<|endoftext|>", "<end_of_text>")
    (tmp_path / "same.json").write_text(renamed)
    assert tokenizer_of(config, None, None).vocab_size == Tokenizer.from_json(theirs).vocab_size


def test_another_one_of_the_same_size_is_refused(config, clip_folder, tmp_path):
    theirs = Tokenizer.from_file(clip_folder / checkpoint.TOKENIZER)
    other = Tokenizer.train(["zebras gallop across wide dusty plains while vultures circle"] * 3 + CAPTIONS, theirs.vocab_size)
    assert (other.vocab_size, other.end_id) == (theirs.vocab_size, theirs.end_id) and not other.same_ids(theirs)
    other.save(tmp_path / "other.json")
    config.data.tokenizer = str(tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"config.data.tokenizer=.*other.json gives other ids .* leave config.data.tokenizer"):
        tokenizer_of(config, None, None)


def test_a_checkpoint_without_one_asks_for_it(config, clip_folder, tmp_path):
    bare = shutil.copytree(clip_folder, tmp_path / "bare")
    (bare / checkpoint.TOKENIZER).unlink()
    config.train.init = str(bare)
    with pytest.raises(ConfigError, match=r"config.train.init=.*bare holds no tokenizer.*--config.data.tokenizer=PATH"):
        tokenizer_of(config, None, None)
    config.data.tokenizer = str(clip_folder / checkpoint.TOKENIZER)
    assert tokenizer_of(config, None, None).vocab_size


def test_other_preprocessing_than_that_of_the_checkpoint_is_said(clip_folder):
    notes = []
    note_preprocessing(clip_folder, "clip", Preprocess(64, "squash"), notes.append)
    assert notes == []
    note_preprocessing(clip_folder, "clip", Preprocess(32, "crop", "bilinear"), notes.append)
    assert notes == [
        f"{clip_folder}: its pictures were prepared otherwise: resize_mode 'squash' there, 'crop' here; "
        "interpolation 'bicubic' there, 'bilinear' here (config.data)"
    ]
