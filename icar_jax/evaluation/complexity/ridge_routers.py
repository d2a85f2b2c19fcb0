"""Complexity models whose head is fitted by ridge regression: features of images, the fit, and the finished checkpoint.

Ratings are standardised within their categories, because those of two categories cannot be compared. The regression predicts
the standardised rating, and the score is its sigmoid.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from icar_jax import architectures, checkpoint, pytree
from icar_jax import config as cfg
from icar_jax import workdir as files
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.ratings.sources import RatedFolder
from icar_jax.data.records import Source, Subset, name_hash
from icar_jax.errors import DataError
from icar_jax.evaluation.complexity import classical
from icar_jax.evaluation.metrics.ridge import Ridge, RidgeFit
from icar_jax.evaluation.metrics.within import indices, mean_within, standardised
from icar_jax.files.arrays import read_npz
from icar_jax.inference.forward import Forward, bucket_sizes
from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.statistics import PER_CHANNEL
from icar_jax.models.token_router import BlocksArch, ScorerArch, scorer_class, shared_paths
from icar_jax.models.variants import BLOCKS

CLASSICAL = "classical"
ALL = "all"  # the category of images without one
FEATURES = "features"  # folder in a workdir
_FOLD_SEED = 0
_MOST_BYTES = 1 << 34  # of a file of features


@dataclass(frozen=True)
class Router:
    """A complexity model without its fitted head.

    Attributes:
        graph: its structure. params: of the backbone or tower, and an unfitted head.
        depths: numbers of blocks whose features are computed together; () for a ConvNeXt.
        description: the first entries of the checkpoint's description.
    """

    graph: Graph
    params: pytree.Tree
    preprocess: Preprocess
    description: dict[str, Any]
    depths: tuple[int, ...] = ()

    @property
    def arch(self) -> ScorerArch:
        return self.graph.arch

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the groups of features that count alike: layers of a ConvNeXt, or class token, mean and deviation."""
        if isinstance(self.arch, BlocksArch):
            width = self.arch.vision.width
            return (width,) * (self.arch.features // width)
        backbone = self.arch.backbone
        if self.arch.pool == "mean":
            return (backbone.dims[3],)
        return tuple(PER_CHANNEL * width for depth, width in zip(backbone.depths, backbone.dims) for _ in range(depth))

    def compute(self, params: Mapping[str, Any], pixels: jax.Array) -> jax.Array:
        """pixels uint8 [B, S, S, 3] -> features float32 [B, F], or [B, len(depths), F] with `depths`."""
        images = normalise(pixels, self.preprocess.mean, self.preprocess.std)
        return self.graph.pooled_after(params, images, self.depths) if self.depths else self.graph.pooled(params, images)

    def key(self) -> str:
        """Hash of all that the features depend on."""
        digest = hashlib.sha256(json.dumps([dataclasses.asdict(self.arch), self.preprocess.to_dict(), self.depths]).encode())
        for path, leaf in sorted(pytree.flatten(self.params).items()):
            if not path.startswith("head/"):
                digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


def convnext_router(config: ExperimentConfig) -> Router:
    """Returns the ConvNeXt of config.complexity, with the backbone of config.train.init if it is set. Raises ConfigError."""
    arch = architectures.complexity_arch(config.complexity)
    assert isinstance(arch, ComplexityArch)
    start = _pretrained(config) if config.train.init else None
    if start is not None:
        arch = dataclasses.replace(arch, backbone=start[0])
    graph = scorer_class(arch).graph(arch)
    params = jax.device_get(scorer_class(arch).init(jax.random.key(config.train.seed), arch))
    if start is not None:
        pytree.require_same(graph.shapes["backbone"], start[1], config.train.init)
        params = {**params, "backbone": start[1]}
    preprocess = Preprocess(arch.image_size, "squash", config.data.interpolation, IMAGENET_MEAN, IMAGENET_STD)
    return Router(graph, params, preprocess, {"arch": dataclasses.asdict(arch)})


def _pretrained(config: ExperimentConfig) -> tuple[ConvNeXtArch, pytree.Tree]:
    """Returns architecture and parameters of the backbone in config.train.init."""
    try:
        folder = checkpoint.find(config.train.init, ("convnext", "complexity"))
        loaded = checkpoint.read(folder, checkpoint.describe(folder)["kind"])
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"config.train.init={config.train.init}: {error}") from error
    about, params = loaded.description["arch"], loaded.params
    if loaded.kind == "complexity":
        if "backbone" not in about:
            raise ConfigError(f"config.train.init={config.train.init} is a head on a vision tower; expected a ConvNeXt")
        about, params = about["backbone"], params["backbone"]
    arch = cfg.from_dict(about, ConvNeXtArch, f"{folder}: arch")
    return dataclasses.replace(arch, num_classes=0), {**params, "head": {"norm": params["head"]["norm"]}}


def blocks_router(config: ExperimentConfig, depths: Sequence[int]) -> Router:
    """Returns a head on the vision tower in config.complexity.clip, with the features after each of `depths` blocks."""
    last = dataclasses.replace(config.complexity, variant=BLOCKS, blocks=max(depths))
    arch, folder = architectures.complexity_arch(last), architectures.routed_clip(last)
    assert isinstance(arch, BlocksArch)
    loaded = checkpoint.read(folder, checkpoint.describe(folder)["kind"])
    graph = scorer_class(arch).graph(arch)
    fresh = jax.device_get(scorer_class(arch).init(jax.random.key(config.train.seed), arch))
    tower, shared = pytree.flatten(loaded.params), shared_paths(fresh)
    params = pytree.map_with_path(lambda path, leaf: tower[shared[path]] if path in shared else leaf, fresh)
    pytree.require_same(graph.shapes, params, str(folder))
    origin = {"clip": config.complexity.clip, "sha256": loaded.description.get("hashes", {}).get(checkpoint.WEIGHTS)}
    preprocess = Preprocess.from_dict(loaded.description["preprocess"])
    return Router(graph, params, preprocess, {"arch": dataclasses.asdict(arch), "tower": origin}, tuple(sorted(depths)))


@dataclass(frozen=True)
class Rated:
    """The readable rated images: names, scores float64 [N], categories and folds int [N]."""

    names: tuple[str, ...]
    scores: np.ndarray
    categories: tuple[str, ...]
    folds: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """Ratings standardised within their categories, [N]."""
        return standardised(self.scores, self.categories)

    def take(self, rows: np.ndarray) -> Rated:
        """Returns the images at the given rows, or where a mask is true."""
        at = np.arange(len(self.names))[rows]
        names, categories = tuple(self.names[i] for i in at), tuple(self.categories[i] for i in at)
        return Rated(names, self.scores[at], categories, self.folds[at])


def rated_images(config: ExperimentConfig, source: Subset, index: np.ndarray) -> Rated:
    """Returns the ratings of the records of a source that `index` lists.

    Raises ConfigError for a category with fewer images than twice the folds, or with equal ratings.
    """
    whole = source.source
    given = whole.categories if isinstance(whole, RatedFolder) and whole.categories else [""] * len(whole)
    chosen = source.indices[index]
    categories = tuple(given[i] or ALL for i in chosen.tolist())
    scores, known = np.asarray(whole.scores, np.float64)[chosen], source.names
    for name, rows in indices(categories).items():
        if len(rows) < 2 * config.complexity.folds or not np.ptp(scores[rows]):
            raise ConfigError(
                f"{source.name}: category {name!r} has {len(rows)} images with ratings from {scores[rows].min():g} to "
                f"{scores[rows].max():g}; cross-validation with config.complexity.folds={config.complexity.folds} needs at "
                f"least {2 * config.complexity.folds} with different ratings; see config.data.categories"
            )
    names = tuple(known[i] for i in index.tolist())
    return Rated(names, scores, categories, stratified(names, categories, config.complexity.folds))


def stratified(names: Sequence[str], categories: Sequence[str], folds: int) -> np.ndarray:
    """Returns the fold int [N] of each image: within each category in turn, in the order of the hashes of the names."""
    found = np.zeros(len(names), int)
    for rows in indices(categories).values():
        order = sorted(rows.tolist(), key=lambda i: name_hash(names[i], _FOLD_SEED))
        found[order] = np.arange(len(order)) % folds
    return found


def all_rated(config: ExperimentConfig) -> Subset:
    """Returns all rated images of config.data, whatever their split. Raises ConfigError, RatingsError, OSError."""
    rated = configured.rated(config.data)
    if rated is None:
        raise ConfigError("config.complexity.fit='ridge' needs rated images: config.data.source=ratings and config.data.root")
    return rated.split("+".join(sorted(rated.counts)))


def measure(
    config: ExperimentConfig, source: Source, routers: Mapping[str, Router], kept: Path | None, classical_too: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns (index int64 [n] of the readable images, {router: features [n, ...]}), all methods in one pass over the images.

    kept: folder where features are kept, so that an interrupted command resumes at the first method that is missing.
    classical_too: also CLASSICAL, the classical measures [n, 6].
    """
    prints = json.dumps(configured.fingerprint(source), sort_keys=True)
    keys = {name: hashlib.sha256(f"{router.key()} {prints}".encode()).hexdigest() for name, router in routers.items()}
    if classical_too:
        keys[CLASSICAL] = hashlib.sha256(f"{sorted(classical.MEASURES)} {prints}".encode()).hexdigest()
    found = {name: known for name, key in keys.items() if kept and (known := _load(kept / f"{name}.npz", key)) is not None}
    for name in keys:
        if name not in found:
            found[name] = _measured(config, source, name, routers.get(name))
            if kept:
                _save(kept / f"{name}.npz", keys[name], *found[name])
    first = next(iter(found.values()))[0]
    for name, (index, _) in found.items():
        if not np.array_equal(index, first):
            raise DataError(f"{source.name}: other images were readable for {name} than before; delete {kept} and run again")
    return first, {name: values for name, (_, values) in found.items()}


def _measured(config: ExperimentConfig, source: Source, name: str, router: Router | None) -> tuple[np.ndarray, np.ndarray]:
    size, bad = config.eval.batch_size, BadFiles()
    forward = Forward(router.compute, jax.device_put(router.params), bucket_sizes(size)) if router else classical.measured
    preprocess = router.preprocess if router else classical.PREPROCESS
    index, values = [], []
    with (
        eval_batches(source, {name: preprocess}, batch_size=size, **configured.loading(config.data)) as batches,
        tqdm(total=len(source), desc=f"features: {name}", unit="image") as bar,
    ):
        for batch in batches:
            bad.add(batch)
            bar.update(len(batch["index"]) + len(batch["bad"]))
            if len(batch["index"]):
                index.append(batch["index"])
                values.append(forward(batch["images"][name]))
    if not index:
        raise DataError(f"no image of {source.name} could be read:\n{bad.summary()}")
    return np.concatenate(index), np.concatenate(values)


def _load(file: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        kept = read_npz(file, DataError, _MOST_BYTES)
        return (kept["index"], kept["values"]) if str(kept["key"]) == key else None
    except (DataError, KeyError):  # missing, or of an interrupted disk: computed again
        return None


def _save(file: Path, key: str, index: np.ndarray, values: np.ndarray) -> None:
    stream = io.BytesIO()
    np.savez(stream, key=np.array(key), index=index, values=values)
    files.write_bytes(file, stream.getvalue())


def fit_head(config: ExperimentConfig, features: np.ndarray, rated: Rated, groups: Sequence[int] = ()) -> RidgeFit:
    """Fits features [N, F] to the standardised ratings; the penalty is the best for images left out one by one."""
    quality = lambda predicted: mean_within("pcc", predicted, rated.scores, rated.categories)
    return Ridge(features, rated.targets, groups).best(config.complexity.penalties, quality)


def fit_router(config: ExperimentConfig, workdir: str | Path) -> Path:
    """Fits the complexity model of a configuration on all rated images; returns WORKDIR/model, its checkpoint.

    Raises ConfigError, RatingsError, CheckpointError, OSError.
    """
    config, workdir = cfg.validate(config), Path(workdir)
    cfg.require_local("--workdir", workdir)
    source = all_rated(config)
    if (workdir / files.CONFIG).is_file():
        files.require_same_config(workdir, config, files.FREE_ON_RESUME)
    checkpoint.require_replaceable(workdir / "model", "complexity")
    on_blocks = config.complexity.variant == BLOCKS
    name = f"blocks_{config.complexity.blocks}" if on_blocks else config.complexity.variant
    router = blocks_router(config, (config.complexity.blocks,)) if on_blocks else convnext_router(config)
    with files.locked(workdir):
        files.save_config(workdir, config)
        files.save_data(workdir, configured.fingerprint(source))
        trained = {"how": "all rated images", "counts": {"train": len(source)}, "splits": dict.fromkeys(source.names, "train")}
        files.write_text(workdir / files.SPLITS, json.dumps(trained, indent=1, ensure_ascii=False) + "\n")
        index, found = measure(config, source, {name: router}, workdir / FEATURES)
        rated = rated_images(config, source, index)
        features = found[name][:, 0] if on_blocks else found[name]
        fit = fit_head(config, features, rated, router.groups)
        about = {"images": len(rated.names), "categories": sorted(set(rated.categories)), "penalty": fit.penalty}
        description = {**router.description, "preprocess": router.preprocess.to_dict(), "ridge": about,
                       "source": {"trained_with": "icar_jax", "fit": "ridge"}}  # fmt: skip
        return checkpoint.write(workdir / "model", "complexity", description, with_head(router.params, fit))


def with_head(params: Mapping[str, Any], fit: RidgeFit) -> pytree.Tree:
    """Returns parameters whose `LinearHead` makes the predictions of a fit."""
    head = {
        "mean": fit.mean, "deviation": fit.deviation,
        "fc": {"kernel": fit.weights[:, None], "bias": np.array([fit.constant])},
    }  # fmt: skip
    return {**params, "head": pytree.map_with_path(lambda _, leaf: np.asarray(leaf, np.float32), head)}
