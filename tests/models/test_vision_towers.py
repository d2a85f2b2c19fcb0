"""Parts of pretrained vision towers: registers, SwiGLU, poolings and projections against numpy, and what they cost."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icar_jax import checkpoint, pytree
from icar_jax.data.images import Preprocess
from icar_jax.errors import ModelError
from icar_jax.models import flops
from icar_jax.models.clip import Clip, ClipArch, exit_sources, start_exits_from_final
from icar_jax.models.reduction.similar import merge_similar
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.swiglu import SwiGlu
from icar_jax.models.text import TextArch
from icar_jax.models.token_router import BlocksArch, TokenRouter, pool_tokens
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import ExitHead, VisionArch, VisionTower
from icar_jax.parallel.rules import RULES, spec_for
from icar_jax.planner import flops as plan_flops
from icar_jax.training import init_weights
from tests.support import drawn
from tests.support import reference as ref
from tests.support.counting import require_counted

BARE = VisionArch(24, 8, 16, 3, 2, 24, 16, patch_bias=True, pre_norm=False, norm_eps=1e-6, registers=2, projection="none",
    exit_eps=1e-3)  # fmt: skip
PROJECTIONS = ("linear", "linear_mlp", "none")


def with_head(head, projection="none", **changes):
    pooled = 32 if head == "cls_mean" else 16
    hidden = 20 if projection == "linear_mlp" else 0
    embed_dim = pooled if projection == "none" else 12
    return dataclasses.replace(
        BARE, head=head, embed_dim=embed_dim, projection=projection, projection_width=hidden, **changes
    )  # fmt: skip


def images(n=2, side=24):
    return np.random.default_rng(1).standard_normal((n, side, side, 3)).astype(np.float32)


def random(shapes, seed=0):
    """Norms and biases at random too: at their start values a dropped one would not show."""
    rng = np.random.default_rng(seed)
    return pytree.map_with_path(
        lambda path, leaf: (0.4 * rng.standard_normal(leaf.shape) + path.endswith("scale")).astype(np.float32), shapes
    )


def tower_of(arch, seed=0):
    graph = VisionTower.graph(arch)
    return graph, random(graph.shapes, seed)


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, p):
    gate, value = np.split(ref.linear(x, p["fc1"]), 2, axis=-1)
    return ref.linear(silu(gate) * value, p["fc2"])


def stream(image, p, arch, blocks):
    """One image [S, S, 3] -> tokens [L, W] after `blocks` blocks, without merging, in float64."""
    size, side = arch.patch_size, arch.grid
    kernel = p["patch"]["kernel"].reshape(-1, arch.width)
    cells = [image[r * size :][:size, c * size :][:, :size].reshape(-1) for r in range(side) for c in range(side)]
    patches = np.stack(cells) @ kernel + p["patch"]["bias"]
    pos = p["pos"]
    before = [p["cls"] + pos[0]] if arch.class_token else []
    x = np.stack([*before, *p.get("registers", ()), *(patches + pos[int(arch.class_token) :])])
    for i in range(blocks):
        block = p["blocks"][str(i)]
        x = x + ref.attention(ref.layer_norm(x, block["ln1"], arch.norm_eps), block["attn"], arch.heads, False)
        y = ref.layer_norm(x, block["ln2"], arch.norm_eps)
        mlp = lambda y, m=block["mlp"]: ref.linear(ref.gelu(ref.linear(y, m["fc1"])), m["fc2"])
        x = x + (swiglu(y, block["mlp"]) if arch.ffn == "swiglu" else mlp(y))
    return x


def headed(x, p, arch, exit):
    """Tokens [L, W] -> the embedding of the head after `exit` blocks, in float64."""
    early = exit != arch.depth
    head, pool = (p["exits"][str(exit)], arch.pool) if early else (p, arch.head)
    norm = lambda z: ref.layer_norm(z, head["ln" if early else "ln_post"], arch.exit_eps if early else arch.norm_eps)
    parts = {"cls": x[0], "mean": x[arch.prefix :].mean(0)}
    z = np.concatenate([norm(parts[name]) for name in pool.split("_")])
    if arch.projection == "none":
        return z
    out = ref.linear(z, head["proj"])
    if arch.projection == "linear_mlp":
        out = out + ref.linear(ref.gelu(ref.linear(z, head["proj_mlp"]["fc1"])), head["proj_mlp"]["fc2"])
    return out


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("head", ["cls", "mean", "cls_mean"])
def test_every_head_against_numpy(head, projection):
    arch = with_head(head, projection, exits=(1, 2), pool=head, ffn="swiglu" if head == "mean" else "mlp")
    graph, params = tower_of(arch)
    found = jax.jit(graph)(params, images())
    for exit in (1, 2, 3):
        assert found[exit].shape == (2, arch.embed_dim) and found[exit].dtype == jnp.float32
        for row, image in zip(found[exit], images().astype(np.float64), strict=True):
            x = stream(image, ref.f64(params), arch, exit)
            np.testing.assert_allclose(row, headed(x, ref.f64(params), arch, exit), atol=2e-5, rtol=2e-5)


def test_a_tower_without_class_token_keeps_its_registers_first():
    arch = with_head("mean", class_token=False)
    graph, params = tower_of(arch)
    assert (arch.prefix, arch.tokens, params["pos"].shape) == (2, 11, (9, 16))
    found, tokens = jax.jit(lambda p, x: graph(p, x, intermediates=True))(params, images())
    np.testing.assert_array_equal(tokens["embed"][0, :2], params["registers"])
    for row, image in zip(found[3], images().astype(np.float64), strict=True):
        x = stream(image, ref.f64(params), arch, 3)
        np.testing.assert_allclose(row, headed(x, ref.f64(params), arch, 3), atol=2e-5, rtol=2e-5)


def test_swiglu_against_numpy():
    graph = SwiGlu.graph(16, 24)
    params = random(graph.shapes)
    assert {path: leaf.shape for path, leaf in pytree.flatten(graph.shapes).items()} == {
        "fc1/kernel": (16, 48), "fc1/bias": (48,), "fc2/kernel": (24, 16), "fc2/bias": (16,),
    }  # fmt: skip
    x = np.random.default_rng(2).standard_normal((2, 5, 16)).astype(np.float32)
    np.testing.assert_allclose(graph(params, x), swiglu(x.astype(np.float64), ref.f64(params)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_execution_changes_no_value(ffn):
    arch = with_head("cls_mean", "linear", ffn=ffn)
    params = random(VisionTower.graph(arch).shapes)

    def loss(execution):
        graph = VisionTower.graph(arch, execution=execution)
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(graph(p, images())[3]))))(params)

    plain = loss(Execution())
    for execution in (Execution(scan=True), Execution("dots"), Execution("full", scan=True)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, loss(execution))


# --- merging ---------------------------------------------------------------------------------------------------------------


def test_registers_and_class_token_are_not_merged():
    arch = with_head("cls_mean", merge=(3, 2))
    graph, params = tower_of(arch)
    tower = lambda p: graph.merge(p)
    taps = jax.jit(lambda p, x: tower(p).run(tower(p).embed(x), (1, 2, 3)))(params, images())
    assert [taps[n].values.shape[1] for n in (1, 2, 3)] == [arch.tokens_after(n) for n in (1, 2, 3)] == [12, 9, 7]
    for n in (1, 2, 3):
        np.testing.assert_array_equal(taps[n].sizes[:, :3], 1)
        np.testing.assert_allclose(taps[n].sizes.sum(axis=1), arch.tokens)
    merged = merge_similar(taps[1], 3, arch.prefix)
    np.testing.assert_array_equal(merged.values[:, :3], taps[1].values[:, :3])
    second = jax.jit(lambda p, x: tower(p).blocks[1](x))(params, merged.values)
    np.testing.assert_allclose(second, taps[2].values, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls_mean"])
def test_a_mean_after_merging_is_weighted_by_the_patches_in_each_token(pool):
    arch = with_head(pool, "linear", exits=(2,), pool=pool, merge=(3, 2))
    graph, params = tower_of(arch)
    found = jax.jit(graph)(params, images())
    tower = lambda p: graph.merge(p)
    taps = jax.jit(lambda p, x: tower(p).run(tower(p).embed(x), (2, 3)))(params, images())
    for exit in (2, 3):
        for row, x, sizes in zip(found[exit], *map(np.asarray, taps[exit][:2]), strict=True):
            each = np.repeat(x[3:], sizes[3:].astype(int), axis=0)  # a token that stands for two patches counts twice
            assert len(each) == 9
            expected = headed(np.concatenate([x[:3], each]).astype(np.float64), ref.f64(params), arch, exit)
            np.testing.assert_allclose(row, expected, atol=2e-5, rtol=2e-5)


def test_only_a_mean_after_merging_hands_sizes_to_a_head():
    """A head of the user that takes tokens alone still works where it reads another token."""
    arch = dataclasses.replace(BARE, embed_dim=12, projection="linear", exits=(2,), merge=(3,))
    tower = VisionTower(arch, rngs=nnx.Rngs(0))

    class Own(ExitHead):
        def __call__(self, x):
            return self.proj(x[:, 0])

    tower.exits["2"] = Own(arch, rngs=nnx.Rngs(0))
    assert tower(images(), (2,))[2].shape == (2, 12)


def test_a_router_leaves_registers_out():
    x = np.random.default_rng(0).standard_normal((2, 12, 16)).astype(np.float32)
    found = pool_tokens(Tokens(x, np.ones((2, 12), np.float32)), True, 2)
    expected = np.concatenate([x[:, 0], x[:, 3:].mean(1), x[:, 3:].std(1)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    arch = BlocksArch(BARE, 2, "regression")
    router = TokenRouter.graph(arch)
    params = random(router.shapes)
    scores, maps = jax.jit(router.score_and_map)(params, images())
    assert arch.features == 48 and scores.shape == (2,) and maps.shape == (2, 3, 3)


# --- cost and parameters ---------------------------------------------------------------------------------------------------


def clip_of(vision):
    return ClipArch(vision, TextArch(6, 32, 8, 1, 2, 16, vision.embed_dim, end_id=31))


@pytest.mark.parametrize("merge", [(), (3, 2)])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("head", ["cls", "mean", "cls_mean"])
def test_counted_flops_are_those_of_the_traced_program(head, projection, ffn, merge):
    arch = with_head(head, projection, exits=(2,), pool=head, ffn=ffn, merge=merge)
    require_counted(clip_of(arch))
    assert plan_flops.recomputed_flops(arch, "full") > plan_flops.recomputed_flops(arch, "dots")


def test_registers_and_gates_cost_what_they_are():
    plain = dataclasses.replace(BARE, registers=0)
    assert flops.trunk_flops(BARE, 3) > flops.trunk_flops(plain, 3)
    gated = dataclasses.replace(BARE, ffn="swiglu")
    assert flops.trunk_flops(gated, 3) - flops.trunk_flops(BARE, 3) == 3 * 2 * 12 * 16 * 24


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("head", ["cls", "cls_mean"])
def test_exits_start_from_the_whole_head(head, projection):
    shapes = Clip.graph(clip_of(with_head(head, projection, exits=(1,), pool=head))).shapes
    sources = exit_sources(shapes)
    assert {path for path in pytree.flatten(shapes) if path.startswith("vision/exits/")} <= set(sources)
    flat = pytree.flatten(start_exits_from_final(drawn.params(shapes, 0)))
    for path, source in sources.items():
        np.testing.assert_array_equal(flat[path], flat[source], path)


def test_every_large_parameter_has_a_rule_of_sharding():
    arch = with_head("cls_mean", "linear_mlp", exits=(1,), pool="cls_mean", ffn="swiglu")
    paths = pytree.flatten(Clip.graph(clip_of(arch)).shapes)
    assert [path for path in paths if not any(re.search(pattern, path) for pattern, _ in RULES)] == []
    assert str(spec_for("vision/blocks/0/mlp/fc1/kernel", (16, 48), {"fsdp": 2, "tensor": 2})) == str(RULES[3][1])


def test_a_tower_of_the_clip_kind_keeps_its_parameters():
    old = VisionArch(32, 8, 32, 3, 4, 64, 24, exits=(1, 2))
    assert set(pytree.flatten(VisionTower.graph(old).shapes)) == {
        "patch/kernel", "cls", "pos", "ln_pre/scale", "ln_pre/bias", "ln_post/scale", "ln_post/bias", "proj/kernel",
        *(f"exits/{e}/{leaf}" for e in (1, 2) for leaf in ("ln/scale", "ln/bias", "proj/kernel")),
        *(f"blocks/{i}/{ln}/{leaf}" for i in range(3) for ln in ("ln1", "ln2") for leaf in ("scale", "bias")),
        *(f"blocks/{i}/{layer}/{leaf}" for i in range(3) for layer in ("attn/qkv", "attn/out", "mlp/fc1", "mlp/fc2")
          for leaf in ("kernel", "bias")),
    }  # fmt: skip


def test_a_run_takes_the_tower_from_its_initial_weights(tmp_path):
    """What no configuration field sets, such as registers and the projection, is that of the checkpoint."""
    saved = clip_of(with_head("cls_mean", "linear_mlp", exits=(1,), pool="cls_mean", ffn="swiglu"))
    about = {"arch": dataclasses.asdict(saved), "preprocess": Preprocess(24, resize_to=28).to_dict()}
    params = drawn.params(Clip.graph(saved).shapes, 0)
    model = checkpoint.write(tmp_path / "model", "clip", about, params)
    plain = VisionArch(24, 8, 16, 3, 2, 24, 12, exits=(1, 2))
    run = init_weights.adopt(clip_of(plain), model)
    assert run.vision == dataclasses.replace(saved.vision, exits=(1, 2))
    found, notes = init_weights.load_params(model, "clip", run, Clip.graph(run).shapes), []
    flat, own = pytree.flatten(found), pytree.flatten(params)
    np.testing.assert_array_equal(flat["vision/registers"], own["vision/registers"])
    np.testing.assert_array_equal(flat["vision/exits/2/proj_mlp/fc1/kernel"], own["vision/proj_mlp/fc1/kernel"])
    init_weights.note_preprocessing(model, "clip", Preprocess(24), notes.append)
    assert "resize_to 28 in the checkpoint, 0 in the run" in notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": -1}, "registers=-1 must lie in 0 to 4,096"),
        ({"ffn": "moe"}, "ffn 'moe' must be one of"),
        ({"projection": "deep"}, "projection 'deep' must be one of"),
        ({"projection": "linear_mlp"}, "projection_width 0 is the hidden width"),
        ({"projection_width": 8}, "projection_width 8 is the hidden width"),
        ({"embed_dim": 12}, "embed_dim 12 must be the 16 channels"),
        ({"head": "cls_mean"}, "embed_dim 16 must be the 32 channels"),
        ({"head": "max"}, "head 'max' one of"),
        ({"class_token": False}, "without a class token cannot pool 'cls'"),
        ({"class_token": False, "head": "cls_mean", "embed_dim": 32}, "without a class token cannot pool 'cls_mean'"),
        ({"class_token": False, "head": "mean", "exits": (1,)}, "without a class token cannot pool 'cls'"),
        ({"exits": (1,), "pool": "cls_mean"}, "use 'cls_mean' for both or for neither"),
        ({"exits": (1,), "head": "cls_mean", "embed_dim": 32}, "use 'cls_mean' for both or for neither"),
        ({"exits": (1,), "head": "cls_mean", "pool": "cls_mean", "embed_dim": 32, "exit_head": "adapter"}, "need exit head"),
        ({"exits": (1,), "exit_sum": True}, "exit_sum sums projections, but a tower with projection 'none'"),
        ({"head": "map", "pool": "map"}, "an attention-pool head has no projection; leave projection 'none'"),
    ],
)
def test_contradictions_are_refused_by_name(changes, message):
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(BARE, **changes)
