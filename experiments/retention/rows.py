"""Evaluates one trained run: every exit, every router at every budget, and random routing and oracle at the same shares.

Writes rows.json (kind and cost of each row) and rows.npz (hits per image, ranks, scores, cosines) next to the model; report.py
and why_exits.py make their tables from them. Thresholds are set on calibration images only.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icar_jax import checkpoint
from icar_jax import workdir as files
from icar_jax.cli.errors import user_errors
from icar_jax.config import ConfigError, ExperimentConfig, from_dict
from icar_jax.data import configured
from icar_jax.data.records import Source, Subset
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation.metrics.bootstrap import Hits
from icar_jax.evaluation.metrics.ranking import local_mesh
from icar_jax.evaluation.metrics.retrieval import RECALL_AT, Distractors, Ranks, ranks
from icar_jax.evaluation.metrics.seeds import mean_recall_hits
from icar_jax.evaluation.records.plain import plain
from icar_jax.evaluation.routing import score_calibration, timing
from icar_jax.evaluation.routing.assignments import oracle_exits_at_share, random_exits, ranks_alone, ranks_mixed, take_exits
from icar_jax.evaluation.routing.calibration import model_costs, score_source
from icar_jax.evaluation.routing.gallery import Gallery, embed_source
from icar_jax.inference.budgets import thresholds_for_budget
from icar_jax.inference.loading import load
from icar_jax.inference.model import Model
from icar_jax.inference.router import assign
from icar_jax.models.clip import ClipArch
from icar_jax.models.flops import vision_flops

ROWS, ARRAYS = "rows.json", "rows.npz"
TIMED = 1024  # timed images; many, so that partial batches at the end of queues matter as little as in a full collection
REPEATS = 12  # repetitions per timed run: routing saves a few percent, and shared machines vary by more
AFFINE = " affine"  # suffix of the names of rows with per-exit calibrated scores


@dataclass(frozen=True)
class Images:
    """The three image sets of an evaluation: queries, distractors (`far`), and calibration images for thresholds."""

    queries: Source
    far: Source | None
    calibration: Source


def select_images(config: ExperimentConfig, calibration: int, distractors: int) -> Images:
    """Returns the held-out images of a run.

    Queries come from `val`. Distractors are held out of training together with the calibration images; if only calibration
    images are held out, as for scenes, distractors come from `test`.
    """
    queries, held = configured.eval_source(config.data, config.eval), configured.calibration_source(config.data)
    if config.data.source == "scenes":
        far = Scenes("test", distractors, image_size=config.data.scenes_pixels) if distractors else None
        return Images(queries, far, held)
    if len(held) == calibration and distractors:
        test = configured.open_split(config.data, "test")
        return Images(queries, Subset(test, np.arange(min(distractors, len(test))), test.name), held)
    order = np.random.default_rng(0).permutation(len(held))
    far = Subset(held, np.sort(order[calibration:]), f"{held.name}/distractors") if distractors else None
    return Images(queries, far, Subset(held, np.sort(order[:calibration]), f"{held.name}/thresholds"))


class Rows:
    """Collects the result rows of one model from its embedded queries and distractors (None without)."""

    def __init__(self, model: Model, gallery: Gallery, far: Gallery | None):
        self.model, self.gallery, self.far = model, gallery, far
        self.galleries = [gallery, *([far] if far is not None else [])]
        self.mesh = local_mesh()
        self.flops = {e: float(vision_flops(model.arch.vision, e)) for e in model.exits}
        self.records: dict[str, dict[str, Any]] = {}
        self.hits: dict[str, Hits] = {}
        self.arrays: dict[str, np.ndarray] = {"owner": gallery.caption_image}
        full = model.exits[-1]
        self.alone = ranks_alone(
            gallery.by_exit, *self.captions, **self._ranking_options([g.by_exit[full] for g in self.galleries])
        )

    @property
    def captions(self) -> tuple[np.ndarray, np.ndarray]:
        """Caption embeddings [M, D] and the image index [M] of each."""
        return self.gallery.texts, self.gallery.caption_image

    def add(self, name: str, kind: str, found: Sequence[Ranks], share: Mapping[int, float], extra: float, **more: Any) -> None:
        """Adds a row from its ranks (averaged over draws), its share of images per exit and the FLOPs beyond the tower's."""
        each = [mean_recall_hits(one) for one in found]
        self.hits[name] = Hits(
            each[0].k, np.mean([h.text_to_image for h in each], axis=0), each[0].captions,
            np.mean([h.image_to_text for h in each], axis=0),
        )  # fmt: skip
        flops = sum(part * self.flops[exit] for exit, part in share.items()) + extra
        self.records[name] = {
            "kind": kind, "share": {str(e): part for e, part in share.items()}, "flops": flops,
            "recall": {
                f"{direction}_r{k}": 100 * float(np.mean([np.mean(getattr(one, direction) <= k) for one in found]))
                for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)
            },
            **more,
        }  # fmt: skip

    def add_exits(self) -> None:
        """Adds one row per exit, full depth included, and stores the ranks and cosines of each exit."""
        for exit in reversed(self.model.exits):
            name = "full" if exit == self.model.exits[-1] else f"exit_{exit}"
            found = ranks(
                self.gallery.by_exit[exit], *self.captions, **self._ranking_options([g.by_exit[exit] for g in self.galleries])
            )
            self.add(name, "full" if name == "full" else "exit", [found], {exit: 1.0}, 0.0)
            match, other = mean_cosines(self.gallery.by_exit[exit], *self.captions)
            self.arrays |= {
                f"match_{exit}": match, f"other_{exit}": other,
                f"pure_t2i_{exit}": found.text_to_image, f"pure_i2t_{exit}": found.image_to_text,
                f"alone_t2i_{exit}": self.alone[exit].text_to_image, f"alone_i2t_{exit}": self.alone[exit].image_to_text,
            }  # fmt: skip

    def add_routed(
        self, router: str, flops: float, scores: Sequence[np.ndarray], budget: float, thresholds: Sequence[float], draws: int,
        affine: score_calibration.ScoreCalibration,
    ) -> None:  # fmt: skip
        """Adds one router at one budget, with and without calibrated scores, and random routing and the oracle at its shares.

        Random routing and the oracle need no router, so its cost is not included.
        """
        exits = [assign(s, self.model.exits, thresholds) for s in scores]
        everyone = np.concatenate(exits)
        share = {e: float(np.mean(everyone == e)) for e in self.model.exits}
        more = {"router": router, "budget": budget}
        name = f"{router}@{budget:.2f}"
        self.add(name, "routed", [self._mixed(exits)], share, flops, thresholds=list(thresholds), **more)
        calibrated = [affine.map_images(take_exits(g.by_exit, e), e) for g, e in zip(self.galleries, exits)]
        texts = [affine.map_texts(g.texts) for g in self.galleries]
        found = ranks(calibrated[0], texts[0], self.gallery.caption_image, **self._ranking_options(calibrated, texts))
        more_affine = {"thresholds": list(thresholds), "affine": plain(affine), **more}
        self.add(f"{name}{AFFINE}", "routed", [found], share, flops, **more_affine)
        assignments = np.stack([random_exits(everyone, seed) for seed in range(draws)])
        far = self.far.by_exit if self.far is not None else None
        drawn = ranks_mixed(
            self.gallery.by_exit,
            *self.captions,
            assignments,
            far_by_exit=far,
            **self._ranking_options([g.texts[:0] for g in self.galleries]),
        )
        self.add(f"{name} random", "random", drawn, share, 0.0, **more)
        counts = {e: int(np.sum(exits[0] == e)) for e in self.model.exits}
        best = [oracle_exits_at_share(self.alone, counts, RECALL_AT), *exits[1:]]
        whole = {e: float(np.mean(np.concatenate(best) == e)) for e in self.model.exits}
        self.add(f"{name} oracle", "oracle", [self._mixed(best)], whole, 0.0, **more)
        self.arrays |= {f"exits_{name}": exits[0], f"scores_{router}": scores[0]}

    def write(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Writes rows.npz, then rows.json, whose presence marks a complete evaluation."""
        temporary = folder / f".{ARRAYS}"
        named = {f"hits_{i}_{part}": getattr(h, part) for i, h in enumerate(self.hits.values())
                 for part in ("text_to_image", "image_to_text")}  # fmt: skip
        with temporary.open("wb") as file:
            np.savez_compressed(file, captions=next(iter(self.hits.values())).captions, **named, **self.arrays)
        temporary.replace(folder / ARRAYS)
        files.write_text(folder / ROWS, json.dumps({"rows": self.records, **extra}, indent=1) + "\n")

    def _mixed(self, exits: Sequence[np.ndarray]) -> Ranks:
        rows = [take_exits(g.by_exit, e) for g, e in zip(self.galleries, exits)]
        return ranks(rows[0], *self.captions, **self._ranking_options(rows))

    def _ranking_options(self, embeddings: Sequence[np.ndarray], texts: Sequence[np.ndarray] | None = None) -> dict[str, Any]:
        distractors = None
        if self.far is not None:
            distractors = Distractors(embeddings[1], self.far.texts if texts is None else texts[1], self.far.caption_image)
        return {"distractors": distractors, "mesh": self.mesh}


def mean_cosines(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 [N], [N]: mean cosine of each image with its own and with all other captions; inputs are unit-norm."""
    n, m = len(images), len(texts)
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    own = np.bincount(owner, weights=np.einsum("md,md->m", images[owner], texts), minlength=n)
    count = np.bincount(owner, minlength=n)
    return own / count, (images @ texts.sum(axis=0) - own) / np.maximum(m - count, 1)


def make_request(
    config: ExperimentConfig, workdir: Path, routers: Mapping[str, Path], *, calibration: int, distractors: int,
    budgets: Sequence[float], draws: int, against: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the JSON-ready input of `evaluate_run`.

    routers: name -> workdir of a complexity model; ignored for a CLIP without exits. calibration, distractors: numbers of
    images. against: workdir of the CLIP whose full depth is the unit of all costs; None for the evaluated CLIP. budgets:
    counted costs as fractions of that unit. draws: number of random-routing draws.
    """
    return {
        "config": dataclasses.asdict(config), "workdir": str(workdir), "calibration": calibration, "distractors": distractors,
        "routers": {name: str(folder) for name, folder in routers.items()}, "budgets": list(budgets), "draws": draws,
        "against": str(against) if against is not None else None, "timed": [TIMED, REPEATS],
    }  # fmt: skip


def is_evaluated(request: Mapping[str, Any]) -> bool:
    """Returns whether the workdir holds the rows of exactly this request, for the current weights."""
    file = Path(request["workdir"]) / ROWS
    if not file.is_file():
        return False
    record = json.loads(file.read_text(encoding="utf-8"))
    return record.get("asked") == json.loads(json.dumps(request)) and record.get("weights") == _weights(request)


def _weights(request: Mapping[str, Any]) -> dict[str, str]:
    """Returns the SHA-256 of the parameters of every model of a request, so that retrained models are evaluated again."""
    folders = {"clip": Path(request["workdir"]) / "model"}
    if request["against"]:
        folders["against"] = Path(request["against"]) / "model"
    folders |= {name: checkpoint.find(folder, ("complexity",)) for name, folder in request["routers"].items()}
    return {name: checkpoint.describe(folder)["hashes"][checkpoint.WEIGHTS] for name, folder in folders.items()}


def evaluate_run(request: Mapping[str, Any]) -> None:
    """Evaluates a `make_request`: writes rows.json and rows.npz into the CLIP's workdir; unmet budgets become notes."""
    config = from_dict(request["config"])
    workdir, routers, budgets = Path(request["workdir"]), request["routers"], request["budgets"]
    calibration, distractors, draws = request["calibration"], request["distractors"], request["draws"]
    against = Path(request["against"]) if request["against"] else None
    s = {"batch_size": config.eval.batch_size, "dtype": config.eval.dtype}
    model = load(workdir / "model", **s)
    images, loading = select_images(config, calibration, distractors), configured.loading(config.data)
    gallery = embed_source(model, images.queries, loading)
    far = embed_source(model, images.far, loading) if images.far is not None else None
    rows, notes = Rows(model, gallery, far), []
    rows.add_exits()
    unit = _full_flops(against) if against is not None else rows.flops[model.exits[-1]]
    own = rows.flops[model.exits[-1]] / unit  # below 1 if the tower is smaller or merges patches
    chosen_on = embed_source(model, images.calibration, loading) if len(model.exits) > 1 else None
    times: list[dict[str, float]] = []
    for name, folder in routers.items() if len(model.exits) > 1 else ():
        scorer = load(folder, **s)
        cost = model_costs(model.arch, scorer.scorer.complexity.arch)
        chosen = score_source(scorer, images.calibration, f"calibrate {name}", loading).scores
        evaluated = [each for each in (images.queries, images.far) if each is not None]
        scores = [score_source(scorer, each, f"score by {name}", loading).scores for each in evaluated]
        settings = {}
        for budget in budgets:
            try:
                if budget >= own:
                    raise ConfigError(f"full depth costs {own:.2f} and needs no routing")
                if budget < cost.lowest_budget * own:
                    raise ConfigError(f"the first exit and the router alone cost {cost.lowest_budget * own:.2f}")
                thresholds = thresholds_for_budget(chosen, budget / own, cost)
            except ConfigError as error:
                notes.append(f"{name} at {budget:.2f}: {error}")
                continue
            taken = assign(chosen, model.exits, thresholds)
            fit = score_calibration.fit(chosen_on.by_exit, chosen_on.texts, chosen_on.caption_image, taken, model.temperature)
            rows.add_routed(name, cost.router, scores, budget, thresholds, draws, fit)
            settings[f"{name}@{budget:.2f}"] = thresholds
        if settings:
            unit_of = against if own != 1 else None
            times.append(relative_times(workdir, Path(folder), settings, images.queries, scores[0], loading, s, unit_of))
    if not times:
        times.append({"full": 1.0 if own == 1 else relative_full_depth_time(workdir, against, images.queries, loading, s)})
    # Full depth and the exits are timed once per router; average these times.
    speed = {name: float(np.mean([each[name] for each in times if name in each])) for each in times for name in each}
    for name, row in rows.records.items():
        row["counted"] = row["flops"] / unit
        # The oracle cannot be timed; random routing is timed at the sample's shares.
        row["measured"] = None if row["kind"] == "oracle" else speed.get(name.removesuffix(AFFINE))
    extra = {
        "exits": list(model.exits), "notes": notes, "measured": speed,
        "gallery": {
            "queries": len(gallery.captions), "images": sum(len(g.captions) for g in rows.galleries),
            "captions": sum(len(g.texts) for g in rows.galleries),
        },
        "source": images.queries.name,
    }  # fmt: skip
    rows.write(workdir, extra | {"asked": request, "weights": _weights(request)})


def relative_times(
    clip: Path, router: Path, settings: Mapping[str, Sequence[float]], source: Source, scores: np.ndarray,
    loading: Mapping[str, Any], batches: Mapping[str, Any], against: Path | None,
) -> dict[str, float]:  # fmt: skip
    """Returns row -> time per image as a fraction of full depth of `against` (or of this CLIP), timed interleaved.

    Covers routed rows (router included), the exits, and random routing at the shares of every routed row.
    """
    first, *others = settings  # the first is timed as the model's own routing
    both = ((clip / "model", "clip"), (router, "complexity"))
    parts = [checkpoint.read(checkpoint.find(folder, (kind,)), kind) for folder, kind in both]
    exits = sorted({*parts[0].description["arch"]["vision"]["exits"], parts[0].description["arch"]["vision"]["depth"]})
    routing = {"routing": {"exits": exits, "thresholds": list(settings[first])}}
    bundle = Model(*parts, routing, batches["batch_size"], batches["dtype"])
    sample = timing.sample_of(bundle, source, TIMED, loading)
    timed_scores = scores[: len(sample.clip)]  # scores of the timed images
    assignments = {f"{name} random": assign(timed_scores, bundle.exits, limits) for name, limits in settings.items()}
    own = assignments.pop(f"{first} random")
    other = load(against / "model", **batches) if against is not None else None
    unit = (other, timing.sample_of(other, source, TIMED, loading)) if other is not None else None
    speed = timing.throughput(bundle, sample, own, {name: settings[name] for name in others}, unit, REPEATS, assignments)
    whole = speed.pop("static") if unit is not None else speed["full"]
    speed |= {first: speed.pop("routed"), f"{first} random": speed.pop("random")}
    return {name: whole / value for name, value in speed.items()}


def relative_full_depth_time(
    clip: Path, against: Path, source: Source, loading: Mapping[str, Any], batches: Mapping[str, Any]
) -> float:
    """Returns a tower's time per image as a fraction of another's, both at full depth."""
    small, large = load(clip / "model", **batches), load(against / "model", **batches)
    samples = [timing.sample_of(each, source, TIMED, loading) for each in (small, large)]
    speed = timing.throughput(large, samples[1], None, None, (small, samples[0]), REPEATS)
    return speed["full"] / speed["static"]


def _full_flops(against: Path) -> float:
    """Returns the counted FLOPs of a trained CLIP at full depth."""
    arch = from_dict(checkpoint.describe(against / "model")["arch"], ClipArch, f"{against}: arch")
    return float(vision_flops(arch.vision))


def read_rows(workdir: Path) -> tuple[dict[str, Any], dict[str, Hits], dict[str, np.ndarray]] | None:
    """Returns (rows.json, row -> hits, other arrays) of an evaluated run; None if it is not evaluated."""
    if not (workdir / ROWS).is_file():
        return None
    record = json.loads((workdir / ROWS).read_text(encoding="utf-8"))
    with np.load(workdir / ARRAYS) as stored:
        arrays = {name: stored[name] for name in stored.files}
    hits = {
        name: Hits(0, arrays.pop(f"hits_{i}_text_to_image"), arrays["captions"], arrays.pop(f"hits_{i}_image_to_text"))
        for i, name in enumerate(record["rows"])
    }
    return record, hits, arrays


if __name__ == "__main__":  # runs in its own process, so that accelerator memory is freed for the next training
    with user_errors():
        evaluate_run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
