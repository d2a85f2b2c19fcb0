"""Routing with shared blocks where the CLIP's heads read several blocks, some of them before the complexity model's."""

import dataclasses

import numpy as np
import pytest

import icar_jax
from icar_jax import checkpoint
from icar_jax.config import from_dict
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.inference.shared_router import SharedRouter
from icar_jax.models.vision import VisionArch
from tests.support.scorers import pictures, write_clip, write_scorer

HEADS = {"head": "cls_mean", "head_blocks": 3, "text_head_blocks": 2, "exit_head": "linear", "merge": ()}


def same_trunk_other_heads(folder, scorer, **changes):
    """The scorer as if it were made from a tower with other heads; its blocks stay."""
    found = checkpoint.read(scorer, "complexity")
    arch = found.description["arch"]
    vision = dataclasses.replace(from_dict(arch["vision"], VisionArch), **changes)
    about = {**found.description, "arch": {**arch, "vision": dataclasses.asdict(vision)}}
    kept = {name: about[name] for name in ("arch", "preprocess", "tower")}
    return checkpoint.write(folder, "complexity", kept, found.params)


@pytest.mark.parametrize(
    "blocks, changes, dtype",
    [
        (3, {}, "float32"), (2, {"merge": (1, 0, 1)}, "float32"), (1, {}, "bfloat16"),
        # as of a lone tower, or of a CLIP whose heads read another token
        (3, {"scorer": {"head": "cls", "pool": "cls", "head_blocks": 1}}, "float32"),
        (3, {"scorer": {"head": "mean", "pool": "mean"}}, "float32"),
    ],
)  # fmt: skip
def test_routing_equals_each_exit_run_alone(tmp_path, blocks, changes, dtype):
    other = changes.get("scorer", {})
    clip = write_clip(tmp_path / "clip", **HEADS | {name: value for name, value in changes.items() if name != "scorer"})
    scorer = write_scorer(tmp_path / "scorer", clip, blocks)
    if other:
        scorer = same_trunk_other_heads(tmp_path / "other", scorer, **other)
    images = pictures(11, seed=3)
    scores = icar_jax.load(scorer).score(images)
    bundle = make_bundle(clip, scorer, tmp_path / "bundle", thresholds=(float(np.median(scores)),))
    model = icar_jax.load(bundle, batch_size=4, dtype=dtype)
    assert isinstance(model.router, SharedRouter)
    routed = model.route(images)
    assert set(routed.exits.tolist()) == {3, 4}
    for exit in model.exits:
        alone = model.encode_image(images, exit=exit)
        np.testing.assert_allclose(
            routed.embeddings[routed.exits == exit], alone[routed.exits == exit], atol=1e-5 if dtype == "float32" else 2e-2
        )
