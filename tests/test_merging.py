"""Merged patches: 2 x 2 means against a loop, where exits and routers meet them, and what they cost."""

import dataclasses

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_plan import dot_flops

from icar_jax import checkpoint
from icar_jax.config import ClipConfig, ComplexityConfig, ConfigError
from icar_jax.data.images import Preprocess
from icar_jax.models import flops, registry
from icar_jax.models.clip import Clip
from icar_jax.models.layers import Bridge
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import Vision, VisionArch, merge_patches
from icar_jax.training import plan_flops

ARCH = VisionArch(32, 8, 32, 4, 4, 64, 32, exits=(1, 2, 3), merge_after=2)


def _tower(arch):
    return Bridge(lambda rngs: Vision(arch, rngs=rngs))


def _images(n=3):
    return np.random.default_rng(1).standard_normal((n, 32, 32, 3)).astype(np.float32)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("side", [1, 2, 4, 5, 7])
def test_patches_become_the_means_of_their_windows(side, class_token):
    x = np.random.default_rng(side).standard_normal((2, side**2 + class_token, 3)).astype(np.float32)
    found = np.asarray(merge_patches(jnp.asarray(x), class_token))
    grid = x[:, int(class_token) :].reshape(2, side, side, 3)
    windows = [grid[:, i : i + 2, j : j + 2].mean((1, 2)) for i in range(0, side, 2) for j in range(0, side, 2)]
    expected = np.concatenate([x[:, : int(class_token)], np.stack(windows, 1)], 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_heads_up_to_the_merging_read_all_tokens_and_later_ones_the_means():
    plain = dataclasses.replace(ARCH, merge_after=0)
    params = drawn.params(_tower(ARCH).shapes(), 0)
    merged, whole = _tower(ARCH).bind(params), _tower(plain).bind(params)
    found, without = merged(_images(), (1, 2, 3, 4), jnp.float32), whole(_images(), (1, 2, 3, 4), jnp.float32)
    for exit in (1, 2):
        np.testing.assert_allclose(found[exit], without[exit], atol=1e-6)
    taps = whole.run(whole.embed(jnp.asarray(_images()), jnp.float32), (2,), jnp.float32)
    # The rest of the tower, block by block, on the means.
    x = merge_patches(taps[2], True)
    for number in (3, 4):
        x = whole.blocks[number - 1](x, causal=False, dtype=jnp.float32)
        np.testing.assert_allclose(found[number], whole._embed(x, number, jnp.float32), atol=1e-5)
        assert np.abs(found[number] - without[number]).max() > 1e-3
    assert {e: ARCH.tokens_after(e) for e in ARCH.all_exits} == {1: 17, 2: 17, 3: 5, 4: 5}


@pytest.mark.parametrize("start", [1, 2])
def test_routing_goes_on_from_tokens_before_the_merging(start):
    params = drawn.params(_tower(ARCH).shapes(), 0)
    tower = _tower(ARCH).bind(params)
    whole = tower(_images(), (2, 3, 4), jnp.float32)
    tokens = tower.run(tower.embed(jnp.asarray(_images()), jnp.float32), (start,), jnp.float32)[start]
    for exit, expected in whole.items():
        np.testing.assert_allclose(tower.resume(tokens, start, (exit,), jnp.float32)[exit], expected, atol=1e-5)
    with pytest.raises(ValueError, match="expected 5 tokens after 3 blocks, found 17"):
        tower.resume(tokens, 3, (4,), jnp.float32)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_are_the_same_in_a_loop_and_computed_again(remat):
    params = drawn.params(_tower(ARCH).shapes(), 0)

    def loss(params, execution):
        each = _tower(ARCH).bind(params)(_images(), (1, 4), jnp.float32, execution)
        return sum(jnp.sum(jnp.sin(z)) for z in each.values())

    plain = jax.grad(loss)(params, Execution())
    other = jax.grad(loss)(params, Execution(remat, scan=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, other)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_counted_flops_are_those_of_the_traced_program(after):
    arch = registry.clip_arch(ClipConfig(variant="vit_demo", exits=(2, 4), exit_head="attention", merge_after=after))
    clip = Clip(arch)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    for exit in (2, 4, 6):
        program = jax.make_jaxpr(lambda p, x, e=exit: clip.encode_image(p, x, e))(clip.shapes(), image)
        assert dot_flops(program.jaxpr) == flops.vision_flops(arch.vision, exit)
    program = jax.make_jaxpr(clip.encode_image_exits)(clip.shapes(), image)
    assert dot_flops(program.jaxpr) == plan_flops.image_flops(arch.vision)
    plain = dataclasses.replace(arch.vision, merge_after=0)
    for remat in ("dots", "full"):
        fewer = plan_flops.recomputed_flops(arch.vision, remat) < plan_flops.recomputed_flops(plain, remat)
        assert fewer == bool(after)


def test_what_merging_cannot_go_with():
    for changes, message in (
        ({"merge_after": 6}, "config.clip.merge_after=6 must lie in 1 to 5"),
        ({"merge_after": -1}, "config.clip.merge_after=-1 must lie in"),
        ({"merge_after": 1, "pool": "first_patch"}, "merge_after=1 has merged it before the exits .2."),
    ):
        with pytest.raises(ConfigError, match=message):
            registry.clip_arch(ClipConfig(variant="vit_demo", exits=(2,), **changes))
    registry.clip_arch(ClipConfig(variant="vit_demo", exits=(2,), merge_after=2, pool="first_patch"))
    with pytest.raises(ValueError, match="below the depth"):
        dataclasses.replace(ARCH, merge_after=4)
    with pytest.raises(ValueError, match="cannot pool it"):
        dataclasses.replace(ARCH, pool="first_patch")


def test_a_router_on_the_first_blocks_reads_all_patches(tmp_path):
    arch = registry.clip_arch(ClipConfig(variant="vit_demo", exits=(3,), merge_after=2, patch_size=16))
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(64, "squash").to_dict()}
    folder = checkpoint.write(tmp_path / "model", "clip", description, drawn.params(Clip(arch).shapes(), 0))
    config = ComplexityConfig(variant="blocks", clip=str(folder), blocks=2)
    assert registry.complexity_arch(config).vision.merge_after == 0
    with pytest.raises(ConfigError, match="merges its patches after 2 blocks, and the head reads them all"):
        registry.complexity_arch(dataclasses.replace(config, blocks=3))
