"""Exits, token reduction and routing on two frozen towers and photographs: what is kept of full depth, at which cost.

    python -m experiments.frozen_towers.study --photos PHOTOS --image DINOV2 --text MINILM --out workdir/frozen_towers
        [--rows NAME ...] [--seeds 0 1 2] [--router NAME=CHECKPOINT ...] [--split val] [--cache DIR]

Trains the heads of every row (rows.py) with configs/lit.py and each seed, embeds the split, and writes OUT/study.json, study.md
and study.png. Outputs of the frozen towers are computed once a row and kept in `--cache`. Finished runs and embeddings are
kept, so that the same command continues. A router is a complexity model (`icar score` reads it); images below the median score
leave early, and are compared with the same number of images drawn at random.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.frozen_towers import measure, report
from experiments.frozen_towers.measure import Embedded
from experiments.frozen_towers.rows import LAST_BLOCK, RECIPE, Row, config, rows
from icar_jax import workdir as files
from icar_jax.cli.errors import user_errors
from icar_jax.config import ConfigError
from icar_jax.data import configured
from icar_jax.data.records import Source
from icar_jax.evaluation.metrics import seeds
from icar_jax.evaluation.metrics.bootstrap import Hits, mean_hits
from icar_jax.evaluation.metrics.retrieval import Ranks, ranks
from icar_jax.evaluation.routing.assignments import oracle_exits_at_share, random_exits, ranks_alone, ranks_mixed
from icar_jax.evaluation.routing.calibration import score_source
from icar_jax.inference.loading import load
from icar_jax.inference.model import Model
from icar_jax.models.clip import LOGIT_SCALE_MAX
from icar_jax.training.loop import train

RESAMPLES, DRAWS = 2000, 60
BANK = 3000  # captions of training images


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    with user_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    known, out = rows(), Path(args.out)
    if unknown := [name for name in args.rows if name not in known]:
        raise ConfigError(f"--rows {' '.join(unknown)}: unknown; use some of {', '.join(known)}")
    chosen = [known[name] for name in known if name in {LAST_BLOCK, RECIPE, *args.rows}]
    _require_same(args)
    routers = {name: load(path) for name, path in map(_router, args.router)}  # before hours of training
    found: dict[str, dict[int, Embedded]] = {}
    for row in chosen:
        found[row.name] = {seed: _embedded(row, seed, args) for seed in args.seeds}
    source = _source(args)
    hits = {
        (row, exit, seed): seeds.mean_recall_hits(ranks(z, e.texts, e.owner))
        for row, by_seed in found.items() for seed, e in by_seed.items() for exit, z in e.by_exit.items()
    }  # fmt: skip
    drawn = seeds.resampled(hits, n=RESAMPLES)
    record = {
        "photographs": _count(found[RECIPE]), "split": args.split, "seeds": list(args.seeds), "resamples": RESAMPLES,
        "rows": _rows(chosen, found, drawn, args),
        "routing": _routing(found[RECIPE], routers, source, args),
    }  # fmt: skip
    record["seconds"] = None if args.untimed else _seconds(chosen, record["rows"], args)
    (out / "study.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "study.md").write_text(report.markdown(record))
    report.draw(record, out / "study.png")
    print(report.markdown(record))


def _count(by_seed: Mapping[int, Embedded]) -> int:
    """Number of embedded images."""
    return len(next(iter(next(iter(by_seed.values())).by_exit.values())))


def _require_same(args: argparse.Namespace) -> None:
    """Notes in OUT what the runs there are made from. Raises ConfigError if it is another than before."""
    file, now = Path(args.out) / "settings.json", {name: getattr(args, name) for name in ("photos", "image", "text")}
    then = json.loads(file.read_text()) if file.exists() else now
    if then != now:
        raise ConfigError(f"--out {args.out} holds runs of {then}, not of {now}; use another folder")
    files.write_text(file, json.dumps(now) + "\n")


# --- training and embedding --------------------------------------------------------------------------------------------------


def _settings(row: Row, seed: int, args: argparse.Namespace) -> Any:
    found = config(row, args.photos, args.image, args.text, args.cache, seed)
    found.eval.split = args.split
    return found


def _embedded(row: Row, seed: int, args: argparse.Namespace) -> Embedded:
    folder = Path(args.out) / row.name / str(seed)
    kept = folder / f"{args.split}.npz"
    if not kept.exists():
        print(f"== {row.name}, seed {seed}", flush=True)
        model = _model(row, seed, args)
        if not model.exists():
            train(_settings(row if row.trained else rows()[RECIPE], seed, args), model.parent)
        e = measure.embed(measure.read(model, row), _source(args))
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, texts=e.texts, owner=e.owner, **{f"exit_{exit}": z for exit, z in e.by_exit.items()})
        files.write_bytes(kept, content.getvalue())
    with np.load(kept) as arrays:
        by_exit = {int(name[5:]): arrays[name] for name in arrays.files if name.startswith("exit_")}
        return Embedded(by_exit, arrays["texts"], arrays["owner"])


def _source(args: argparse.Namespace) -> Source:
    return configured.validation_source(_settings(rows()[RECIPE], 0, args))


def _model(row: Row, seed: int, args: argparse.Namespace) -> Path:
    """The checkpoint of a row: its own, or the recipe's."""
    return Path(args.out) / (row.name if row.trained else RECIPE) / str(seed) / "model"


def _tower(row: Row, seed: int, args: argparse.Namespace) -> measure.Tower:
    return measure.read(_model(row, seed, args), row)


# --- what is reported --------------------------------------------------------------------------------------------------------


def _rows(
    chosen: Sequence[Row], found: Mapping[str, Mapping[int, Embedded]], drawn: Mapping[tuple[str, int, int], np.ndarray],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every row at every exit: mean recall with its interval, and what it keeps of both baselines at full depth."""
    by_seed = lambda row, exit: np.array([drawn[row, exit, seed] for seed in args.seeds])
    full = {name: max(next(iter(found[name].values())).by_exit) for name in (LAST_BLOCK, RECIPE)}
    whole = measure.arch_of(_model(rows()[LAST_BLOCK], args.seeds[0], args))
    made = []
    for row in chosen:
        arch = measure.arch_of(_model(row, args.seeds[0], args), row)
        cost = measure.counted(arch, whole)
        for exit in reversed(arch.vision.all_exits):
            values = by_seed(row.name, exit)
            made.append({
                "row": row.name, "exit": exit, "schedule": list(arch.vision.schedule), "counted": cost[exit],
                "recall": asdict(seeds.interval(values)), "seeds": values[:, 0].tolist(),
                **{
                    f"minus_{name}": asdict(seeds.difference(values, by_seed(name, full[name])))
                    for name in (LAST_BLOCK, RECIPE)
                },
                "kept": asdict(seeds.retention(values, by_seed(RECIPE, full[RECIPE]))),
            })  # fmt: skip
    return made


def _routing(
    by_seed: Mapping[int, Embedded], routers: Mapping[str, Model], source: Source, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Half of the images leave early by each router's score, at random, or by the oracle; the others take full depth."""
    scores = {}
    count = _count(by_seed)
    for name, model in routers.items():
        scores[name] = score_source(model, source, f"score with {name}").scores
        if len(scores[name]) != count:
            raise ConfigError(f"--router {name} read {len(scores[name])} images of {source.name}, the CLIP {count}")
    banks = {seed: _bank(args, seed) for seed in by_seed}
    made, n = [], len(next(iter(by_seed.values())).owner)
    for exit in sorted(next(iter(by_seed.values())).by_exit)[:-1]:
        hits: dict[tuple[str, int], Hits] = {}
        correlation: dict[str, list[float | None]] = {}
        moved: dict[str, list[float]] = {"lose": [], "gain": []}
        for seed, e in by_seed.items():
            two = {depth: e.by_exit[depth] for depth in (exit, max(e.by_exit))}
            depth, half = max(two), count // 2
            alone = ranks_alone(two, e.texts, e.owner)
            regret = _regret(alone[exit], alone[depth])
            moved["lose"].append(100 * float(np.mean(regret > 0)))
            moved["gain"].append(100 * float(np.mean(regret < 0)))
            own = {**scores, "confidence": _entropy(two[exit], *banks[seed])}
            taken = {name: np.where(np.argsort(np.argsort(s, kind="stable")) < half, exit, depth) for name, s in own.items()}
            taken["oracle"] = oracle_exits_at_share(alone, {exit: half, depth: count - half}, (1, 5, 10))
            draws = [random_exits(taken["oracle"], draw) for draw in range(DRAWS)]
            mixed = [seeds.mean_recall_hits(each) for each in ranks_mixed(
                two, e.texts, e.owner, np.stack([*taken.values(), *draws])
            )]  # fmt: skip
            hits |= {(name, seed): found for name, found in zip(taken, mixed)}
            hits["random", seed] = mean_hits(mixed[len(taken) :])
            for name, s in own.items():
                correlation.setdefault(name, []).append(_spearman(s, regret))
        drawn = seeds.resampled(hits, n=RESAMPLES)
        rows_of = {name: np.array([drawn[name, seed] for seed in by_seed]) for name in {name for name, _ in hits}}
        for name in (*scores, "confidence", "oracle"):
            made.append({
                "exit": exit, "router": name, "captions": n, "recall": asdict(seeds.interval(rows_of[name])),
                "random": asdict(seeds.interval(rows_of["random"])),
                "minus_random": asdict(seeds.difference(rows_of[name], rows_of["random"])),
                "spearman_with_regret": correlation.get(name), **moved,
            })  # fmt: skip
    return made


def _regret(early: Ranks, full: Ranks) -> np.ndarray:
    """float64 [N]: mean recall at 1, 5 and 10 in both directions that an image and its captions lose by leaving early."""
    a, b = (seeds.mean_recall_hits(each) for each in (early, full))
    own = lambda h: (h.text_to_image / h.captions + h.image_to_text) / 2
    return own(b) - own(a)


def _entropy(images: np.ndarray, bank: np.ndarray, scale: float) -> np.ndarray:
    """float64 [N]: entropy of the softmax of an early embedding's scaled similarities to captions of training images."""
    logits = scale * (images @ bank.T).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    weight = np.exp(logits)
    weight /= weight.sum(1, keepdims=True)
    return -(weight * np.log(weight + 1e-30)).sum(1)


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """The rank correlation; None if one of them is constant."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else None


def _bank(args: argparse.Namespace, seed: int) -> tuple[np.ndarray, float]:
    """(float32 [BANK, D], embeddings of captions of training images, one an image; the logit scale)."""
    kept = Path(args.out) / RECIPE / str(seed) / "bank.npy"
    tower = _tower(rows()[RECIPE], seed, args)
    if not kept.exists():
        source = configured.train_source(_settings(rows()[RECIPE], seed, args).data)
        some = np.linspace(0, len(source) - 1, min(BANK, len(source))).astype(int)
        texts = [source[int(i)].captions[0] for i in some]
        content = io.BytesIO()
        np.save(content, measure.embed_texts(tower, texts))
        files.write_bytes(kept, content.getvalue())
    return np.load(kept), float(np.exp(min(tower.params["logit_scale"], np.log(LOGIT_SCALE_MAX))))


def _seconds(chosen: Sequence[Row], made: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """{'row@exit': median seconds an image}, all taking turns.

    Rows on the same tower take the same time: untrained ones are timed where no trained one is, and at full depth alone.
    """
    known = {row.name: _tower(row, args.seeds[0], args) for row in chosen if row.trained}
    timed = {f"{m['row']}@{m['exit']}": (known[m["row"]], m["exit"]) for m in made if m["row"] in known}
    for row in chosen:
        name, depth = report.tower_of(row.name), known[RECIPE].graph.arch.vision.depth
        if not row.trained and not {f"{name}@{depth}", f"{name}_exits@{depth}"} & timed.keys():
            timed[f"{name}@{depth}"] = (_tower(row, args.seeds[0], args), depth)
    return measure.seconds(timed)


def _router(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise ConfigError(f"--router {text}: expected NAME=CHECKPOINT, such as human=workdir/complexity")
    return name, Path(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder of photographs with captions and splits")
    parser.add_argument("--image", required=True, help="image tower, as for config.train.init_image")
    parser.add_argument("--text", required=True, help="text tower, as for config.train.init_text")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--rows", nargs="*", default=list(rows()), help="rows beside last_block and recipe (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--router", nargs="*", default=[], metavar="NAME=CHECKPOINT", help="complexity models")
    parser.add_argument("--split", default="val", help="split to evaluate (val)")
    parser.add_argument("--cache", default="", help="folder of kept outputs (as config.train.cache_folder)")
    parser.add_argument("--untimed", action="store_true", help="do not measure the seconds of every row and exit")
    return parser


if __name__ == "__main__":
    main()
