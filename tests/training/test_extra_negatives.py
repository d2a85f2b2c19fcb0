"""Rivals of a pair whose regret is learnt: which they are, what is learnt among them, and that a mesh changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, validate
from icar_jax.data.records import Source
from icar_jax.data.scenes import Scenes
from icar_jax.models.exit_regret import ExtraNegatives, loss_regret
from icar_jax.parallel.rules import FSDP_FALLBACK_SIZE
from icar_jax.training.loop import train
from icar_jax.training.preemption import StopRequest
from icar_jax.training.tasks import regret
from icar_jax.training.tasks.extra_negatives import NEGATIVES
from icar_jax.training.tasks.kinds import kind_of
from tests.support.programs import on_eight_devices
from tests.support.runs import among_rivals, metric_lines, regret_config


def torn():
    raise OSError("torn")


class Marred(Source):
    """A source of which one picture cannot be read, and another has no caption."""

    def __init__(self, source):
        self.source, self.name = source, source.name

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return dataclasses.replace(self.source[i], **{3: {"image": torn}, 4: {"captions": ()}}.get(i, {}))


def test_rivals_are_training_pairs_as_the_clip_embeds_them(clip_folder, tmp_path):
    config = regret_config(clip_folder, steps=4)
    config.complexity.rivals, config.complexity.regret, config.train.dtype = 70, "kl", "float32"  # more than one batch of them
    source = Marred(Scenes("train", 100, image_size=32))
    kind = kind_of(validate(config))
    task = kind.task()
    frozen, tokenizer, request = kind.frozen_params(task), kind.tokenizer(source, None), StopRequest()
    found = kind.embedded_params(task, source, tokenizer, frozen, request)[NEGATIVES]
    index = found["index"]
    assert (
        len(set(index.tolist())) == 70
        and not np.isin(index, (3, 4)).any()
        and {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in task.frozen[NEGATIVES].items()}
    )
    clip, some = icar_jax.load(clip_folder), [0, 13, 69]
    records = [source[index[i]] for i in some]
    np.testing.assert_allclose(found["image"][some], clip.encode_image([r.image() for r in records]), atol=1e-5)
    np.testing.assert_allclose(found["text"][some], clip.encode_text([r.captions[0] for r in records]), atol=1e-5)
    # One batch: the regret among them is that of the formula, with the image itself left out.
    params, batch = frozen[regret.CLIP], {regret.INDEX: index[:3].astype(np.int32)}
    pixels = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype(np.float32)
    batch["tokens"], _ = tokenizer.encode(["a cat", "two dogs", "red"], task.context_length)
    teacher = regret.teacher(config)
    got = jax.jit(lambda b, f, x: teacher.regret(b, f, x, None, 0))(batch, {**frozen, NEGATIVES: found}, pixels)
    embeds = jax.jit(lambda p, x: teacher.clip.encode_image_exits(p, x, (1, 3)))(params, pixels)
    text, scale = jax.jit(teacher.clip.encode_text)(params, batch["tokens"]), teacher.clip.logit_scales(params)[3]
    more = ExtraNegatives(found["image"], found["text"], np.arange(70) < 3)
    expected = jax.jit(lambda e, t: loss_regret(e[1], e[3], t, scale, more, weighed=True))(embeds, text)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    config.complexity.rivals = 99
    with pytest.raises(ConfigError, match="only 98 of 100 training images can be read and have a caption; set fewer"):
        kind_of(config).embedded_params(task, source, tokenizer, frozen, request)
    config.complexity.rivals = 70
    # A run among rivals learns other targets, and is the same where it is cut off.
    whole = checkpoint.read(train(config, tmp_path / "run"), "complexity")
    assert whole.description["regret"]["rivals"] == 70
    train(config, tmp_path / "cut", stop_after=2)
    again = checkpoint.read(train(config, tmp_path / "cut"), "complexity").params
    for path, leaf in pytree.flatten(whole.params).items():
        np.testing.assert_array_equal(leaf, pytree.flatten(again)[path])
    config.complexity.rivals = 0
    train(config, tmp_path / "alone")
    assert [line["regret"] for line in metric_lines(tmp_path / "alone")] != [
        line["regret"] for line in metric_lines(tmp_path / "run")
    ]


SHARDED = """
import json, sys
from pathlib import Path
from tests.support.runs import among_rivals, metric_lines
from icar_jax.config import MeshConfig
from icar_jax.training.loop import train

config = among_rivals(sys.argv[1])
config.mesh = MeshConfig(2, 2, 2)
train(config, sys.argv[2])
print(json.dumps(metric_lines(Path(sys.argv[2]))))
"""


@pytest.mark.check
def test_eight_devices_see_the_rivals_that_one_sees(clip_folder, tmp_path):
    assert 2800 * 24 >= FSDP_FALLBACK_SIZE
    found = on_eight_devices(SHARDED, str(clip_folder), str(tmp_path / "eight"))
    train(among_rivals(clip_folder), tmp_path / "one")
    for one, eight in zip(metric_lines(tmp_path / "one"), found, strict=True):
        for name in ("regret", "loss"):
            assert eight[name] == pytest.approx(one[name], rel=1e-3)
