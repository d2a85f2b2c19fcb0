"""What a Flax user does to a module counts: changes of one block, sow, dropout, LoRA, transforms, filters, optimizers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from icar_jax import pytree
from icar_jax.models.clip import Clip
from icar_jax.models.layers import LayerNorm, Linear
from icar_jax.models.transformer import Attention, Block, Execution
from tests.support.small_clip import ARCH, IMAGES, TOKENS


def after_blocks(clip):
    """[tokens before the first block, after it, ...]."""
    return list(clip.vision(IMAGES, intermediates=True)[1].values())


def test_a_call_gives_every_exit_the_texts_and_the_scales(clip):
    out = clip(IMAGES, TOKENS)
    assert list(out.image) == [1, 3, 4] and out.text.shape == (3, 16) and out.logit_bias == {}
    assert out.logit_scale.keys() == out.image.keys()
    for exit, z in out.image.items():
        np.testing.assert_allclose(z, clip.encode_image(IMAGES, exit=exit), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(out.text, clip.encode_text(TOKENS))
    biased = Clip(dataclasses.replace(ARCH, logit_bias=True), rngs=nnx.Rngs(0))(IMAGES, TOKENS)
    assert {e: float(b) for e, b in biased.logit_bias.items()} == {1: -10.0, 3: -10.0, 4: -10.0}


def test_a_new_module_starts_as_init_does(params):
    made = Clip(ARCH, rngs=nnx.Rngs(jax.random.key(0))).split()[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), made, params)
    np.testing.assert_array_equal(made["vision"]["exits"]["1"]["proj"]["kernel"], made["vision"]["proj"]["kernel"])
    drawn = Clip(ARCH, exit_start="random", rngs=nnx.Rngs(0)).split()[1]["vision"]
    assert not np.array_equal(drawn["exits"]["1"]["proj"]["kernel"], drawn["proj"]["kernel"])


def test_intermediates_are_named_by_block(clip):
    embeds, tokens = clip.vision(IMAGES, (3,), intermediates=True)
    assert list(embeds) == [3] and list(tokens) == ["embed", "blocks/0", "blocks/1", "blocks/2"]
    x = tokens["embed"]
    for i in range(3):
        x = clip.vision.blocks[i](x)
        np.testing.assert_allclose(tokens[f"blocks/{i}"], x, atol=1e-6)


class Doubled(nnx.Module):
    def __call__(self, x):
        return 2 * x


def relu_activation(clip):
    clip.vision.blocks[1].mlp.activation = jax.nn.relu


def uniform_attention(clip):
    mean = lambda q, k, v, *, causal: jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)
    clip.vision.blocks[1].attn.attention = mean


def whole_block(clip):
    clip.vision.blocks[1] = Doubled()


@pytest.mark.parametrize("change", [relu_activation, uniform_attention, whole_block])
def test_one_changed_block_changes_that_block_alone(clip, change):
    before, text = after_blocks(clip), clip.encode_text(TOKENS)
    others = [clip.vision.blocks[i] for i in (0, 2, 3)]
    change(clip)
    after = after_blocks(clip)
    assert [np.array_equal(a, b) for a, b in zip(before, after)] == [True, True, False, False, False]
    assert [clip.vision.blocks[i] for i in (0, 2, 3)] == others
    for i in (2, 3):  # the others do what they did
        np.testing.assert_allclose(after[i + 1], clip.vision.blocks[i](after[i]), atol=1e-6)
    np.testing.assert_array_equal(clip.encode_text(TOKENS), text)
    graph, params = clip.split()
    functional = jax.jit(graph.encode_image)(params, IMAGES)
    np.testing.assert_allclose(functional, clip.encode_image(IMAGES), atol=1e-5)


@pytest.mark.parametrize("change", [relu_activation, uniform_attention, whole_block])
def test_blocks_that_differ_are_not_scanned_and_named(params, change):
    clip = Clip.graph(ARCH, execution=Execution(scan=True)).merge(params)
    np.testing.assert_allclose(clip.encode_image(IMAGES), Clip.graph(ARCH).encode_image(params, IMAGES), atol=1e-5)
    change(clip)
    clip.vision(IMAGES, (1,))  # one block
    with pytest.raises(ValueError, match=r"blocks 1 differ from block 0; run them one by one.*scan=False"):
        clip.encode_image(IMAGES, exit=3)


def test_attention_is_a_constructor_argument_of_every_block(params):
    calls = []

    def counted(q, k, v, *, causal):
        calls.append((q.shape, causal))
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    clip = Clip.graph(ARCH, attention=counted).merge(params)
    expected = Clip.graph(ARCH).merge(params)
    np.testing.assert_allclose(clip.encode_image(IMAGES), expected.encode_image(IMAGES), atol=1e-5)
    np.testing.assert_allclose(clip.encode_text(TOKENS), expected.encode_text(TOKENS), atol=1e-5)
    assert calls == 4 * [((3, 5, 3, 8), False)] + 2 * [((3, 8, 2, 8), True)]


class Sowing(Block):
    def __call__(self, x, scale=None):
        x = super().__call__(x, scale)
        self.sow(nnx.Intermediate, "seen", x)
        return x


def sowing(clip):
    for i in range(4):
        block = Sowing(24, 3, 48, depth=4, rngs=nnx.Rngs(0))
        nnx.update(block, nnx.state(clip.vision.blocks[i]))
        clip.vision.blocks[i] = block


def test_sow_keeps_one_entry_a_block(clip):
    sowing(clip)
    tokens = after_blocks(clip)
    for i in range(4):
        (seen,) = clip.vision.blocks[i].seen
        np.testing.assert_array_equal(seen, tokens[i + 1])
    with pytest.raises(ValueError, match="parameters only.*Intermediate at vision/blocks/0/seen"):
        clip.split()


@pytest.mark.parametrize("execution", [Execution(scan=True), Execution("full"), Execution("dots", scan=True)], ids=str)
def test_what_a_loop_or_remat_would_lose_is_refused(params, execution):
    clip = Clip.graph(ARCH, execution=execution).merge(params)
    sowing(clip)
    with pytest.raises(ValueError, match=r"block \d has non-parameter state \(Intermediate at seen\)"):
        clip.encode_image(IMAGES)


def test_dropout_in_a_block_draws_another_mask_each_call_and_none_in_eval(clip):
    for i in range(4):
        mlp = clip.vision.blocks[i].mlp
        mlp.fc2 = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(i)), mlp.fc2)
    clip.train()
    first, second = clip.encode_image(IMAGES), clip.encode_image(IMAGES)
    assert np.abs(first - second).max() > 1e-3
    clip.eval()
    first, second = clip.encode_image(IMAGES), clip.encode_image(IMAGES)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, Clip.graph(ARCH).encode_image(Clip.init(jax.random.key(0), ARCH), IMAGES), atol=1e-5)


def with_lora(clip, rngs):
    for _, module in list(nnx.iter_modules(clip.vision)):
        if isinstance(module, Attention):
            module.qkv = nnx.LoRA(24, 2, 72, base_module=module.qkv, rngs=rngs)


def with_lora_linear(clip, rngs):
    for block in clip.text.blocks:
        plain = block.mlp.fc1
        block.mlp.fc1 = nnx.LoRALinear(plain.in_features, plain.out_features, lora_rank=2, rngs=rngs)
        block.mlp.fc1.kernel, block.mlp.fc1.bias = plain.kernel, plain.bias


def loss(clip):
    out = clip(IMAGES, TOKENS)
    logits = [out.logit_scale[e] * z @ out.text.T for e, z in out.image.items()]
    return -sum(jnp.trace(jax.nn.log_softmax(x)) for x in logits)


@pytest.mark.parametrize("lora", [with_lora, with_lora_linear])
def test_lora_changes_nothing_at_its_start_and_trains_alone(clip, lora):
    before = float(loss(clip))
    lora(clip, nnx.Rngs(1))
    assert float(loss(clip)) == pytest.approx(before, abs=1e-4)
    base = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(clip, nnx.Not(nnx.LoRAParam))))
    optimizer = nnx.Optimizer(clip, optax.adam(3e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(clip, optimizer):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(clip)
        optimizer.update(clip, grads)
        return value

    values = [float(step(clip, optimizer)) for _ in range(8)]
    assert values[-1] < values[0] - 0.01
    kept = nnx.to_pure_dict(nnx.state(clip, nnx.Not(nnx.LoRAParam)))
    jax.tree.map(np.testing.assert_array_equal, kept, base)
    graph, params = clip.split()
    assert any("lora_a" in path for path in pytree.flatten(params))
    np.testing.assert_allclose(graph.encode_image(params, IMAGES), clip.encode_image(IMAGES), atol=1e-6)


def test_a_loop_of_an_nnx_optimizer_lowers_the_loss(clip):
    optimizer = nnx.Optimizer(clip, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(clip, optimizer):
        value, grads = nnx.value_and_grad(loss)(clip)
        optimizer.update(clip, grads)
        return value

    values = [float(step(clip, optimizer)) for _ in range(10)]
    assert values[-1] < 0.8 * values[0]


def test_transforms_agree_in_both_forms(clip):
    graph, params = clip.split()
    of = lambda p: loss(graph.merge(p))
    tangent = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), params)

    @jax.jit
    def found(params):
        gradient = jax.grad(of)
        dot = lambda tree: sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(tangent)))
        product = jax.jvp(gradient, (params,), (tangent,))[1]
        images = jnp.stack([IMAGES, 2 * IMAGES])
        return {
            "grad": dot(gradient(params)),
            "jvp": jax.jvp(of, (params,), (tangent,))[1],
            "hessian-vector": dot(product),
            "grad of grad": dot(jax.grad(lambda p: dot(gradient(p)))(params)),
            "jvp of jvp": jax.jvp(lambda p: jax.jvp(of, (p,), (tangent,))[1], (params,), (tangent,))[1],
            "vmap": jax.vmap(lambda x: graph.encode_image(params, x))(images),
            "one by one": jnp.stack([graph.encode_image(params, x) for x in images]),
        }

    values = jax.tree.map(np.asarray, found(params))
    assert values["jvp"] == pytest.approx(values["grad"], rel=1e-4, abs=1e-3)
    assert values["grad of grad"] == pytest.approx(values["hessian-vector"], rel=1e-3)
    assert values["jvp of jvp"] == pytest.approx(values["hessian-vector"], rel=1e-3)
    np.testing.assert_allclose(values["vmap"], values["one by one"], atol=1e-5)
    grads = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(clip))
    ours = pytree.flatten(jax.jit(jax.grad(of))(params))
    theirs = pytree.flatten(grads)
    assert theirs.keys() == ours.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(leaf, ours[path], rtol=1e-3, atol=1e-5, err_msg=path)


def test_flax_sees_its_own_layers(clip):
    kinds = [type(m) for _, m in nnx.iter_modules(clip) if isinstance(m, (nnx.Linear, nnx.LayerNorm, nnx.Conv))]
    assert kinds.count(Linear) == (4 + 2) * 4 + 2 * 2 + 2 + 2 and LayerNorm in kinds
    state = nnx.state(clip, lambda path, value: "bias" in path)
    assert state and all("bias" in path for path, _ in nnx.to_flat_state(state))
    assert "Linear" in repr(clip) and "vision" in str(clip)
    table = nnx.tabulate(clip, IMAGES, TOKENS, console_kwargs={"width": 250, "force_terminal": False})
    assert f"Total Parameters: {pytree.count(clip.split()[1]):,}" in table and "vision/blocks/3/mlp/fc2" in table
    clip.text.proj.dot_general = lambda *args, **kwargs: 0 * jax.lax.dot_general(*args, **kwargs)
    assert not np.any(clip.text(TOKENS))


def test_types_of_activations_and_parameters(params):
    half = Clip(ARCH, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    leaves = pytree.flatten(half.split()[1])
    assert {str(leaf.dtype) for path, leaf in leaves.items() if "logit_scale" not in path} == {"bfloat16"}
    out = half(IMAGES, TOKENS)
    assert out.text.dtype == jnp.float32 and out.image[4].dtype == jnp.float32
    assert half.vision(IMAGES, intermediates=True)[1]["blocks/0"].dtype == jnp.bfloat16
    mixed = Clip.graph(ARCH, dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in pytree.flatten(mixed.shapes).values()} == {"float32"}
    near = Clip.graph(ARCH).encode_image(params, IMAGES)
    np.testing.assert_allclose(mixed.encode_image(params, IMAGES), near, atol=0.05)
