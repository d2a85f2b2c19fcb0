"""Post-norm text towers with masked padding, and their projections."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icar_jax.errors import ModelError
from icar_jax.models import ops
from icar_jax.models.flops import text_flops
from icar_jax.models.key_bias import biased
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.transformer import Attention, Execution

BERT = TextArch(
    context_length=12, vocabulary=50, width=16, depth=3, heads=2, mlp_width=32, embed_dim=16, norm_eps=1e-12, end_id=2,
    pool="mean", causal=False, post_norm=True, pad_id=0, projection="none",
)  # fmt: skip
ROWS = [[1, 7, 8, 2], [1, 9, 2], [1, 2], [1, 5, 0, 6, 2]]  # one holds the id of the padding within the text


def tokens(rows, length):
    out = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(out)


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)


def by_hand(params, ids):
    """The tower over one text without padding, in numpy; norms have their initial scale 1 and bias 0."""
    x = normalised(params["embed"][ids] + params["pos"][: len(ids)])
    for i in range(BERT.depth):
        p = params["blocks"][str(i)]
        qkv = (x @ p["attn"]["qkv"]["kernel"] + p["attn"]["qkv"]["bias"]).reshape(len(ids), 3, BERT.heads, -1)
        scores = np.einsum("qhk,vhk->hqv", qkv[:, 0], qkv[:, 1]) / np.sqrt(qkv.shape[-1])
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        y = np.einsum("hqv,vhk->qhk", weights, qkv[:, 2]).reshape(len(ids), -1)
        x = normalised(x + y @ p["attn"]["out"]["kernel"] + p["attn"]["out"]["bias"])
        h = np.asarray(ops.gelu_erf(x @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"]))
        x = normalised(x + h @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"])
    return x


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_it_is_bert_and_padding_changes_nothing(pool):
    arch = dataclasses.replace(BERT, pool=pool)
    graph, params = TextTower(arch, rngs=nnx.Rngs(0)).split()
    plain = jax.tree.map(np.asarray, params)
    expected = []
    for ids in ROWS:
        x = by_hand(plain, np.array(ids))
        expected.append(x.mean(0) if pool == "mean" else x[0])
    for length in (5, 8, 12):
        found = graph(params, tokens(ROWS, length))
        np.testing.assert_allclose(found, expected, atol=2e-6)
    for execution in (Execution(), Execution("full"), Execution("none", scan=True)):
        tower = TextTower(arch, execution=execution, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(jax.jit(tower)(tokens(ROWS, 8)), expected, atol=2e-6)


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_a_bias_of_the_keys_is_that_of_the_formula(dtype, atol):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 7, 3, 16)), dtype) for _ in range(3))
    bias = jnp.asarray(rng.normal(size=(2, 7)) * 2, jnp.float32)
    scores = jnp.einsum("bqhk,bvhk->bhqv", *(x.astype(jnp.float32) for x in (q, k))) / 4 + bias[:, None, None]
    expected = jnp.einsum("bhqv,bvhk->bqhk", jax.nn.softmax(scores), v.astype(jnp.float32))
    found = ops.attention(*biased(q, k, v, bias))
    assert found.dtype == dtype and not np.asarray(found[..., 16:], np.float32).any()
    np.testing.assert_allclose(np.asarray(found[..., :16], np.float32), expected, atol=atol)
    gradient = jax.grad(lambda b: ops.attention(*biased(q, k, v, b))[..., :16].astype(jnp.float32).sum())(bias)
    assert np.isfinite(gradient).all()


def test_without_a_bias_attention_calls_what_it_was_given():
    attn = Attention(8, 2, attention=lambda q, k, v, *, causal: v, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 8))
    assert attn(x).shape == attn(x, jnp.zeros((1, 3))).shape == x.shape


@pytest.mark.parametrize("projection, hidden, names", [
    ("linear", 0, {"proj"}), ("linear_mlp", 24, {"proj", "proj_mlp"}), ("mlp", 24, {"proj_mlp"}), ("none", 0, set()),
])  # fmt: skip
def test_projections(projection, hidden, names):
    embed_dim = 16 if projection == "none" else 10
    arch = dataclasses.replace(BERT, projection=projection, projection_width=hidden, embed_dim=embed_dim)
    graph, params = TextTower(arch, rngs=nnx.Rngs(0)).split()
    assert {name for name in params if name.startswith("proj")} == names
    assert ("bias" in params.get("proj_mlp", {}).get("fc1", {})) == (projection == "linear_mlp")
    assert graph(params, tokens(ROWS, 6)).shape == (4, embed_dim)
    linear, mlp = 16 * 10 * (projection[:6] == "linear"), 24 * 26 * (projection[-3:] == "mlp")
    blocks = 3 * (4 * 12 * 256 + 2 * 144 * 16 + 2 * 12 * 16 * 32)
    assert text_flops(arch) == 2 * (blocks + linear + mlp)


@pytest.mark.parametrize("change, message", [
    ({"projection": "cubic"}, "must be one of"), ({"projection": "none", "embed_dim": 8}, "embed_dim 8 must be the 16"),
    ({"projection": "mlp"}, "projection_width 0"), ({"projection_width": 4}, "projection_width 4"),
    ({"pad_id": 50}, "padding 50"), ({"pool": "middle"}, "text pool"),
])  # fmt: skip
def test_contradictions_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(BERT, **change)
