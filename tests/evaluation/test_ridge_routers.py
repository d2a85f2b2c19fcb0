"""Complexity models fitted to human ratings by ridge regression: fit, checkpoint, bundle, cross-validation and resumption."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import checkpoint
from icar_jax.config import ConfigError, DataConfig, ExperimentConfig
from icar_jax.data.ratings.sources import open_rated
from icar_jax.data.ratings.table import RatingsError
from icar_jax.evaluation.complexity import cross_validation, ridge_routers
from icar_jax.evaluation.complexity.cross_validation import PUBLISHED, cross_validate, head
from icar_jax.evaluation.metrics.within import MEAN
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.models import variants
from icar_jax.models.convnext import ConvNeXt
from icar_jax.models.vision_arch import VisionArch
from tests.support.runs import random_clip, tiny_config
from tests.training.test_complexity_runs import config_file

SAVOIAS, TOWERS = (Path(os.environ.get(f"ICAR_JAX_{name}", "")) for name in ("SAVOIAS", "TOWERS"))
PER_CATEGORY = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two categories of pictures with 1 to 12 stripes; the ratings of the second are lower and in another order of files."""
    root = tmp_path_factory.mktemp("rated")
    (root / "images").mkdir()
    lines, rng = ["file,score"], np.random.default_rng(0)
    for category, offset in (("ad", 0.4), ("vis_2", 0.0)):
        for i in range(PER_CATEGORY):
            stripes = np.sin(np.linspace(0, (i + 1) * np.pi, 48)) > 0
            pixels = np.tile(np.where(stripes, 220, 40)[:, None, None], (1, 48, 3)) + rng.integers(0, 30, (48, 48, 3))
            name = f"{category}_{i:03}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name)
            lines.append(f"{name},{offset + i / 24:.3f}")
    (root / "ratings.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return random_clip(tmp_path_factory.mktemp("clip") / "clip", VisionArch(32, 8, 16, 3, 2, 32, 24, exits=(2,)))


def settings(folder, clip=None, **complexity):
    config = tiny_config("complexity")
    config.data = DataConfig(source="ratings", root=str(folder), categories="prefix", normalise="imagenet")
    usual = {"fit": "ridge", "folds": 3, "depths": (1,)}
    kind = {"pool": "statistics"} if clip is None else {"variant": "blocks", "clip": str(clip), "blocks": 1}
    config.complexity = dataclasses.replace(config.complexity, **{**usual, **kind, **complexity})
    return config


@pytest.fixture(scope="module", params=["convnext", "blocks"])
def fitted(request, folder, clip, tmp_path_factory):
    """(configuration, workdir) of a model fitted on the pictures."""
    config = settings(folder, clip if request.param == "blocks" else None)
    workdir = tmp_path_factory.mktemp(request.param)
    assert ridge_routers.fit_router(config, workdir) == workdir / "model"
    return config, workdir


def pictures(folder):
    return sorted((folder / "images").iterdir())


def test_categories_of_names_and_of_a_column(folder, tmp_path):
    data = DataConfig(source="ratings", root=str(folder), categories="prefix")
    source = open_rated(data).source
    assert source.categories == ["ad"] * PER_CATEGORY + ["vis_2"] * PER_CATEGORY and source[0].labels == ("ad",)
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    (tmp_path / "ratings.csv").write_text("category,file,score\nart,a.png,0.2\nad,b.png,0.3\n,c.png,0.4\n")
    source = open_rated(DataConfig(source="ratings", root=str(tmp_path))).source
    assert source.categories == ["art", "ad", ""] and source[2].labels == ()
    with pytest.raises(RatingsError, match="a.png names no category: expected CATEGORY/NAME or CATEGORY_NAME"):
        open_rated(dataclasses.replace(data, root=str(tmp_path)))


def test_folds_hold_every_category_alike_and_do_not_depend_on_the_order():
    names, categories = [f"{i}.jpg" for i in range(30)], ["a"] * 10 + ["b"] * 20
    folds = ridge_routers.stratified(names, categories, 5)
    assert [np.bincount(folds[:10], minlength=5).tolist(), np.bincount(folds[10:]).tolist()] == [[2] * 5, [4] * 5]
    turned = ridge_routers.stratified(names[::-1], categories[::-1], 5)
    np.testing.assert_array_equal(turned[::-1], folds)


def test_a_fitted_model_scores_images_as_its_regression(folder, fitted):
    config, workdir = fitted
    on_blocks = config.complexity.variant == "blocks"
    found = checkpoint.describe(workdir / "model")
    assert found["arch"]["readout"] == "linear" and found["ridge"]["images"] == 2 * PER_CATEGORY
    source = ridge_routers.all_rated(config)
    router = ridge_routers.blocks_router(config, (1,)) if on_blocks else ridge_routers.convnext_router(config)
    name = "blocks_1" if on_blocks else config.complexity.variant
    index, features = ridge_routers.measure(config, source, {name: router}, workdir / "features")
    values = features[name][:, 0] if on_blocks else features[name]
    rated = ridge_routers.rated_images(config, source, index)
    fit = ridge_routers.fit_head(config, values, rated, router.groups)
    files = [folder / "images" / name for name in rated.names]
    model = icar_jax.load(workdir, batch_size=8)
    scores = model.score([Image.open(file) for file in files])
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-fit(values))), atol=2e-4)
    assert np.corrcoef(scores[:PER_CATEGORY], rated.scores[:PER_CATEGORY])[0, 1] > 0.8
    if not on_blocks:
        _, heat = jax.jit(lambda x: model.complexity.score_and_map(x, 2))(np.zeros((1, 32, 32, 3), np.float32))
        assert heat.shape == (1, 4, 4) and np.isfinite(heat).all()
    changed = dataclasses.replace(config, complexity=dataclasses.replace(config.complexity, penalties=(2.0,)))
    with pytest.raises(ConfigError, match="config.complexity.penalties"):
        ridge_routers.fit_router(changed, workdir)


def test_a_head_routes_the_clip_it_was_fitted_on(folder, clip, fitted, tmp_path):
    _, head_folder = fitted
    bundle = make_bundle(clip, head_folder, tmp_path / "bundle", calibration=None, thresholds=[0.5])
    model = icar_jax.load(bundle, batch_size=8)
    images = [Image.open(file) for file in pictures(folder)[::6]]
    np.testing.assert_allclose(model.score(images), icar_jax.load(head_folder, batch_size=8).score(images), atol=1e-5)
    assert set(np.unique(model.route(images).exits).tolist()) <= {2, 3}


@pytest.mark.check
def test_cross_validation_compares_all_methods_and_resumes(folder, clip, tmp_path, monkeypatch):
    config = settings(folder)
    monkeypatch.setattr(cross_validation, "CONVNEXT", config.complexity.variant)
    config = settings(folder, clip)
    record = cross_validate(config, tmp_path)
    expected = {"edge_density", "jpeg_bytes", "png_bytes", "regions", "feature_congestion", "subband_entropy", "all_measures",
                "convnextv2_tests", head(1)}  # fmt: skip
    assert set(record.methods) == expected and record.categories == {"ad": PER_CATEGORY, "vis_2": PER_CATEGORY}
    assert record.methods["all_measures"].pcc[MEAN].value > 0.7 and not record.published
    written = json.loads((tmp_path / "ratings.json").read_text())
    assert written["methods"][head(1)]["pcc"]["ad"]["value"] == record.methods[head(1)].pcc["ad"].value
    assert len(record.methods[head(1)].penalties) == 3 and 0.3 < record.methods[head(1)].cost.share < 0.6
    assert record.methods[head(1)].cost.added_flops < record.methods[head(1)].cost.flops
    assert Image.open(tmp_path / "ratings.png").size[0] > 400

    def unexpected(*_):
        raise AssertionError("features that were kept are computed again")

    monkeypatch.setattr(ridge_routers, "_measured", unexpected)
    again = cross_validate(config, tmp_path)
    assert {name: r.pcc for name, r in again.methods.items()} == {name: r.pcc for name, r in record.methods.items()}


def test_too_few_images_of_a_category(folder, clip, tmp_path):
    with pytest.raises(ConfigError, match="category 'ad' has 12 images with ratings from 0.4 to .* at least 14"):
        ridge_routers.fit_router(settings(folder, clip, folds=7), tmp_path)


def test_a_backbone_from_elsewhere_keeps_its_weights(folder, clip, fitted, tmp_path):
    arch = dataclasses.replace(variants.CONVNEXT["convnextv2_tests"], depths=(1, 1, 2, 1))
    params = jax.device_get(ConvNeXt.init(jax.random.key(5), arch))
    checkpoint.write(tmp_path / "nano", "convnext", {"arch": dataclasses.asdict(arch)}, params)
    config = settings(folder)
    config.train.init = str(tmp_path / "nano")
    router = ridge_routers.convnext_router(config)
    assert router.arch.backbone == arch and router.groups == (16, 16, 32, 32, 32)
    jax.tree.map(np.testing.assert_array_equal, router.params["backbone"], params)
    config.train.init = str(clip)
    with pytest.raises(ConfigError, match="config.train.init=.*no checkpoint of kind convnext or complexity"):
        ridge_routers.convnext_router(config)
    _, workdir = fitted
    config.train.init = str(workdir)
    if "backbone" not in checkpoint.describe(workdir / "model")["arch"]:
        with pytest.raises(ConfigError, match="is a head on a vision tower; expected a ConvNeXt"):
            ridge_routers.convnext_router(config)


def test_settings_that_exclude_each_other(folder, clip, tmp_path):
    for changes, message in (
        ({"target": "regret"}, "fits human ratings: expected config.complexity.target='rating'"),
        ({"penalties": (0.0,)}, "penalties=.* must be positive"),
        ({"head": "classification"}, "needs config.complexity.head='regression'"),
    ):
        with pytest.raises(ConfigError, match=message):
            ridge_routers.fit_router(settings(folder, clip, **changes), tmp_path)
    with pytest.raises(ConfigError, match="pool='statistics' is for a ConvNeXt"):
        ridge_routers.fit_router(settings(folder, clip, pool="statistics"), tmp_path)


@pytest.mark.check
@pytest.mark.skipif(not (SAVOIAS / "ratings.csv").is_file(), reason="ICAR_JAX_SAVOIAS names no folder with ratings.csv")
@pytest.mark.parametrize("argument", ["convnext", "6"])
def test_agreement_with_people(tmp_path, argument):
    config: ExperimentConfig = config_file("savoias", argument)
    config.data.root = str(SAVOIAS)
    if argument != "convnext":
        if not (TOWERS / "dinov2_small").is_dir():
            pytest.skip("ICAR_JAX_TOWERS names no folder with dinov2_small/")
        from icar_jax.convert.convert import Options, convert

        convert(TOWERS / "dinov2_small", tmp_path / "tower", Options(image_size=224, preprocess="imagenet"))
        config.complexity.clip, config.complexity.depths = str(tmp_path / "tower"), (6,)
    record = cross_validate(config, tmp_path / "run")
    assert record.published == PUBLISHED and record.images == 992
    name, least = ("convnextv2_micro", 0.70) if argument == "convnext" else (head(6), 0.83)
    assert record.methods[name].pcc[MEAN].value >= least
    assert argument != "convnext" or record.methods[name].cost.parameters < 4e6
