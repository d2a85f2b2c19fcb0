"""The tables and the figure of experiments/retention/study.py, from the rows of its evaluated runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.retention import equal_cost, figure, recipes
from experiments.retention import rows as retention_rows
from experiments.retention.recipes import BUDGET, RECIPES
from icar_jax import workdir as files
from icar_jax.evaluation.metrics import seeds
from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.report.table import write_metrics

KEPT, LOWEST, FEWEST_SEEDS = 99.0, 97.0, 3  # the goal: percent kept, its lower bound, and on how many seeds at least


@dataclass(frozen=True)
class FoundRuns:
    """One row of one recipe: what each seed's rows.json says, `smoothed`, and its recall [S, 1 + R] on the common resamples."""

    seeds: tuple[int, ...]
    records: tuple[Mapping[str, Any], ...]
    values: np.ndarray


def collect(
    out: Path, dataset: str, names: Sequence[str], seeds_: Sequence[int], resamples: int
) -> dict[tuple[str, str], FoundRuns]:
    """(recipe, row) -> `FoundRuns`, of every run that is evaluated and whose baseline of the same seed is too."""
    read = {}
    for name in names:
        for seed in seeds_:
            if (found := retention_rows.read(recipes.folder(out, dataset, name, seed))) is not None:
                read[name, seed] = found
    read = {(name, seed): found for (name, seed), found in read.items() if ("baseline", seed) in read}
    records = {run: equal_cost.smoothed(found["rows"]) for run, (found, _, _) in read.items()}
    hits = {(name, row, seed): h for (name, seed), (_, by_row, _) in read.items() for row, h in by_row.items()}
    values = seeds.resampled(hits, n=resamples)
    rows: dict[tuple[str, str], list[int]] = {}
    for name, row, seed in hits:
        rows.setdefault((name, row), []).append(seed)
    return {
        (name, row): FoundRuns(
            tuple(given), tuple(records[name, seed][row] for seed in given),
            np.stack([values[name, row, seed] for seed in given]),
        )
        for (name, row), given in rows.items()
    }  # fmt: skip


def depth_pays(found: Mapping[tuple[str, str], FoundRuns]) -> Interval | None:
    """Mean recall of the baseline minus that of the static tower, in points; None until both are evaluated."""
    pair = _paired(found, ("baseline", "full"), ("static", "full"))
    return None if pair is None else seeds.difference(*pair)


def rows_of(
    found: Mapping[tuple[str, str], FoundRuns], against: tuple[str, str] = ("baseline", "full")
) -> list[dict[str, Any]]:
    """A record a row: recall, retention, cost, what it has over dice and over the static tower, and whether it meets the goal.

    Seeds are those of the row whose baseline is there; 'seeds' lists them.
    """
    records = []
    for (name, row), one in found.items():
        base = _paired(found, (name, row), against)
        kept = seeds.retention(*base) if base is not None else None
        first = one.records[0]
        record: dict[str, Any] = {
            "recipe": name, "row": row, "kind": first["kind"], "router": first.get("router"), "budget": first.get("budget"),
            "seeds": list(one.seeds), "mean_recall": _plain(seeds.interval(one.values)), "retention": _plain(kept),
            "counted": float(np.mean([r["counted"] for r in one.records])),
            "measured": _middle([r["measured"] for r in one.records]),
            "measured_by_seed": [r["measured"] for r in one.records],
            "share": {e: float(np.mean([r["share"][e] for r in one.records])) for e in first["share"]},
            "recall": {k: float(np.mean([r["recall"][k] for r in one.records])) for k in first["recall"]},
        }  # fmt: skip
        for other in ("static", "merged"):
            record[f"minus_{other}"] = _plain(_difference(found, (name, row), (other, "full")))
        # The ablation changes one lever of `shared`: row against row.
        record["minus_shared"] = _plain(_difference(found, (name, row), ("shared", row))) if name != "shared" else None
        if first["kind"] == "routed":
            plain = row.removesuffix(retention_rows.AFFINE)
            dice, best = (name, f"{plain} random"), (name, f"{plain} oracle")
            record["minus_random"] = _plain(_difference(found, (name, row), dice))
            record["minus_random_flops"] = _plain(over_dice(found, name, one, "counted"))
            record["minus_random_time"] = _plain(over_dice(found, name, one, "measured"))
            record["captured"] = _plain(seeds.captured(one.values, found[dice].values, found[best].values))
            record["lacks"] = lacks(record)
        records.append(record)
    return records


def over_dice(found: Mapping[tuple[str, str], FoundRuns], recipe: str, routed: FoundRuns, cost: str) -> Interval | None:
    """Mean recall of a routed row minus that of dice of the same 'counted' or 'measured' cost; None where none can be told."""
    router, others = routed.records[0]["router"], []
    for i, seed in enumerate(routed.seeds):
        points = [
            equal_cost.Point(record["counted"], record["measured"], other.values[other.seeds.index(seed)])
            for (name, _), other in found.items() if name == recipe and seed in other.seeds
            for record in [other.records[other.seeds.index(seed)]]
            if record["kind"] in ("full", "exit") or (record["kind"] == "random" and record["router"] == router)
        ]  # fmt: skip
        own = routed.records[i][cost]
        at = None if own is None else equal_cost.by_flops(points, own) if cost == "counted" else equal_cost.by_time(points, own)
        if at is None:
            return None
        others.append(at)
    return seeds.difference(routed.values, np.stack(others))


def lacks(record: Mapping[str, Any]) -> list[str]:
    """What a routed row lacks of the goal, in words; empty where it is reached."""
    kept, missing = record["retention"], []
    if kept is None or kept["value"] < KEPT:
        missing.append(f"keeps less than {KEPT:g}%")
    if kept is None or kept["low"] < LOWEST:
        missing.append(f"lower bound below {LOWEST:g}%")
    if record["measured"] is None or record["measured"] > BUDGET:
        missing.append(f"more than {BUDGET:g} of the time")
    for other, name in (("minus_random_time", "dice at equal time"), ("minus_static", "the static tower")):
        if record.get(other) is None or record[other]["low"] <= 0:
            missing.append(f"not surely above {name}")
    if len(record["seeds"]) < FEWEST_SEEDS:
        missing.append(f"fewer than {FEWEST_SEEDS} seeds")
    return missing


def write(out: Path, plan: Mapping[str, Any], names: Sequence[str], seeds_: Sequence[int], resamples: int) -> dict[str, Any]:
    """Writes retention.json, retention.md and, where a row is routed, retention.png into `out`; returns the record."""
    record: dict[str, Any] = {"benchmark": "retention", **plan, "resamples": resamples, "datasets": {}}
    for dataset in plan["datasets"]:
        found = collect(out, dataset, names, seeds_, resamples)
        if not found:
            continue
        some = retention_rows.read(recipes.folder(out, dataset, "baseline", found["baseline", "full"].seeds[0]))[0]
        record["datasets"][dataset] = {
            "gallery": some["gallery"], "source": some["source"], "depth_pays": _plain(depth_pays(found)),
            "rows": rows_of(found), "notes": notes(out, dataset, names, seeds_),
        }  # fmt: skip
    write_metrics(record, out / "retention.json")
    files.write_text(out / "retention.md", markdown(record))
    if any(row["kind"] == "routed" for part in record["datasets"].values() for row in part["rows"]):
        figure.draw(record, out / "retention.png")
    return record


def notes(out: Path, dataset: str, names: Sequence[str], seeds_: Sequence[int]) -> list[str]:
    """What could not be measured, such as a budget below the first exit's cost; each sentence once."""
    said: dict[str, None] = {}
    for name in names:
        for seed in seeds_:
            file = recipes.folder(out, dataset, name, seed)
            if (found := retention_rows.read(file)) is not None:
                said |= {f"{name}: {note}": None for note in found[0]["notes"]}
    return list(said)


def depth_sentence(dataset: str, part: Mapping[str, Any]) -> str:
    """Step 0: does the full tower beat the one of 0.70 of its cost?"""
    pays = part["depth_pays"]
    if pays is None:
        return f"{dataset}: whether depth pays is not known before the baseline and the static tower are evaluated."
    count = len(next(row["seeds"] for row in part["rows"] if row["recipe"] == "static"))
    sure = pays["low"] > 0
    verdict = "depth pays" if sure else "depth does not surely pay: enlarge the task before judging any recipe"
    return (
        f"{dataset}: {verdict}. Baseline minus static tower, mean recall: {_points(pays)} points "
        f"({count} seed{'s' if count > 1 else ''}, gallery of {part['gallery']['images']:,} images)."
    )


def markdown(record: Mapping[str, Any]) -> str:
    """The tables as Markdown: of each recipe its exits, and the best that is routed within the goal's time. The rest: JSON."""
    lines = [f"# Retention: setting {record['setting']}, seeds {', '.join(map(str, record['seeds']))}", ""]
    for dataset, part in record["datasets"].items():
        gallery = part["gallery"]
        lines += [
            f"## {dataset}", "", depth_sentence(dataset, part), "",
            f"{gallery['queries']:,} images of {part['source']} are asked for among {gallery['images']:,} images and "
            f"{gallery['captions']:,} captions. Mean recall is the mean of R@1, R@5 and R@10 of both directions; kept is "
            "percent of the baseline's of the same seed, which went on from the same pretrained tower without exits. "
            "Intervals: 95%, over images and the seeds of going on; pretraining is one for all. Counted FLOPs and measured "
            "time (the median over seeds, and the least and the most) are shares of the baseline's, the router in both; of "
            f"each router the dearest row within {BUDGET:.2f} of the time is shown, or the cheapest. Over dice: at the same "
            "shares of the exits, where dice are cheaper by the router; of the same FLOPs; of the same time. Over shared: row "
            "against row.", "",
            "| recipe | row | text to image R@1/5/10 | image to text R@1/5/10 | mean recall | kept % | counted | measured "
            "| over dice: shares | FLOPs | time | over static | over merged | over shared | lacks |",
            "| " + " | ".join(["---"] * 15) + " |",
        ]  # fmt: skip
        lines += [_line(row) for row in shown(part["rows"])]
        lines += ["", *(f"- {name}: {RECIPES[name].note}" for name in record["recipes"]), ""]
        lines += [*(f"- {note}" for note in part["notes"]), ""]
    return "\n".join(lines)


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every exit, and of each recipe and router the dearest row within the goal's time, with its dice and oracle."""
    chosen = set()
    for recipe, router in {(row["recipe"], row["router"]) for row in rows if row["kind"] == "routed"}:
        for calibrated in (False, True):
            best = figure.within_budget(rows, recipe, router, calibrated)
            if best is not None:
                plain = best["row"].removesuffix(retention_rows.AFFINE)
                chosen |= {(recipe, name) for name in (best["row"], f"{plain} random", f"{plain} oracle")}
    return [row for row in rows if row["budget"] is None or (row["recipe"], row["row"]) in chosen]


def _line(row: Mapping[str, Any]) -> str:
    recall, name = row["recall"], row["row"]
    triples = ["/".join(f"{recall[f'{d}_r{k}']:.1f}" for k in (1, 5, 10)) for d in ("text_to_image", "image_to_text")]
    dice = ("minus_random", "minus_random_flops", "minus_random_time")
    over = [_points(row.get(key)) for key in (*dice, "minus_static", "minus_merged", "minus_shared")]
    lacking = "-" if row["kind"] != "routed" else "; ".join(row["lacks"]) or "nothing: the goal is reached"
    cells = [row["recipe"], name, *triples, _short(row["mean_recall"]), _short(row["retention"]), f"{row['counted']:.2f}",
             _time(row), *over, lacking]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _time(row: Mapping[str, Any]) -> str:
    known = [value for value in row["measured_by_seed"] if value is not None]
    return f"{row['measured']:.2f} [{min(known):.2f}, {max(known):.2f}]" if known else "-"


def _short(interval: Mapping[str, float] | None) -> str:
    return "-" if interval is None else f"{interval['value']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]"


def _points(interval: Mapping[str, float] | None) -> str:
    return "-" if interval is None else f"{interval['value']:+.1f} [{interval['low']:+.1f}, {interval['high']:+.1f}]"


def _plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval.as_dict()


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _paired(
    found: Mapping[tuple[str, str], FoundRuns], run: tuple[str, str], other: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The recalls [S, 1 + R] of two rows at the seeds that both have; None where there are none."""
    if run not in found or other not in found:
        return None
    shared = [seed for seed in found[run].seeds if seed in found[other].seeds]
    if not shared:
        return None
    return tuple(found[row].values[[found[row].seeds.index(seed) for seed in shared]] for row in (run, other))


def _difference(found: Mapping[tuple[str, str], FoundRuns], run: tuple[str, str], other: tuple[str, str]) -> Interval | None:
    pair = _paired(found, run, other)
    return None if pair is None else seeds.difference(*pair)
