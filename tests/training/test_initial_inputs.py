"""A run that starts from a checkpoint: its own tokenizer, a word where pictures are prepared otherwise, exits it lacks."""

import dataclasses
import shutil

import pytest

from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, from_dict
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.vision import VisionArch
from icar_jax.training.init_weights import load_params, note_preprocessing
from icar_jax.training.tasks.clip import tokenizer_of
from tests.support.runs import CAPTIONS, random_clip, tiny_config


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
    with pytest.raises(ConfigError, match=r"config.train.init=.*bare has no tokenizer.*--config.data.tokenizer=PATH"):
        tokenizer_of(config, None, None)
    config.data.tokenizer = str(clip_folder / checkpoint.TOKENIZER)
    assert tokenizer_of(config, None, None).vocab_size


def test_other_preprocessing_than_that_of_the_checkpoint_is_said(clip_folder):
    notes = []
    note_preprocessing(clip_folder, "clip", Preprocess(64, "squash"), notes.append)
    assert notes == []
    note_preprocessing(clip_folder, "clip", Preprocess(32, "crop", "bilinear"), notes.append)
    assert notes == [
        f"config.train.init={clip_folder}: image preprocessing differs: resize_mode 'squash' in the checkpoint, 'crop' in the "
        "run; interpolation 'bicubic' in the checkpoint, 'bilinear' in the run (config.data)"
    ]


def load(folder, arch, **kwargs):
    return pytree.flatten(load_params(folder, "clip", arch, Clip.graph(arch).shapes, **kwargs))


def with_exits(arch, exits):
    return dataclasses.replace(arch, vision=dataclasses.replace(arch.vision, exits=exits))


def test_exits_that_the_run_lacks_are_left_out_and_said(clip_folder):
    saved = from_dict(checkpoint.describe(clip_folder)["arch"], ClipArch)
    cases = {(2,): "exits 1 are dropped, the run has (2,)", (): "exits 1, 2 are dropped, the run has none"}
    for exits, words in cases.items():
        said = []
        found = load(clip_folder, with_exits(saved, exits), note=said.append)
        assert not [name for name in found if "exits/1/" in name or name == "exit_logit_scale/1"]
        assert any(words in line for line in said)


def test_exits_that_full_depth_sums_are_not_left_out(tmp_path):
    vision = VisionArch(32, 8, 32, 3, 4, 64, 24, exits=(1, 2), exit_sum=True)
    folder = random_clip(tmp_path / "model", vision)
    saved = from_dict(checkpoint.describe(folder)["arch"], ClipArch)
    with pytest.raises(ConfigError, match=r"unexpected: vision/exits/1/[^~]*--config.clip.exits=\(1, 2\): its full depth sums"):
        load(folder, with_exits(saved, (2,)))
