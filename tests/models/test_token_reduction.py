"""Towers with token reduction: heads, pools, resuming, remat and scan, schedules, and what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax.errors import ModelError
from icar_jax.models import flops, variants
from icar_jax.models.clip import Clip, ClipArch, paired_blocks
from icar_jax.models.reduction_plan import reduced_text, reduced_vision
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import VisionArch, VisionTower
from tests.support import drawn
from tests.support.counting import dot_flops, require_counted

VISION = VisionArch(32, 8, 32, 4, 4, 64, 32, exits=(2, 3))
METHODS = {"tome": (3, 2, 2, 1), "pitome": (3, 2, 2, 1), "crossget": (3, 2, 2, 1), "drop": (0, 6)}


def tower_of(method, execution=Execution(), **more):
    arch = dataclasses.replace(VISION, reduce=method, schedule=METHODS[method], **more)
    return VisionTower.graph(arch, execution=execution)


def images(n=3):
    return np.random.default_rng(1).standard_normal((n, 32, 32, 3)).astype(np.float32)


def params_of(graph):
    params = drawn.params(graph.shapes, 0)
    if "cross" in params:
        params["cross"] = 0.3 * np.random.default_rng(2).standard_normal(params["cross"].shape).astype(np.float32)
    return params


@pytest.mark.parametrize("method", ["crossget", "drop", pytest.param("tome", marks=pytest.mark.check),
                                    pytest.param("pitome", marks=pytest.mark.check)])  # fmt: skip
def test_heads_read_what_a_block_leaves_and_a_tower_goes_on_from_there(method):
    graph = tower_of(method)
    params, x, arch = params_of(graph), images(), graph.arch
    whole = jax.jit(lambda p: graph(p, x))(params)
    for start in (1, 2, 3):
        begin = jax.jit(lambda p, start=start: graph.merge(p).run(graph.merge(p).embed(x), (start,))[start])
        tokens = begin(params)
        assert tokens.values.shape[1] == tokens.sizes.shape[1] == arch.tokens_after(start)
        if method != "drop":
            np.testing.assert_array_equal(tokens.sizes.sum(1), arch.tokens + arch.has_cross)
        later = tuple(e for e in arch.all_exits if e >= start)
        rest = jax.jit(lambda p, t, start=start, later=later: graph.merge(p).resume(t, start, later))(params, tokens)
        for exit, found in rest.items():
            np.testing.assert_allclose(found, whole[exit], atol=2e-5)
    left = {e: arch.tokens_after(e) for e in arch.all_exits}
    assert left == {"drop": {2: 17, 3: 11, 4: 11}, "crossget": {2: 13, 3: 11, 4: 10}}.get(method, {2: 12, 3: 10, 4: 9})


@pytest.mark.parametrize("method", ["tome", "pitome", "drop"])
def test_no_removed_token_leaves_every_bit(method):
    plain, none = (VisionTower.graph(dataclasses.replace(VISION, reduce=name)) for name in ("none", method))
    params, x = params_of(plain), images()
    expected, found = (jax.jit(lambda p, g=g: g(p, x))(params) for g in (plain, none))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("pool,head,exit_head", [
    ("mean", "mean", "linear"), ("first_patch", "cls", "linear"), ("cls_mean", "cls_mean", "linear"),
    ("cls", "cls", "attention"),
])  # fmt: skip
def test_pools_weigh_merged_tokens_by_their_sizes(pool, head, exit_head):
    graph = tower_of("tome", pool=pool, head=head, exit_head=exit_head)
    params, x, arch = params_of(graph), images(1), graph.arch
    found = jax.jit(lambda p: graph(p, x, (3,))[3])(params)
    tokens = jax.jit(lambda p: graph.merge(p).run(graph.merge(p).embed(x), (3,))[3])(params)
    # The same head on a sequence that repeats each patch as often as its size says.
    times = np.round(np.asarray(tokens.sizes[0])).astype(int)
    spread = np.repeat(np.asarray(tokens.values), times, axis=1)
    plain = VisionTower.graph(dataclasses.replace(arch, reduce="none", schedule=()))
    alike = jax.jit(lambda p, t: plain.merge(p).exits["3"](t))(params, jnp.asarray(spread))
    np.testing.assert_allclose(found, alike, atol=2e-5)
    if pool == "first_patch":
        assert arch.protected == 2 and times[1] == 1


def test_attention_in_proportion_to_size_equals_repeated_tokens():
    graph = tower_of("tome")
    params, x = params_of(graph), images(1)
    tokens = jax.jit(lambda p: graph.merge(p).run(graph.merge(p).embed(x), (1,))[1])(params)
    times = np.round(np.asarray(tokens.sizes[0])).astype(int)
    block = lambda p, t, bias: graph.merge(p).blocks[1].attn.with_keys(graph.merge(p).blocks[1].ln1(t), bias)[0]
    short = jax.jit(block)(params, tokens.values, jnp.log(tokens.sizes))
    long = jax.jit(lambda p, t: block(p, t, None))(params, jnp.asarray(np.repeat(tokens.values, times, axis=1)))
    np.testing.assert_allclose(short, long[:, np.cumsum(times) - 1], atol=2e-5)
    off = VisionTower.graph(dataclasses.replace(graph.arch, proportional=False))
    other, same = (jax.jit(lambda p, g=g: g(p, x)[4])(params) for g in (off, graph))
    assert np.abs(other - same).max() > 1e-4


@pytest.mark.parametrize("method", ["tome", pytest.param("crossget", marks=pytest.mark.check),
                                    pytest.param("drop", marks=pytest.mark.check)])  # fmt: skip
def test_gradients_are_the_same_with_remat_and_scan(method):
    params, x = params_of(tower_of(method)), images()

    def loss(params, execution):
        return sum(jnp.sum(jnp.sin(z)) for z in tower_of(method, execution)(params, x, (2, 4)).values())

    run = lambda execution: jax.jit(jax.grad(lambda p: loss(p, execution)))(params)
    plain, other = run(Execution()), run(Execution("dots", scan=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), plain, other)


def test_text_towers_of_every_kind_merge_tokens_and_leave_padding_apart():
    base = TextArch(12, 50, 16, 3, 2, 32, 16, end_id=49)
    kinds = {"end": {}, "last": {"pool": "last", "causal": False}, "mean": {"pool": "mean", "causal": False, "post_norm": True,
             "pad_id": 0}, "apart": {"pads_apart": True}}  # fmt: skip
    tokens = np.array([[48, 3, 4, 5, 6, 49, 0, 0, 0, 0, 0, 0], [48, 9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 49]], np.int32)
    for name, kind in kinds.items():
        arch = reduced_text(dataclasses.replace(base, **kind), (2, 2, 1))
        graph = TextTower.graph(arch)
        params = params_of(graph)
        found, cross = jax.jit(lambda p, t, g=graph: g.with_cross_embeddings(p, t))(params, tokens)
        assert found.shape == (2, 16) and cross.shape == (3, 2, 16) and np.all(np.isfinite(found)), name
        if name == "mean":  # masked padding changes nothing, whatever is merged in it
            assert arch.tokens_after(3) == 8
            alone = jax.jit(lambda p, t, g=graph: g(p, t))(params, tokens[:1])
            np.testing.assert_allclose(alone[0], found[0], atol=1e-5)


# --- cost --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_counted_flops_are_those_of_the_traced_program(method):
    vision = dataclasses.replace(VISION, reduce=method, schedule=METHODS[method], exit_head="attention")
    text = TextArch(12, 50, 16, 2, 2, 32, 32, end_id=49)
    text = reduced_text(text, (2, 2)) if method == "crossget" else text
    require_counted(ClipArch(vision, text))
    clip = Clip.graph(ClipArch(vision, text))
    program = jax.make_jaxpr(clip.encode_text)(clip.shapes, jax.ShapeDtypeStruct((1, 12), jnp.int32))
    assert dot_flops(program.jaxpr) == flops.text_flops(text)


@pytest.mark.check
@pytest.mark.parametrize("method", [None, *METHODS])
def test_counted_flops_are_those_that_xla_counts(method):
    """XLA counts norms, softmax and activations too: 0.3% of ViT-B/16, with and without reduction."""
    base = variants.CLIP["vit_b16"].vision
    vision = reduced_vision(base, method, (100,) if method == "drop" else (12,)) if method else base
    tower = VisionTower.graph(vision)
    image = jax.ShapeDtypeStruct((4, 224, 224, 3), jnp.float32)
    counted = jax.jit(lambda p, x: tower(p, x)).lower(tower.shapes, image).cost_analysis()["flops"] / 4
    assert counted == pytest.approx(flops.vision_flops(vision), rel=5e-3)


def test_tokens_and_flops_are_the_published_ones():
    """CrossGET's count with fvcore (GMAC of both towers), within 0.5%; the table of ViT-L/14 of its formulas."""
    base = variants.CLIP["vit_b16"]
    image, text = reduced_vision(base.vision, "crossget", (16,)), reduced_text(base.text, (6,))
    bare = (reduced_vision(base.vision, "crossget"), reduced_text(base.text))
    assert [image.tokens_after(n) for n in (0, 1, 10, 11, 12)] == [198, 182, 38, 22, 12]
    assert [text.tokens_after(n) for n in (0, 1, 11, 12)] == [78, 72, 12, 8]
    cost = lambda v, t: (flops.vision_flops(v) + flops.text_flops(t)) / 2e9
    for towers, published in (((base.vision, base.text), 20.567), ((image, bare[1]), 12.036), ((bare[0], text), 19.275),
                              ((image, text), 10.612)):  # fmt: skip
        assert cost(*towers) == pytest.approx(published, rel=5e-3)
    large = dataclasses.replace(variants.CLIP["vit_l14"].vision, exits=(13, 16))
    for removed, costs in ((4, (40.19, 48.10, 66.75)), (8, (35.43, 40.94, 50.94)), (10, (33.08, 37.41, 43.19))):
        tower = reduced_vision(large, "crossget", (removed,))
        assert [flops.vision_flops(tower, e) / 2e9 for e in (13, 16, 24)] == pytest.approx(costs, rel=5e-3)
    for after, kept, share in ((6, 128, 0.620), (8, 128, 0.662), (8, 64, 0.498), (12, 64, 0.623)):
        tower = reduced_vision(large, "drop", (256 - kept,), after=after)
        assert flops.vision_flops(tower) / flops.vision_flops(large) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_share_of_flops_is_met_by_the_schedule_that_removes_least(method):
    base = variants.CLIP["vit_b16"].vision
    tower, full = reduced_vision(base, method, share=0.7), flops.vision_flops(base)
    assert 0.69 < flops.vision_flops(tower) / full <= 0.7
    assert method == "drop" or max(tower.schedule) - min(tower.schedule) <= 1
    with pytest.raises(ModelError, match=r"reduce_to=0.05: with '.*' the tower costs at least 0\.\d+ of its FLOPs"):
        reduced_vision(base, method, share=0.05)


def test_what_a_schedule_cannot_be():
    for method, schedule, message in (
        ("tome", (9,), r"schedule=\(9,\): block 1 has 17 tokens, 1 of them protected, and can merge 0 to 8 of them, not 9"),
        ("crossget", (3, 3, 3, 3), r"block 4 has 9 tokens, 2 of them protected, and can merge 0 to 3"),
        ("pitome", (1,) * 5, "has 5 entries, but the tower has 4 blocks"),
        ("drop", (0, 16), "after block 2 there are 16 patches, and 0 to 15 can be dropped"),
        ("drop", (0, 0, 0, 1), "at most 3 of 4 blocks"),
        ("none", (1,), r"schedule=\(1,\) needs a reduction"),
        ("half", (), "reduce 'half' must be one of"),
    ):
        if method == "crossget":
            schedule = (3, 3, 3, 4)
        with pytest.raises(ModelError, match=message):
            dataclasses.replace(VISION, reduce=method, schedule=schedule)
    with pytest.raises(ModelError, match=r"pool 'first_patch' does not work at exits \(3,\) after dropping patches \(0, 6\)"):
        dataclasses.replace(VISION, pool="first_patch", reduce="drop", schedule=(0, 6))
    with pytest.raises(ModelError, match="merge=.* and reduce='tome' both remove tokens"):
        dataclasses.replace(VISION, merge=(1,), reduce="tome")
    with pytest.raises(ModelError, match="guided by the class token, and this tower has none"):
        dataclasses.replace(VISION, class_token=False, pool="mean", head="mean", reduce="drop", schedule=(0, 6))
    text = TextArch(12, 50, 16, 3, 2, 32, 32, end_id=49)
    with pytest.raises(ModelError, match="'crossget' in the image tower and 'none' in the text tower"):
        ClipArch(dataclasses.replace(VISION, reduce="crossget"), text)
    with pytest.raises(ModelError, match="4 image blocks and 3 text blocks, and 3 does not divide 4"):
        ClipArch(dataclasses.replace(VISION, reduce="crossget"), reduced_text(text))
    with pytest.raises(ModelError, match="text schedule=.*: block 1 has 13 tokens, 3 of them protected, and can merge 0 to 5"):
        reduced_text(text, (6, 0, 0))
    with pytest.raises(ModelError, match="reduce_text=4 in each of 3 blocks asks for 12 tokens, and 10 of 13 can merge"):
        reduced_text(text, (4,))
    assert paired_blocks(4, 2) == [(1, 0), (3, 1)] and paired_blocks(2, 4) == [(0, 1), (1, 3)]
