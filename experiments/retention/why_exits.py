"""Analyses why early exits lose recall: cosine offsets between exits, rank changes, and how well scores predict regret.

    python -m experiments.retention.why_exits --out workdir/retention [--json FILE.json] [--figure FILE.png]

Reads the evaluated runs of experiments/retention/study.py in OUT; writes OUT/why_exits.json, .md and .png by default.

Cosine offset: mean cosine of an image with its own captions and with all others, at an exit minus at full depth. Exits with
different offsets cannot be ranked against each other, even if each ranks well alone.
Rank flips: share of queries whose rank is better, equal or worse if only the image leaves early and all others are at full
depth.
Regret: the loss in mean recall at 1, 5 and 10 of an image and its captions when the image leaves early. For each router the
report gives the rank correlation of its score with regret, and the fraction of the oracle's gain over random routing, at equal
exit shares, that it captures: in its most expensive row within the target time, or else the cheapest row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.retention import figure as retention_figure
from experiments.retention import recipes, report
from experiments.retention import rows as retention_rows
from experiments.retention.recipes import BUDGET, DATASETS
from icar_jax import workdir as files
from icar_jax.cli.errors import user_errors
from icar_jax.config import ConfigError
from icar_jax.evaluation.metrics import seeds
from icar_jax.evaluation.metrics.bootstrap import Interval, resample_counts
from icar_jax.evaluation.metrics.retrieval import Ranks
from icar_jax.evaluation.metrics.seeds import mean_recall_hits
from icar_jax.evaluation.report import figures
from icar_jax.evaluation.report.table import write_metrics

Arrays = Mapping[str, np.ndarray]


def mean_interval(per_seed: Sequence[np.ndarray], weights: Sequence[np.ndarray], n: int) -> Interval | None:
    """Returns the weighted mean of values [N] over images, pooled over seeds, with an interval over images and seeds."""
    images = len(per_seed[0])
    values = [[np.sum(v) / np.sum(w)] for v, w in zip(per_seed, weights)]
    for counts in resample_counts(images, n, 0):
        for row, v, w in zip(values, per_seed, weights):
            row.extend((counts @ v) / (counts @ w))
    return seeds.interval(np.array(values))


def cosine_offsets(arrays: Sequence[Arrays], exits: Sequence[int], n: int) -> dict[str, Any]:
    """Returns exit -> mean cosine with own and with other captions, and both minus full depth's."""
    one, full, found = [np.ones(len(a["captions"])) for a in arrays], exits[-1], {}
    for exit in exits:
        part = {}
        for name in ("match", "other"):
            values = [a[f"{name}_{exit}"] for a in arrays]
            part[name] = mean_interval(values, one, n)
            part[f"{name}_offset"] = mean_interval([v - a[f"{name}_{full}"] for v, a in zip(values, arrays)], one, n)
        found[str(exit)] = {key: asdict(each) for key, each in part.items()}
    return found


def rank_flips(arrays: Sequence[Arrays], exits: Sequence[int], n: int) -> dict[str, Any]:
    """Returns early exit -> direction -> percent of queries whose rank is better, the same or worse than at full depth."""
    full, found = exits[-1], {}
    for exit in exits[:-1]:
        found[str(exit)] = {}
        for name, direction in (("t2i", "text_to_image"), ("i2t", "image_to_text")):
            shares = {}
            for word, sign in (("better", -1), ("same", 0), ("worse", 1)):
                values, weights = [], []
                for a in arrays:
                    images = len(a["captions"])
                    owner = a["owner"] if name == "t2i" else np.arange(images)
                    flipped = np.sign(a[f"alone_{name}_{exit}"] - a[f"alone_{name}_{full}"]) == sign
                    values.append(100.0 * np.bincount(owner, weights=flipped, minlength=images))
                    weights.append(np.bincount(owner, minlength=images).astype(np.float64))
                shares[word] = asdict(mean_interval(values, weights, n))
            found[str(exit)][direction] = shares
    return found


def recall_regret(arrays: Arrays, exit: int, full: int) -> np.ndarray:
    """Returns float64 [N]: mean recall in percent of each image and its captions at full depth minus at the exit alone."""
    worth = []
    for e in (full, exit):
        hits = mean_recall_hits(Ranks(arrays[f"alone_t2i_{e}"], arrays[f"alone_i2t_{e}"], arrays["owner"]))
        worth.append(50.0 * (hits.text_to_image / hits.captions + hits.image_to_text))
    return worth[0] - worth[1]


def score_correlations(arrays: Sequence[Arrays], exits: Sequence[int]) -> dict[str, Any]:
    """Returns router -> Spearman correlation of its score with the regret at the first exit, mean and by seed.

    Covers routers with scores for every seed; a budget that cannot be met leaves no scores. None if an input is constant.
    """
    everywhere = set.intersection(*({name for name in a if name.startswith("scores_")} for a in arrays))
    routers = sorted(name.removeprefix("scores_") for name in everywhere)
    found = {}
    for router in routers:
        each = [spearmanr(a[f"scores_{router}"], recall_regret(a, exits[0], exits[-1])).statistic for a in arrays]
        finite = [float(value) for value in each if np.isfinite(value)]
        found[router] = {"spearman": float(np.mean(finite)) if finite else None, "by_seed": finite}
    return found


def analyse(out: Path, dataset: str, names: Sequence[str], seeds_: Sequence[int], n: int) -> list[dict[str, Any]]:
    """Returns one record per recipe with exits."""
    rows = report.summarise_rows(report.collect_rows(out, dataset, names, seeds_, n))
    records = []
    for name in names:
        read = [retention_rows.read_rows(recipes.folder(out, dataset, name, seed)) for seed in seeds_]
        read = [each for each in read if each is not None]
        if not read or len(read[0][0]["exits"]) < 2:
            continue
        exits, arrays = read[0][0]["exits"], [each[2] for each in read]
        scores = score_correlations(arrays, exits)
        for router, score in scores.items():
            row = retention_figure.within_budget(rows, name, router, calibrated=False)
            if row is not None:
                score |= {"captured": row["captured"], "budget": row["budget"]}
        lost = [recall_regret(a, exits[0], exits[-1]) for a in arrays]
        one = [np.ones(len(each)) for each in lost]
        records.append({
            "recipe": name, "exits": exits, "seeds": len(read), "cosines": cosine_offsets(arrays, exits, n),
            "flips": rank_flips(arrays, exits, n), "routers": scores, "regret": asdict(mean_interval(lost, one, n)),
            "images_that_lose": asdict(mean_interval([100.0 * (each > 0) for each in lost], one, n)),
            "images_that_gain": asdict(mean_interval([100.0 * (each < 0) for each in lost], one, n)),
        })  # fmt: skip
    return records


def markdown(record: Mapping[str, Any]) -> str:
    lines = ["# Why early exits lose", ""]
    for dataset, rows in record["datasets"].items():
        routers = sorted({router for row in rows for router in row["routers"]})
        lines += [
            f"## {dataset}", "",
            "First exit compared with full depth: cosine offsets, rank changes if only one image leaves early, and the percent "
            "of the oracle's gain that a router captures (in brackets: rank correlation of its score with regret).", "",
            "| recipe | seeds | own captions | other captions | text to image: better / same / worse % "
            "| image to text: better / same / worse % | images that lose / gain % | "
            + " | ".join(f"captured by {router} %" for router in routers) + " |",
            "| " + " | ".join(["---"] * (7 + len(routers))) + " |",
        ]  # fmt: skip
        for row in rows:
            first = str(row["exits"][0])
            offsets = [_signed(row["cosines"][first][f"{name}_offset"]) for name in ("match", "other")]
            shares = [
                " / ".join(f"{row['flips'][first][d][word]['value']:.0f}" for word in ("better", "same", "worse"))
                for d in ("text_to_image", "image_to_text")
            ]
            moved = " / ".join(f"{row[key]['value']:.0f}" for key in ("images_that_lose", "images_that_gain"))
            cells = [row["recipe"], str(row["seeds"]), *offsets, *shares, moved]
            lines.append("| " + " | ".join([*cells, *(_captured(row["routers"].get(r)) for r in routers)]) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG with one row of panels per dataset: cosine offsets, rank changes, captured gain."""
    datasets = record["datasets"]
    longest = max(len(rows) for rows in datasets.values())
    figure, first = figures.new_figure((13.5, len(datasets) * max(3.4, 1.9 + 0.34 * longest)))
    figure.delaxes(first)
    grid = np.atleast_2d(figure.subplots(len(datasets), 3))
    for panels, (dataset, rows) in zip(grid, datasets.items()):
        y, names = np.arange(len(rows)), [row["recipe"] for row in rows]
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_yticks(y, names, fontsize=8.5)
            axes.set_ylim(len(rows) - 0.5, -0.5)
        _offsets(panels[0], rows, y)
        _flips(panels[1], rows, y)
        _captures(panels[2], rows, y)
        panels[0].set_title(f"{dataset}: cosine at the first exit minus full depth", fontsize=10)
    for axes in grid[-1]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False, fontsize=8.5)
    figures.save(figure, path)


def _offsets(axes: Any, rows: Sequence[Mapping[str, Any]], y: np.ndarray) -> None:
    axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    styles = {"match": ("#D55E00", "D", "own captions"), "other": ("#0072B2", "s", "other captions")}
    for shift, (name, (colour, marker, label)) in zip((-0.13, 0.13), styles.items()):
        found = [row["cosines"][str(row["exits"][0])][f"{name}_offset"] for row in rows]
        _bars(axes, found, y + shift, colour, marker, label)
    axes.set_xlabel("offset of the mean cosine (95% interval)")


def _flips(axes: Any, rows: Sequence[Mapping[str, Any]], y: np.ndarray) -> None:
    left = np.zeros(len(rows))
    for word, colour in (("better", "#009E73"), ("same", "#DDDDDD"), ("worse", "#882255")):
        shares = [np.mean([each[word]["value"] for each in row["flips"][str(row["exits"][0])].values()]) for row in rows]
        axes.barh(y, shares, left=left, color=colour, height=0.6, label=word)
        left = left + shares
    axes.set_xlabel("% of queries, mean of both directions")
    axes.set_title("rank change if only one image leaves at the first exit", fontsize=10)


def _captures(axes: Any, rows: Sequence[Mapping[str, Any]], y: np.ndarray) -> None:
    axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    routers = sorted({router for row in rows for router in row["routers"]})
    for place, router in enumerate(routers):
        shown = [(at, row["routers"].get(router, {}).get("captured")) for at, row in zip(y, rows)]
        shown = [(at, each) for at, each in shown if each is not None]
        style = retention_figure.STYLES.get(router, retention_figure.OTHER)
        if shown:
            shift = 0.2 * (place - (len(routers) - 1) / 2)
            _bars(axes, [each for _, each in shown], np.array([at for at, _ in shown]) + shift, *style, router)
    axes.set_xlabel("oracle's gain over random, % (95% interval)")
    axes.set_title(f"captured within {BUDGET:.0%} of the baseline's time", fontsize=10)


def _bars(axes: Any, found: Sequence[Mapping[str, float]], y: np.ndarray, colour: str, marker: str, label: str) -> None:
    values = np.array([each["value"] for each in found])
    low, high = (np.array([each[key] for each in found]) for key in ("low", "high"))
    bars = [np.maximum(values - low, 0), np.maximum(high - values, 0)]
    axes.errorbar(values, y, xerr=bars, color=colour, marker=marker, linestyle="none", capsize=2, markersize=5, label=label)


def _signed(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def _captured(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    share, rank = found.get("captured"), found["spearman"]
    text = "-" if share is None else f"{share['value']:.0f} [{share['low']:.0f}, {share['high']:.0f}]"
    at = f" at {found['budget']:.2f}" if "budget" in found else ""
    return f"{text}{at} ({'-' if rank is None else f'{rank:.2f}'})"


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="the --out of experiments/retention/study.py")
    p.add_argument("--json", type=Path)
    p.add_argument("--figure", type=Path)
    args = p.parse_args(arguments)
    with user_errors():
        file = args.out / "retention.json"
        if not file.is_file():
            raise ConfigError(f"{file} not found: first run `python -m experiments.retention.study --out {args.out} ...`")
        plan = json.loads(file.read_text(encoding="utf-8"))
        record: dict[str, Any] = {"benchmark": "why_exits", "setting": plan["setting"], "datasets": {}}
        for dataset in DATASETS:
            if dataset in plan["datasets"]:
                found = analyse(args.out, dataset, plan["recipes"], plan["seeds"], plan["resamples"])
                record["datasets"] |= {dataset: found} if found else {}
        if not record["datasets"]:
            raise ConfigError(
                f"{args.out} holds no evaluated run with exits; first finish one with experiments/retention/study.py"
            )
        write_metrics(record, args.json or args.out / "why_exits.json")
        text = markdown(record)
        files.write_text(args.out / "why_exits.md", text)
        draw(record, args.figure or args.out / "why_exits.png")
        print(text)


if __name__ == "__main__":
    main()
