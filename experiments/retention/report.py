"""Tables and figure of experiments/retention/study.py, from the rows of its evaluated runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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

KEPT, LOWEST, FEWEST_SEEDS = 99.0, 97.0, 3  # the goal: retention in percent, its lower bound, and the number of seeds


@dataclass(frozen=True)
class SeedResults:
    """One row of one recipe over seeds: records of rows.json with smoothed times, and recall [S, 1 + R] on shared resamples."""

    seeds: tuple[int, ...]
    records: tuple[Mapping[str, Any], ...]
    values: np.ndarray


def collect_rows(
    out: Path, dataset: str, names: Sequence[str], seeds_: Sequence[int], resamples: int
) -> dict[tuple[str, str], SeedResults]:
    """(recipe, row) -> `SeedResults`, for every evaluated run whose baseline of the same seed is also evaluated."""
    read = {}
    for name in names:
        for seed in seeds_:
            if (found := retention_rows.read_rows(recipes.folder(out, dataset, name, seed))) is not None:
                read[name, seed] = found
    read = {(name, seed): found for (name, seed), found in read.items() if ("baseline", seed) in read}
    records = {run: equal_cost.smooth_times(found["rows"]) for run, (found, _, _) in read.items()}
    hits = {(name, row, seed): h for (name, seed), (_, by_row, _) in read.items() for row, h in by_row.items()}
    values = seeds.resampled(hits, n=resamples)
    rows: dict[tuple[str, str], list[int]] = {}
    for name, row, seed in hits:
        rows.setdefault((name, row), []).append(seed)
    return {
        (name, row): SeedResults(
            tuple(given), tuple(records[name, seed][row] for seed in given),
            np.stack([values[name, row, seed] for seed in given]),
        )
        for (name, row), given in rows.items()
    }  # fmt: skip


def depth_pays(found: Mapping[tuple[str, str], SeedResults]) -> Interval | None:
    """Returns mean recall of the baseline minus the shallower baseline, in points; None until both are evaluated."""
    pair = _paired(found, ("baseline", "full"), ("static", "full"))
    return None if pair is None else seeds.difference(*pair)


def summarise_rows(
    found: Mapping[tuple[str, str], SeedResults], against: tuple[str, str] = ("baseline", "full")
) -> list[dict[str, Any]]:
    """Returns one record per row: recall, retention, cost, differences to random routing and reference runs, unmet goals.

    'seeds' lists the seeds of the row whose baseline is evaluated.
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
        # Each ablation recipe changes one option of `shared`, so equal rows are compared.
        record["minus_shared"] = _plain(_difference(found, (name, row), ("shared", row))) if name != "shared" else None
        if first["kind"] == "routed":
            plain = row.removesuffix(retention_rows.AFFINE)
            random, oracle = (name, f"{plain} random"), (name, f"{plain} oracle")
            record["minus_random"] = _plain(_difference(found, (name, row), random))
            record["minus_random_flops"] = _plain(minus_random_at_cost(found, name, one, "counted"))
            record["minus_random_time"] = _plain(minus_random_at_cost(found, name, one, "measured"))
            record["captured"] = _plain(seeds.captured(one.values, found[random].values, found[oracle].values))
            record["lacks"] = lacks(record)
        records.append(record)
    return records


def minus_random_at_cost(
    found: Mapping[tuple[str, str], SeedResults], recipe: str, routed: SeedResults, cost: str
) -> Interval | None:
    """Returns mean recall of a routed row minus random routing at equal 'counted' or 'measured' cost, or None if unknown."""
    router, others = routed.records[0]["router"], []
    for i, seed in enumerate(routed.seeds):
        points = [
            equal_cost.CostPoint(record["counted"], record["measured"], other.values[other.seeds.index(seed)])
            for (name, _), other in found.items() if name == recipe and seed in other.seeds
            for record in [other.records[other.seeds.index(seed)]]
            if record["kind"] in ("full", "exit") or (record["kind"] == "random" and record["router"] == router)
        ]  # fmt: skip
        own = routed.records[i][cost]
        recall_at = equal_cost.recall_at_flops if cost == "counted" else equal_cost.recall_at_time
        at = None if own is None else recall_at(points, own)
        if at is None:
            return None
        others.append(at)
    return seeds.difference(routed.values, np.stack(others))


def lacks(record: Mapping[str, Any]) -> list[str]:
    """Returns the unmet parts of the goal for a routed row, as phrases; empty if the goal is reached."""
    kept, missing = record["retention"], []
    if kept is None or kept["value"] < KEPT:
        missing.append(f"retains less than {KEPT:g}%")
    if kept is None or kept["low"] < LOWEST:
        missing.append(f"lower bound below {LOWEST:g}%")
    if record["measured"] is None or record["measured"] > BUDGET:
        missing.append(f"more than {BUDGET:g} of the time")
    for other, name in (("minus_random_time", "random routing at equal time"), ("minus_static", "the shallower baseline")):
        if record.get(other) is None or record[other]["low"] <= 0:
            missing.append(f"not significantly above {name}")
    if len(record["seeds"]) < FEWEST_SEEDS:
        missing.append(f"fewer than {FEWEST_SEEDS} seeds")
    return missing


def write_report(
    out: Path, plan: Mapping[str, Any], names: Sequence[str], seeds_: Sequence[int], resamples: int
) -> dict[str, Any]:
    """Writes retention.json, retention.md and, if there are routed rows, retention.png into `out`; returns the record."""
    record: dict[str, Any] = {"benchmark": "retention", **plan, "resamples": resamples, "datasets": {}}
    for dataset in plan["datasets"]:
        found = collect_rows(out, dataset, names, seeds_, resamples)
        if not found:
            continue
        some = retention_rows.read_rows(recipes.folder(out, dataset, "baseline", found["baseline", "full"].seeds[0]))[0]
        record["datasets"][dataset] = {
            "gallery": some["gallery"], "source": some["source"], "depth_pays": _plain(depth_pays(found)),
            "rows": summarise_rows(found), "notes": notes(out, dataset, names, seeds_),
        }  # fmt: skip
    write_metrics(record, out / "retention.json")
    files.write_text(out / "retention.md", markdown(record))
    if any(row["kind"] == "routed" for part in record["datasets"].values() for row in part["rows"]):
        figure.draw(record, out / "retention.png")
    return record


def notes(out: Path, dataset: str, names: Sequence[str], seeds_: Sequence[int]) -> list[str]:
    """Returns notes on what could not be measured, such as a budget below the first exit's cost, without duplicates."""
    said: dict[str, None] = {}
    for name in names:
        for seed in seeds_:
            file = recipes.folder(out, dataset, name, seed)
            if (found := retention_rows.read_rows(file)) is not None:
                said |= {f"{name}: {note}": None for note in found[0]["notes"]}
    return list(said)


def depth_sentence(dataset: str, part: Mapping[str, Any]) -> str:
    """Returns a sentence on whether full depth beats the shallower baseline of at most 0.70 of its cost."""
    pays = part["depth_pays"]
    if pays is None:
        return f"{dataset}: whether depth pays is unknown until the baseline and the shallower baseline are evaluated."
    count = len(next(row["seeds"] for row in part["rows"] if row["recipe"] == "static"))
    significant = pays["low"] > 0
    verdict = "depth pays" if significant else "depth does not significantly pay: use a larger task before comparing recipes"
    return (
        f"{dataset}: {verdict}. Baseline minus shallower baseline, mean recall: {_points(pays)} points "
        f"({count} seed{'s' if count > 1 else ''}, gallery of {part['gallery']['images']:,} images)."
    )


def markdown(record: Mapping[str, Any]) -> str:
    """Returns the tables as Markdown: exits of each recipe, and its routed rows within the target time; the JSON has all."""
    lines = [f"# Retention: setting {record['setting']}, seeds {', '.join(map(str, record['seeds']))}", ""]
    for dataset, part in record["datasets"].items():
        gallery = part["gallery"]
        lines += [
            f"## {dataset}", "", depth_sentence(dataset, part), "",
            f"{gallery['queries']:,} images of {part['source']} are queried against a gallery of {gallery['images']:,} images "
            f"and {gallery['captions']:,} captions. Mean recall is the mean of R@1, R@5 and R@10 of both directions. Retained "
            "is percent of the baseline with the same seed, which fine-tunes the same pretrained tower without exits. "
            "Intervals: 95%, over images and fine-tuning seeds; all seeds share the pretraining. Counted FLOPs and measured "
            "time (median over seeds, [minimum, maximum]) are fractions of the baseline's, router included. For each router "
            f"the most expensive row within {BUDGET:.2f} of the time is shown, or else the cheapest. Over random: difference "
            "to random routing at the same exit shares (where random routing is cheaper by the router), at the same FLOPs, "
            "and at the same time. Over shared: difference to the same row of `shared`.", "",
            "| recipe | row | text to image R@1/5/10 | image to text R@1/5/10 | mean recall | retained % | counted | measured "
            "| over random: shares | FLOPs | time | over static | over merged | over shared | lacks |",
            "| " + " | ".join(["---"] * 15) + " |",
        ]  # fmt: skip
        lines += [_line(row) for row in shown(part["rows"])]
        lines += ["", *(f"- {name}: {RECIPES[name].note}" for name in record["recipes"]), ""]
        lines += [*(f"- {note}" for note in part["notes"]), ""]
    return "\n".join(lines)


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Selects all exits, and per recipe and router the row of `figure.within_budget` with its random routing and oracle."""
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
    random = ("minus_random", "minus_random_flops", "minus_random_time")
    over = [_points(row.get(key)) for key in (*random, "minus_static", "minus_merged", "minus_shared")]
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
    return None if interval is None else asdict(interval)


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _paired(
    found: Mapping[tuple[str, str], SeedResults], run: tuple[str, str], other: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the recalls [S, 1 + R] of two rows at their common seeds; None if there are none."""
    if run not in found or other not in found:
        return None
    shared = [seed for seed in found[run].seeds if seed in found[other].seeds]
    if not shared:
        return None
    return tuple(found[row].values[[found[row].seeds.index(seed) for seed in shared]] for row in (run, other))


def _difference(found: Mapping[tuple[str, str], SeedResults], run: tuple[str, str], other: tuple[str, str]) -> Interval | None:
    pair = _paired(found, run, other)
    return None if pair is None else seeds.difference(*pair)
