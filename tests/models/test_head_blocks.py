"""Heads that read the pooled tokens of several blocks (head_blocks), against a composition of what one block gives."""

import dataclasses

import numpy as np
import pytest

from icar_jax import pytree
from icar_jax.errors import ModelError
from icar_jax.models import flops
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.token_router import BlocksArch, TokenRouter
from icar_jax.models.vision import VisionArch, VisionTower
from tests.support.counting import require_counted

VISION = VisionArch(24, 8, 16, 5, 2, 24, 12, exits=(3, 4), head_blocks=3, registers=1, projection="linear_mlp",
    projection_width=20)  # fmt: skip
TEXT = TextArch(7, 20, 16, 4, 2, 24, 12, end_id=19, post_norm=True, pad_id=0, pool="mean", causal=False, head_blocks=3)
IMAGES = np.random.default_rng(1).standard_normal((3, 24, 24, 3)).astype(np.float32)


def drawn(shapes, seed=0):
    """Norms and biases at random too: at their start values a dropped one would not show."""
    rng = np.random.default_rng(seed)
    return pytree.map_with_path(
        lambda path, leaf: (0.3 * rng.standard_normal(leaf.shape) + path.endswith("scale")).astype(np.float32), shapes
    )


def pooling(head, **changes):
    return dataclasses.replace(VISION, head=head, pool=head, **changes)


def norm(x, p, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def project(z, p):
    from scipy.special import erf

    mlp = p["proj_mlp"]
    hidden = z @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
    hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
    return z @ p["proj"]["kernel"] + hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]


@pytest.mark.parametrize("head", ["cls", "mean", "cls_mean"])
def test_a_head_projects_the_normed_pooled_tokens_of_its_last_blocks(head):
    arch = pooling(head)
    graph = VisionTower.graph(arch)
    params = drawn(graph.shapes)
    found, named = graph(params, IMAGES, intermediates=True)
    assert arch.read_blocks == (1, 2, 3, 4, 5) and arch.blocks_of(4) == (2, 3, 4)
    for depth in (3, 4, 5):
        at = params if depth == 5 else params["exits"][str(depth)]
        ln, eps = (params["ln_post"], arch.norm_eps) if depth == 5 else (at["ln"], arch.exit_eps)
        parts = []
        for block in (depth - 2, depth - 1, depth):
            x = np.asarray(named[f"blocks/{block - 1}"])
            both = {"cls": x[:, 0], "mean": x[:, 2:].mean(1)}
            parts += [norm(both[each], ln, eps) for each in head.split("_")]
        np.testing.assert_allclose(found[depth], project(np.concatenate(parts, -1), at), atol=2e-5, err_msg=str(depth))


@pytest.mark.parametrize(
    "arch",
    [
        pooling("cls_mean"), pooling("mean", merge=(0, 2, 1)), pooling("mean", reduce="tome", schedule=(1, 2)),
        pooling("cls_mean", exit_sum=True), pooling("cls", reduce="drop", schedule=(0, 3)),
    ],
)  # fmt: skip
def test_pooled_tokens_and_a_later_start_give_the_same_embeddings(arch):
    graph = VisionTower.graph(arch)
    params = drawn(graph.shapes)
    expected = graph(params, IMAGES)
    kept = graph.pooled(params, IMAGES)
    assert tuple(kept) == arch.read_blocks
    for depth, z in graph.of_pooled(params, kept).items():
        np.testing.assert_allclose(z, expected[depth], atol=1e-5)
    alone = graph(params, IMAGES, (4,))[4]
    np.testing.assert_allclose(alone, expected[4], atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"reduce": "tome", "schedule": (1, 0, 2)}, {"merge": (0, 0, 2)}])
def test_a_router_on_the_first_blocks_hands_on_what_later_heads_read(blocks, changes):
    arch = ClipArch(pooling("cls_mean", **changes), TEXT)
    clip, router = Clip.graph(arch), TokenRouter.graph(BlocksArch(arch.vision, blocks, "regression"))
    params = drawn(clip.shapes)
    shared = drawn(router.shapes)
    shared["tower"] = {name: params["vision"][name] for name in shared["tower"] if name != "blocks"}
    shared["tower"]["blocks"] = {str(n): params["vision"]["blocks"][str(n)] for n in range(blocks)}
    tokens = router.tokens(shared, IMAGES)
    expected = clip.encode_image_exits(params, IMAGES)
    for exit in (3, 4, 5):
        np.testing.assert_allclose(clip.encode_tokens(params, tokens, blocks, exit), expected[exit], atol=1e-5)
    if blocks > 1:
        with pytest.raises(ValueError, match=rf"also need the pooled tokens of {blocks - 1} earlier blocks.*those of 0"):
            clip.encode_tokens(params, tokens._replace(earlier=None), blocks, 3)


def test_a_text_head_reads_its_last_blocks_and_no_padding():
    graph = TextTower.graph(TEXT)
    params = drawn(graph.shapes)
    ids = np.array([[3, 4, 5, 0, 0, 0, 0], [7, 8, 9, 1, 2, 3, 4]], np.int32)
    each = []
    for depth in (2, 3, 4):
        one = TextTower.graph(dataclasses.replace(TEXT, depth=depth, head_blocks=1))
        less = {**params, "blocks": {str(n): params["blocks"][str(n)] for n in range(depth)}}
        each.append(one.pooled(less, ids))
    expected = np.concatenate(each, -1) @ params["proj"]["kernel"]
    np.testing.assert_allclose(graph(params, ids), expected, atol=1e-5)
    np.testing.assert_allclose(graph(params, ids[:1, :3]), expected[:1], atol=1e-5)
    np.testing.assert_allclose(graph.of_pooled(params, graph.pooled(params, ids)), expected, atol=1e-5)


def test_crossget_reads_several_blocks_too():
    text = dataclasses.replace(TEXT, depth=5, reduce="crossget", schedule=(0, 1, 1))
    arch = ClipArch(pooling("cls_mean", reduce="crossget", schedule=(1, 1)), text)
    clip = Clip.graph(arch)
    params = drawn(clip.shapes)
    ids = np.array([[3, 4, 5, 6, 0, 0, 0], [7, 8, 9, 1, 2, 3, 4]], np.int32)
    each = []
    for depth in (3, 4, 5):
        one = TextTower.graph(dataclasses.replace(text, depth=depth, head_blocks=1, schedule=text.schedule[:depth]))
        less = {**params["text"], "blocks": {str(n): params["text"]["blocks"][str(n)] for n in range(depth)}}
        each.append(one.pooled({**less, "cross": params["text"]["cross"][:depth]}, ids))
    z = np.concatenate(each, -1) @ params["text"]["proj"]["kernel"]
    np.testing.assert_allclose(clip.encode_text(params, ids), z / np.linalg.norm(z, axis=-1, keepdims=True), atol=1e-5)
    found, cross = clip.encode_text_with_cross(params, ids)
    assert cross.shape == (2, 5, 12)
    np.testing.assert_allclose(found, z / np.linalg.norm(z, axis=-1, keepdims=True), atol=1e-5)
    images, cross = clip.encode_image_with_cross(params, IMAGES, (3, 5))
    assert cross.shape == (3, 5, 12) and set(images) == {3, 5}


def test_the_wider_projection_is_counted():
    require_counted(ClipArch(pooling("cls_mean"), TEXT))
    less = flops.head_flops(pooling("cls_mean", head_blocks=1), 4)
    assert flops.head_flops(pooling("cls_mean"), 4) - less == 2 * 4 * 16 * (12 + 20)
    one = dataclasses.replace(TEXT, head_blocks=1)
    assert flops.text_flops(TEXT) - flops.text_flops(one) == 2 * 2 * 16 * 12


@pytest.mark.parametrize(
    "arch, changes, message",
    [
        (VISION, {"head_blocks": 4}, r"head_blocks=4 must lie in 1 to 3, the number of blocks before the first head"),
        (VISION, {"head_blocks": 0}, r"head_blocks=0 must lie in 1"),
        (VISION, {"exit_head": "adapter"}, r"head_blocks=3 concatenates .*, exit head 'adapter' does not"),
        (VISION, {"head": "mean"}, r"exits pool 'cls' and full depth 'mean'"),
        (
            VISION,
            {"head": "map", "pool": "map", "embed_dim": 16, "projection": "linear", "projection_width": 0},
            r"an attention-pool head does not; use 1",
        ),
        (TEXT, {"head_blocks": 5}, r"text head_blocks=5 must lie in 1 to 4"),
        (TEXT, {"pooler": True}, r"text head_blocks=3 is not possible with a pooler"),
        (TEXT, {"projection": "none", "embed_dim": 48}, r"text head_blocks=3 is not possible with projection 'none'"),
    ],
)
def test_impossible_numbers_of_blocks_are_refused(arch, changes, message):
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(arch, **changes)
