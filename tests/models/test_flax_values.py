"""Modules and graphs as values: copies, pickles, equality, wrong calls, settings of layers, blocks replaced."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icar_jax.models.clip import Clip
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.ops import gelu_erf
from icar_jax.models.transformer import Block, Execution
from tests.support.small_clip import ARCH, IMAGES, TOKENS


@pytest.mark.parametrize("make", [
    lambda: Clip(ARCH, rngs=nnx.Rngs(0)),
    lambda: ComplexityModel(ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8)), "classification", 32), rngs=nnx.Rngs(0)),
], ids=["clip", "complexity"])  # fmt: skip
def test_a_module_pickles_copies_and_deep_copies(make):
    module = make()
    graph, params = module.split()
    for other in (pickle.loads(pickle.dumps(module)), copy.copy(module), copy.deepcopy(module)):
        assert type(other) is type(module) and other.split()[0] == graph
        jax.tree.map(np.testing.assert_array_equal, other.split()[1], params)
    again = pickle.loads(pickle.dumps(graph))
    assert again == graph and hash(again) == hash(graph) and again.shapes == graph.shapes
    deep = copy.deepcopy(module)
    state = nnx.state(deep)
    nnx.update(deep, jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, module.split()[1], params)


def test_graphs_are_values(params):
    graph = Clip.graph(ARCH)
    assert graph == Clip.graph(ARCH) != Clip.graph(ARCH, dtype=jnp.bfloat16) and len({graph, Clip.graph(ARCH)}) == 1
    assert graph.arch == ARCH and "Clip" in repr(graph) and graph.encode_text.__doc__
    static = jax.jit(graph.encode_image, static_argnames="exit")
    np.testing.assert_allclose(static(params, IMAGES, exit=1), graph.encode_image(params, IMAGES, 1), atol=1e-5)
    with pytest.raises(KeyError, match="missing parameter vision/proj/kernel"):
        graph.merge({**params, "vision": {**params["vision"], "proj": {}}})
    with pytest.raises(AttributeError, match="encode_sound"):
        graph.encode_sound


@pytest.mark.parametrize("call, error, message", [
    (lambda c: c.encode_image(np.zeros((2, 3, 16, 16), np.float32)), ValueError, r"\[batch, 16, 16, 3\], channels last.*got"),
    (lambda c: c.encode_image(np.zeros((16, 16, 3), np.float32)), ValueError, r"got \[16, 16, 3\]"),
    (lambda c: c.encode_image(np.zeros((2, 24, 24, 3), np.float32)), ValueError, r"must be \[batch, 16, 16, 3\].*got \[2, 24"),
    (lambda c: c.encode_image(np.zeros((2, 16, 16, 3), np.uint8)), TypeError, "normalised floats, got uint8.*normalise"),
    (lambda c: c.encode_image(IMAGES, exit=2), ValueError, r"exit=2 has no head; .* exits after \(1, 3, 4\) blocks"),
    (lambda c: c.encode_text(np.zeros((2, 9), np.int32)), ValueError, r"at most 8, the context of.*got \[2, 9\]"),
    (lambda c: c.encode_text(np.zeros((2, 8), np.float32)), TypeError, "tokens must be integer ids, got float32"),
    (lambda c: c.encode_text(np.zeros(8, np.int32)), ValueError, r"must be \[batch, length\].*got \[8\]"),
])  # fmt: skip
def test_a_wrong_call_says_what_to_do(clip, call, error, message):
    with pytest.raises(error, match=message):
        call(clip)


def test_rank_promotion_and_transfers_may_be_forbidden(params):
    graph = Clip.graph(ARCH)
    scorer = ComplexityModel.graph(ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8), 1), "regression", 32))
    scorer_params = ComplexityModel.init(jax.random.key(0), scorer.arch)
    grad = jax.jit(jax.grad(lambda p, x, t: loss_of(graph, p, x, t)))
    score = jax.jit(jax.grad(lambda p, x: scorer.score(p, x).sum()))
    put = jax.device_put((params, IMAGES, TOKENS, scorer_params, np.ones((2, 32, 32, 3), np.float32)))
    with jax.numpy_rank_promotion("raise"), jax.transfer_guard("disallow"):
        jax.block_until_ready((grad(*put[:3]), score(*put[3:])))


def loss_of(graph, params, images, tokens):
    out = graph(params, images, tokens)
    return sum(jnp.sum(z @ out.text.T) for z in out.image.values())


def test_settings_of_a_layer_count(clip):
    embeds = clip.encode_image(IMAGES)
    clip.vision.ln_pre.reduction_axes = (1, 2)
    assert np.abs(clip.encode_image(IMAGES) - embeds).max() > 1e-3
    clip.vision.patch.strides = (4, 4)
    assert clip.vision.patch(IMAGES).shape == (3, 3, 3, 24)


def test_blocks_are_replaced_and_not_added_or_taken_out(clip):
    clip.vision.blocks.append(Block(24, 3, 48, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="built with 4 blocks and now has 5"):
        clip.encode_image(IMAGES)
    clip.text.blocks = nnx.List(list(clip.text.blocks)[:1])
    with pytest.raises(ValueError, match="built with 2 blocks and now has 1"):
        clip.encode_text(TOKENS)


class Scaled(nnx.Module):
    """A block with a matrix that it reads in float32, whatever x is."""

    def __init__(self, seed):
        self.table = nnx.Param(jnp.asarray(np.random.default_rng(seed).standard_normal((5, 24)), jnp.float32))

    def __call__(self, x):
        return (x.astype(jnp.float32) + self.table[...][None]).astype(x.dtype)


def test_a_scan_rounds_no_parameter_that_the_loop_keeps(params):
    found = []
    for scan in (False, True):
        clip = Clip.graph(ARCH, execution=Execution(scan=scan), dtype=jnp.bfloat16).merge(params)
        for i in range(4):
            clip.vision.blocks[i] = Scaled(i)
        found.append(clip.vision(IMAGES, (4,))[4])
    np.testing.assert_array_equal(*found)


def test_parts_of_a_graph_are_graphs_and_functions_are_kept(params):
    graph = Clip.graph(ARCH)
    assert graph.encode_image is graph.encode_image and graph.vision is graph.vision
    found, expected = graph.vision(params["vision"], IMAGES), graph.merge(params).vision(IMAGES)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("call, message", [
    (lambda c: c.encode_text(["a red square"]), "integer array .*, got list; encode texts with a Tokenizer"),
    (lambda c: c.encode_image([[0.0]]), "float array .*, got list"),
    (lambda c: Clip("vit_b32", rngs=nnx.Rngs(0)), r"arch must be a ClipArch, such as icar_jax.variants"),
])  # fmt: skip
def test_other_types_are_named(clip, call, message):
    with pytest.raises(TypeError, match=message):
        call(clip)


def test_gradients_inside_shard_map():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(gelu_erf(x))))
    found = jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_allclose(found, grad(x), atol=1e-6)
