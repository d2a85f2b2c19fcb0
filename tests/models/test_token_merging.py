"""Merged patches: the matching against a loop, where exits and routers meet it, and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax import architectures, checkpoint
from icar_jax.config import ClipConfig, ComplexityConfig, ConfigError
from icar_jax.data.images import Preprocess
from icar_jax.models.clip import Clip
from icar_jax.models.flops import trunk_flops
from icar_jax.models.reduction.similar import merge_similar
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import VisionArch, VisionTower
from icar_jax.planner import flops
from tests.support import drawn
from tests.support.counting import require_counted

ARCH = VisionArch(32, 8, 32, 4, 4, 64, 32, exits=(1, 2, 3), merge=(0, 3, 2))


def _tower(arch, execution=Execution()):
    return VisionTower.graph(arch, execution=execution)


def _embed(arch, params, exits, images):
    """Compiled as a whole: op by op it takes a minute."""
    return jax.jit(lambda p, x: _tower(arch)(p, x, exits))(params, images)


merge = jax.jit(lambda x, sizes, *how: merge_similar(Tokens(x, sizes), *how)[:2], static_argnums=(2, 3))


def _images(n=3):
    return np.random.default_rng(1).standard_normal((n, 32, 32, 3)).astype(np.float32)


def by_hand(x, sizes, count, first):
    """One image, patch by patch: tokens [L, W] and sizes [L] -> the same with `count` fewer; `first` tokens are no patches."""
    patches = [(v.astype(np.float64), s) for v, s in zip(x[first:], sizes[first:])]
    seekers, others = patches[::2], patches[1::2]
    cosine = lambda a, b: np.dot(a - a.mean(), b - b.mean()) / np.linalg.norm(a - a.mean()) / np.linalg.norm(b - b.mean())
    found = []
    for n, (value, _) in enumerate(seekers):
        each = [cosine(value, other) for other, _ in others]
        found.append((max(each), n, int(np.argmax(each))))
    going = sorted(found, reverse=True)[:count]
    groups = [[other] for other in others]
    for _, n, m in going:
        groups[m].append(seekers[n])
    stay = [seekers[n] for n in range(len(seekers)) if n not in {n for _, n, _ in going}]
    merged = [(sum(s * v for v, s in group) / sum(s for _, s in group), sum(s for _, s in group)) for group in groups]
    tokens = [*x[:first], *(v for v, _ in stay + merged)]
    return np.stack(tokens), np.array([*sizes[:first], *(s for _, s in stay + merged)])


@pytest.mark.parametrize("prefix", [1, 0, 5])
@pytest.mark.parametrize("patches,count", [(2, 1), (5, 2), (16, 3), (16, 8), (9, 4), (9, 0)])
def test_the_closest_pairs_become_their_weighted_mean(patches, count, prefix):
    rng = np.random.default_rng(patches + count)
    x = rng.standard_normal((3, patches + prefix, 6)).astype(np.float32)
    sizes = rng.integers(1, 4, x.shape[:2]).astype(np.float32)
    tokens, total = merge(x, sizes, count, prefix)
    np.testing.assert_array_equal(tokens[:, :prefix], x[:, :prefix])
    for image in range(3):
        expected, stands_for = by_hand(x[image], sizes[image], count, prefix)
        np.testing.assert_allclose(tokens[image], expected, atol=1e-5)
        np.testing.assert_allclose(total[image], stands_for)
    np.testing.assert_allclose(total.sum(1), sizes.sum(1))


@pytest.mark.parametrize("offset", [0.0, 10.0, -100.0])
def test_a_common_offset_changes_no_match(offset):
    x = np.random.default_rng(3).standard_normal((3, 17, 64)).astype(np.float32)
    plain, sizes = merge(x, np.ones((3, 17), np.float32), 5, 1)
    moved, others = merge(x + np.float32(offset), np.ones((3, 17), np.float32), 5, 1)
    np.testing.assert_array_equal(others, sizes)
    np.testing.assert_allclose(moved - offset, plain, atol=3e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0, 3.0])
def test_a_constant_patch_is_like_no_other(constant):
    """Its cosine is 0 over 0: rounding must not make it the closest of all."""
    x = np.random.default_rng(4).standard_normal((1, 9, 64)).astype(np.float32)
    x[0, 1] = constant  # the first patch, a seeker
    x[0, 4] = x[0, 3]  # a pair that is equal
    tokens, sizes = merge(x, np.ones((1, 9), np.float32), 1, 1)
    assert np.all(np.isfinite(tokens))
    merged = tokens[0][np.asarray(sizes[0]) == 2]
    np.testing.assert_allclose(merged, x[:1, 3], atol=1e-6)


def test_equal_patches_merge_without_loss():
    x = np.random.default_rng(0).standard_normal((1, 4, 6)).astype(np.float32)
    tokens, sizes = merge(np.concatenate([x, x[:, 3:]], 1), np.ones((1, 5), np.float32), 1, 1)
    assert sorted(sizes[0].tolist()) == [1, 1, 1, 2]
    np.testing.assert_allclose(np.sort(tokens, axis=1), np.sort(x, axis=1), atol=1e-6)


def test_heads_up_to_the_merging_read_all_tokens_and_later_ones_what_is_left():
    plain = dataclasses.replace(ARCH, merge=())
    params, images = drawn.params(_tower(ARCH).shapes, 0), _images()
    found, without = (_embed(arch, params, (1, 2, 3, 4), images) for arch in (ARCH, plain))
    for exit in (1, 2):
        np.testing.assert_allclose(found[exit], without[exit], atol=1e-6)
    whole = lambda p: _tower(plain).merge(p)
    x = jax.jit(lambda p, x: whole(p).run(whole(p).embed(x), (2,))[2])(params, images).values
    sizes = np.ones(x.shape[:2])
    # The rest of the tower, block by block and image by image.
    for block, count in ((3, 3), (4, 2)):
        each = [by_hand(np.asarray(one), own, count, 1) for one, own in zip(x, sizes)]
        x, sizes = (np.stack(part).astype(np.float32) for part in zip(*each))
        x = jax.jit(lambda p, x, n=block: whole(p).blocks[n - 1](x))(params, x)
        head = jax.jit(lambda p, x, n=block: whole(p)._embed(Tokens(x, jnp.ones(x.shape[:2])), n, plain))
        np.testing.assert_allclose(found[block], head(params, x), atol=1e-4)
        assert np.abs(found[block] - without[block]).max() > 1e-3
    assert {e: ARCH.tokens_after(e) for e in ARCH.all_exits} == {1: 17, 2: 17, 3: 14, 4: 12}
    assert ARCH.first_merging == 2 and ARCH.exits_after_merging == (3,) and plain.first_merging == 4


@pytest.mark.parametrize("start", [1, 2, 3])
def test_routing_goes_on_from_tokens_before_and_after_the_merging(start):
    params, images = drawn.params(_tower(ARCH).shapes, 0), _images()
    tower = lambda p: _tower(ARCH).merge(p)
    later = tuple(e for e in (2, 3, 4) if e >= start)
    whole = _embed(ARCH, params, later, images)
    begin = jax.jit(lambda p, x: tower(p).run(tower(p).embed(x), (start,))[start])
    rest = jax.jit(lambda p, x: {e: tower(p).resume(x, start, (e,))[e] for e in later})
    tokens = begin(params, images)
    assert tokens.values.shape[1] == tokens.sizes.shape[1] == ARCH.tokens_after(start)
    np.testing.assert_array_equal(tokens.sizes.sum(axis=1), ARCH.tokens)
    for exit, found in rest(params, tokens).items():
        np.testing.assert_allclose(found, whole[exit], atol=1e-5)


def test_gradients_are_the_same_in_a_loop_and_computed_again():
    params = drawn.params(_tower(ARCH).shapes, 0)

    def loss(params, execution):
        each = _tower(ARCH, execution)(params, _images(), (1, 4))
        return sum(jnp.sum(jnp.sin(z)) for z in each.values())

    run = lambda execution: jax.jit(jax.grad(lambda p: loss(p, execution)))(params)
    plain, other = run(Execution()), run(Execution("full", scan=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, other)


@pytest.mark.parametrize("merge", [(), (30,), (0, 7, 0, 5, 2)])
def test_counted_flops_are_those_of_the_traced_program(merge):
    arch = architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2, 4), exit_head="attention", merge=merge))
    require_counted(arch)
    plain = dataclasses.replace(arch.vision, merge=())
    for remat in ("dots", "full"):
        fewer = flops.recomputed_flops(arch.vision, remat) < flops.recomputed_flops(plain, remat)
        assert fewer == bool(merge)


def test_what_merging_cannot_go_with():
    demo = ClipConfig(variant="vit_demo", exits=(2,), patch_size=16)
    for merge, message in (
        ((0,) * 6, "config.clip: merge=.* has 6 entries, but a tower of 6 blocks"),
        ((9,), "after 1 blocks: 9 must lie in 0 to 8, half of the patches left"),
        ((8, 5), "after 2 blocks: 5 must lie in 0 to 4"),
        ((-1,), "-1 must lie in 0 to 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            architectures.clip_arch(dataclasses.replace(demo, merge=merge))
    with pytest.raises(ConfigError, match="config.clip: pool 'first_patch' does not work at exits .2,. after token"):
        architectures.clip_arch(dataclasses.replace(demo, merge=(1,), pool="first_patch"))
    with pytest.raises(ValueError, match="pool 'first_patch' does not work at exits .2, 3."):
        dataclasses.replace(ARCH, pool="first_patch", merge=(1,))
    architectures.clip_arch(dataclasses.replace(demo, merge=(0, 1), pool="first_patch"))
    architectures.clip_arch(dataclasses.replace(demo, merge=(1,), pool="mean"))  # weighted by the sizes of patches
    with pytest.raises(ValueError, match="has 4 entries"):
        dataclasses.replace(ARCH, merge=(0, 0, 0, 1))


def test_a_router_reads_what_the_tower_has_merged_by_then(tmp_path):
    arch = architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(3,), merge=(0, 2, 2), patch_size=16))
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(64, "squash").to_dict()}
    folder = checkpoint.write(tmp_path / "model", "clip", description, drawn.params(Clip.graph(arch).shapes, 0))
    config = ComplexityConfig(variant="blocks", clip=str(folder), blocks=2)
    assert architectures.complexity_arch(config).vision.merge == ()
    later = architectures.complexity_arch(dataclasses.replace(config, blocks=3))
    assert later.vision.merge == (0, 2) and later.vision.exits == ()
    assert dataclasses.replace(arch.vision, merge=(0, 2, 0, 1)).reduction_until(4)["merge"] == (0, 2)
    assert trunk_flops(later.vision, 3) == trunk_flops(arch.vision, 3)
    with pytest.raises(ConfigError, match="config.complexity.blocks=4 must lie in 1 to 3, the first exit"):
        architectures.complexity_arch(dataclasses.replace(config, blocks=4))
