"""A complexity head on the first blocks of a CLIP: training leaves the tower alone, and routing shares it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import icar_jax
from icar_jax import checkpoint, cli, pytree, workdir
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError, DistractorConfig, validate
from icar_jax.convert.stablehlo import export_programs
from icar_jax.data.images import Preprocess
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation.evaluate import evaluate
from icar_jax.evaluation.report.report_figures import write_budget_search
from icar_jax.evaluation.routing.calibration import calibrate, make_bundle
from icar_jax.inference.explain import Explainer
from icar_jax.inference.forward import count_compilations
from icar_jax.inference.router import assign
from icar_jax.inference.shared_router import SharedRouter
from icar_jax.models import variants
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.flops import complexity_flops, router_flops, trunk_flops, vision_flops
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.token_router import BlocksArch, TokenRouter, pool_tokens, scorer_arch, scorer_class, shared_paths
from icar_jax.training.loop import train
from tests.support import drawn
from tests.support.runs import tiny_config
from tests.support.scorers import pictures, write_scorer


@pytest.fixture(scope="module")
def model(shared_bundle):
    return icar_jax.load(shared_bundle, batch_size=8)


def test_routing_on_the_towers_tokens_equals_each_exit_run_alone(model):
    images = pictures(37, seed=3)
    assert isinstance(model.router, SharedRouter) and set(model.preprocesses) == {"clip"}
    routed = model.route(images)
    assert len(set(routed.exits.tolist())) == 3, "the fixture should reach every exit, also the one at block 1 itself"
    np.testing.assert_array_equal(routed.exits, assign(routed.scores, model.exits, model.thresholds))
    for exit in model.exits:
        alone = model.encode_image(images, exit=exit)
        np.testing.assert_allclose(routed.embeddings[routed.exits == exit], alone[routed.exits == exit], atol=1e-5)
    np.testing.assert_allclose(model.score(images), routed.scores, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(routed.embeddings, axis=1), 1, atol=1e-5)


def test_the_scorer_alone_scores_as_in_its_bundle(model, scorer_folder):
    images = pictures(11, seed=4)
    np.testing.assert_allclose(icar_jax.load(scorer_folder, batch_size=8).score(images), model.score(images), atol=1e-6)


@pytest.mark.parametrize("sizes", [(), (1,), (3, 0, 8), (8, 8, 8, 8, 5), (7, 2, 8, 1, 6, 8, 3)])
def test_order_is_kept_over_ragged_batches_of_one_exit(model, sizes):
    """All images to one exit fill its buffer across batches; whatever is cut, rows come back to their images."""
    rng = np.random.default_rng(len(sizes))
    side = model.preprocess.image_size
    batches = [rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8) for n in sizes]
    for thresholds, exit in (((-1.0, 2.0), 2), ((2.0, 2.0), 1), ((-1.0, -1.0), 3)):
        routed = SharedRouter(model.router._tower, thresholds).embed_batches([(b, b) for b in batches], model.embed_dim)
        assert routed.embeddings.shape == (sum(sizes), model.embed_dim) and set(routed.exits.tolist()) <= {exit}
        if sum(sizes):
            np.testing.assert_allclose(routed.embeddings, model.towers[exit](np.concatenate(batches)), atol=1e-5)


def test_nothing_compiles_after_warm_up(model):
    model.warm_up()
    with count_compilations() as compiled:
        for n in (1, 3, 8, 9, 20, 41):
            model.route(pictures(n, seed=n))
            model.score(pictures(n, seed=n))
    assert compiled() == 0


def test_embedding_compiles_what_it_runs_and_no_more(shared_bundle):
    fresh = icar_jax.load(shared_bundle, batch_size=8)
    fresh.warm_up_embed()
    with count_compilations() as compiled:
        fresh.route(pictures(21))
        fresh.route(pictures(2, seed=1))
    assert compiled() == 0
    assert fresh.scorer.forward._jitted._cache_size() == 0, "routing takes its scores from the shared tokens"
    fresh.warm_up()
    assert fresh.scorer.forward._jitted._cache_size() == len(fresh.scorer.forward.buckets)


def test_bfloat16_follows_float32(shared_bundle, model):
    images = pictures(16, seed=9)
    low = icar_jax.load(shared_bundle, batch_size=8, dtype="bfloat16")
    exit = model.exits[-1]
    routed = SharedRouter(low.router._tower, (-1.0, -1.0)).embed_batches(
        [(batch["clip"], None) for batch in low._prepare(images, low.preprocesses)], low.embed_dim
    )  # fmt: skip
    np.testing.assert_allclose(routed.embeddings, low.encode_image(images, exit=exit), atol=0.02)


@pytest.mark.parametrize(("head", "norm_parts"), [("regression", False), ("classification", False), ("regression", True)])
def test_the_map_shares_out_the_log_odds_among_the_patches(head, norm_parts, clip_folder, tmp_path):
    """A cell is how the log odds follow the scale of that patch's token."""
    folder = write_scorer(tmp_path / "model", clip_folder, 1, head, spread=3.0, norm_parts=norm_parts)
    scorer, params = icar_jax.load(folder).scorer.complexity, checkpoint.read(folder, "complexity").params
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    scores, maps = jax.jit(scorer.score_and_map)(params, images)
    np.testing.assert_allclose(scores, jax.jit(scorer.score)(params, images), atol=1e-6)
    assert maps.shape == (2, 4, 4)
    tokens = jax.jit(scorer.tokens)(params, images)

    def odds(scales):
        scaled = tokens._replace(values=tokens.values.at[:, 1:].multiply(scales[:, :, None]))
        return jax.scipy.special.logit(scorer.score_of_tokens(params, scaled)).sum()

    slopes = jax.jit(jax.grad(odds))(np.ones((2, 16), np.float32))
    np.testing.assert_allclose(maps, 16 * slopes.reshape(2, 4, 4), rtol=1e-3, atol=1e-4)
    assert bool(np.all(np.abs(maps.mean(axis=(1, 2))) < 1e-3 * np.abs(maps).max())) == norm_parts


def test_patches_are_explained_in_a_bundle_as_alone(shared_bundle, scorer_folder, tmp_path, capsys):
    images = pictures(3, seed=5)
    found = [Explainer(icar_jax.load(folder, batch_size=1)).explain(images) for folder in (shared_bundle, scorer_folder)]
    for one, other in zip(*found, strict=True):
        assert one.map.shape == (4, 4) and np.ptp(one.map) > 0
        np.testing.assert_allclose(one.map, other.map, atol=1e-4)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    table, maps, sheet = (str(tmp_path / name) for name in ("a.csv", "maps", "s.png"))
    score = ["score", str(tmp_path), "--checkpoint", str(shared_bundle), "--batch-size", "1", "--out", table, "--explain", maps]
    with pytest.raises(SystemExit):
        cli.main([*score, "--explain-stage", "3"])
    assert "--explain-stage: " in capsys.readouterr().err and not (tmp_path / "a.csv").exists()
    cli.main([*score, "--sheet", sheet])
    assert len(list((tmp_path / "maps").glob("*.png"))) == 3 and Image.open(tmp_path / "s.png").width > 500


def test_a_bundle_with_another_tower_is_refused(clip_folder, tmp_path):
    def nudge(flat):
        kernel = np.array(flat["tower/blocks/0/mlp/fc1/kernel"])
        kernel[0, 0] = np.nextafter(kernel[0, 0], 1)
        return flat | {"tower/blocks/0/mlp/fc1/kernel": kernel}

    other = write_scorer(tmp_path / "other", clip_folder, 1, change=nudge)
    with pytest.raises(
        CheckpointError, match=r"a different tower \(vision/blocks/0/mlp/fc1/kernel\).*trained on \(clips/first"
    ):
        make_bundle(clip_folder, other, tmp_path / "bundle", thresholds=(0.3, 0.6))
    assert not (tmp_path / "bundle").exists()


def test_an_edited_bundle_is_refused_when_loaded(shared_bundle, clip_folder, tmp_path):
    shutil.copytree(shared_bundle, tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle" / "complexity")
    write_scorer(tmp_path / "bundle" / "complexity", clip_folder, 2)
    with pytest.raises(CheckpointError, match="exit after block 1, where images would leave before they are scored"):
        icar_jax.load(tmp_path / "bundle")


def test_other_preprocessing_is_refused(clip_folder, scorer_folder, tmp_path):
    read = checkpoint.read(scorer_folder, "complexity")
    description = {**read.description, "preprocess": Preprocess(32, "crop").to_dict()}
    other = checkpoint.write(tmp_path / "other", "complexity", description, read.params)
    with pytest.raises(CheckpointError, match="a different tower .the preprocessing."):
        make_bundle(clip_folder, other, tmp_path / "bundle", thresholds=(0.3, 0.6))


def test_counted_cost_of_the_router_is_its_head():
    vision = variants.CLIP["vit_l14"].vision
    arch = BlocksArch(vision, 2, "classification")
    assert router_flops(arch) == 2 * 3 * 1024 * 2
    assert complexity_flops(arch) == trunk_flops(vision, 2) + router_flops(arch)
    assert trunk_flops(vision, 24) + 2 * 1024 * 768 == vision_flops(vision)
    assert router_flops(arch) < 1e-6 * vision_flops(vision)


def test_an_architecture_without_type_is_a_convnext():
    arch = ComplexityArch(variants.CONVNEXT["convnextv2_demo"], "regression", 32)
    assert scorer_arch(json.loads(json.dumps(dataclasses.asdict(arch))), "arch") == arch
    blocks = BlocksArch(variants.CLIP["vit_demo"].vision, 2, "regression")
    read = scorer_arch(json.loads(json.dumps(dataclasses.asdict(blocks))), "arch")
    assert read == blocks and scorer_class(read) is TokenRouter and scorer_class(arch) is ComplexityModel
    with pytest.raises(ConfigError, match="arch.type='resnet'"):
        scorer_arch({"type": "resnet"}, "arch")


@pytest.mark.parametrize("class_token", [True, False])
def test_pooled_tokens(class_token):
    x = np.random.default_rng(0).normal(size=(3, 10, 4)).astype(np.float32)
    patches = x[:, 1:] if class_token else x
    expected = np.concatenate([*([x[:, 0]] if class_token else []), patches.mean(1), patches.std(1)], axis=1)
    ones = np.ones((3, 10), np.float32)
    np.testing.assert_allclose(pool_tokens(Tokens(x, ones), class_token), expected, atol=1e-6)
    # One token for two patches that are the same says as much as both.
    twice, sizes = np.concatenate([x, x[:, -1:]], axis=1), ones.copy()
    sizes[:, -1] = 2
    found = [pool_tokens(Tokens(*each), class_token) for each in ((twice, np.ones((3, 11), np.float32)), (x, sizes))]
    np.testing.assert_allclose(*found, atol=1e-6)
    flat = jax.grad(lambda t: pool_tokens(Tokens(t, ones[:1, :5]), class_token).sum())(np.ones((1, 5, 2), np.float32))
    assert np.isfinite(flat).all()


def test_parts_of_one_scale_are_read_alike_however_large_each_is():
    vision = variants.CLIP["vit_demo"].vision
    values = np.random.default_rng(0).normal(size=(4, vision.tokens, vision.width)).astype(np.float32)
    tokens = Tokens(values, np.ones(values.shape[:2], np.float32))
    louder = tokens._replace(values=np.concatenate([100 * values[:, :1], values[:, 1:]], axis=1))
    for norm_parts in (True, False):
        scorer = TokenRouter.graph(BlocksArch(vision, 2, "regression", norm_parts=norm_parts))
        params = drawn.params(scorer.shapes, 0)
        plain, loud = (scorer.logits_of_tokens(params, each) for each in (tokens, louder))
        assert bool(np.allclose(plain, loud, atol=1e-3)) == norm_parts


def blocks_config(clip_folder, **train_fields):
    config = tiny_config("complexity", **train_fields)
    config.complexity.variant, config.complexity.head = "blocks", "regression"
    config.complexity.clip, config.complexity.blocks = str(clip_folder), 1
    config.data.scenes_pixels = 32
    return config


def test_training_lowers_the_loss_and_leaves_the_tower_alone(clip_folder, tmp_path):
    config = blocks_config(clip_folder, steps=30, checkpoint_every=30)
    config.complexity.dropout, config.optim.lr, config.optim.ema = 0.0, 3e-3, 0.9
    folder = train(validate(config), tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    trained, clip = checkpoint.read(folder, "complexity"), checkpoint.read(clip_folder, "clip")
    have, want = pytree.flatten(trained.params), pytree.flatten(clip.params)
    shared = shared_paths(trained.params)
    assert len(shared) > 15
    for path, source in shared.items():
        np.testing.assert_array_equal(have[path], want[source])
    assert trained.description["preprocess"] == clip.description["preprocess"]
    assert trained.description["tower"]["sha256"] == clip.description["hashes"][checkpoint.WEIGHTS]
    make_bundle(clip_folder, folder, tmp_path / "bundle", thresholds=(0.4, 0.6))
    assert icar_jax.load(tmp_path / "bundle", batch_size=8).route(pictures(5)).embeddings.shape == (5, 24)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip": ""}, "config.complexity.clip='' but config.complexity.variant='blocks'"),
        ({"clip": "nowhere"}, "config.complexity.clip=nowhere: nowhere does not exist"),
        ({"blocks": 0}, "config.complexity.blocks=0 must lie in 1 to 1, the first exit of"),
        ({"blocks": 2}, "config.complexity.blocks=2 must lie in 1 to 1"),
        ({"variant": "convnextv2_demo", "blocks": 0}, "config.complexity.clip='.*' is for config.complexity.variant='blocks'"),
        ({"pooled_norm": "each"}, "config.complexity.pooled_norm='each'"),
        ({"variant": "convnextv2_demo", "clip": "", "blocks": 0, "pooled_norm": "parts"}, "pooled_norm='parts' is for"),
        ({"variant": "convnextv2_demo", "clip": ""}, "config.complexity.blocks=1 is for config.complexity.variant='blocks'"),
    ],
)
def test_faults_are_named_before_anything_is_written(fields, message, clip_folder, tmp_path):
    config = blocks_config(clip_folder)
    for name, value in fields.items():
        setattr(config.complexity, name, value)
    with pytest.raises(ConfigError, match=message):
        train(validate(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_complexity_model_is_no_clip_to_read(complexity_folder, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint of kind clip or vision in"):
        train(validate(blocks_config(complexity_folder)), tmp_path / "run")


def test_initial_weights_have_one_source(clip_folder):
    with pytest.raises(ConfigError, match="config.train.init='x'.*come from config.complexity.clip"):
        validate(blocks_config(clip_folder, init="x"))


def tiny_run(clip_folder, root):
    """A workdir of train.py's kind with that CLIP in it, which has three exits, and the configuration of its evaluation."""
    config = tiny_config("clip")
    workdir.save_config(root, config)
    shutil.copytree(clip_folder, root / "model")
    return config


@pytest.mark.check
def test_evaluation_routes_by_the_towers_own_tokens_among_distractors_beside_a_smaller_model(clip_folder, tmp_path, capsys):
    """A regression and a classification head; the smaller model is the same one, so that its run must be that of full depth."""
    for head in ("regression", "classification"):
        root = tmp_path / head
        config = tiny_run(clip_folder, root)
        config.eval.complexity = str(write_scorer(root / "scorer", clip_folder, 1, head))
        config.eval.static, config.eval.budgets = str(clip_folder), (0.85,)
        config.eval.distractors = DistractorConfig("scenes", split="test", size=25)
        found = evaluate(config, root)
        runs = found.runs
        assert set(runs) == {"full", "exit_1", "exit_2", "static", "routed", "budget_0.85", "random", "oracle", "lossless"}
        assert found.gallery.images == 55 and found.gallery.distractors == "scenes/test"
        assert dataclasses.replace(runs["static"], images_per_s=runs["full"].images_per_s) == runs["full"]
        assert runs["static"].images_per_s > 0
        apart = runs["routed"].flops_per_image - runs["random"].flops_per_image
        assert apart == pytest.approx(found.routing["router_flops"]) and apart > 0, "the head alone: the blocks are shared"
        assert found.timing.router_ms >= 0 and runs["budget_0.85"].found["cost"] <= 0.85
        page = (root / "report" / "index.html").read_text()
        assert "a shallower baseline" in page and "scenes/test as distractors" in page
        bundle = root / "bundle"
        draw = lambda tried: write_budget_search(tried, root / "frontier.png")
        for how in ({"budget": 0.9}, {"shares": (0.2, 0.5)}, {"max_recall_drop": 5.0, "draw": draw}):
            said = calibrate(bundle, Scenes("calibration", 40), batch_size=8, **how)["routing"]["found"]
            assert said["images"] == 40 and sum(said["reached"].values()) == pytest.approx(1)
        assert Image.open(root / "frontier.png").width > 300


def test_exported_programs_score_as_the_bundle(shared_bundle, model, tmp_path):
    export_programs(shared_bundle, tmp_path / "out", platforms=["cpu"], batch=3)
    about = json.loads((tmp_path / "out" / "icar.json").read_text())["programs"]
    assert list(about) == ["image_1", "image_2", "image_3", "text", "complexity"]
    side = model.preprocess.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    for name, expected in (("complexity", model.scorer.forward(pixels)), ("image_2", model.towers[2](pixels))):
        run = jax.export.deserialize((tmp_path / "out" / about[name]["file"]).read_bytes())
        weights = load_file(tmp_path / "out" / about[name]["weights"])
        np.testing.assert_allclose(run.call(weights, pixels), expected, atol=1e-5)
