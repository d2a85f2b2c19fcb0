"""Writes the report of an evaluation: a self-contained index.html, metrics.json and figures/*.png."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import ImageOps

from icar_jax import workdir
from icar_jax.data.images import ImageError
from icar_jax.data.records import Source
from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, RECALL_AT, Ranks
from icar_jax.evaluation.records.retrieval import RetrievalEvaluation, Run
from icar_jax.evaluation.report import report_figures as drawn
from icar_jax.evaluation.report import table
from icar_jax.evaluation.report.figures import exit_label
from icar_jax.evaluation.report.page import Page, Picture, RankDrop, Row, Table
from icar_jax.evaluation.report.verdicts import verdicts
from icar_jax.evaluation.routing.gallery import Evidence
from icar_jax.evaluation.routing.timing import Timing
from icar_jax.models.reduction.routes import in_cost_order

RANK_DROPS = 12  # number of images shown with the largest rank drops
_THUMBNAIL = (176, 176)  # pixels
_WORDS = {"text_to_image": "text \N{RIGHTWARDS ARROW} image", "image_to_text": "image \N{RIGHTWARDS ARROW} text"}
_ABOUT = {
    "full": "every image at full depth", "exit": "every image after this many blocks",
    "static": "a shallower baseline at full depth", "routed": "by complexity score; router included in the cost",
    "budget": "routed, thresholds set for this share of the cost", "random": "random routing at the same shares; no router",
    "oracle": "best assignment at the same shares: an upper bound",
    "lossless": "lossless oracle: earliest exit where no rank gets worse",
    "routed_affine": "routed, per-exit calibrated scores",
}  # fmt: skip


def write_report(record: RetrievalEvaluation, evidence: Evidence, source: Source, folder: Path, *, title: str) -> Path:
    """Writes the report to `folder` and returns the path of index.html. source: the evaluated images, for thumbnails."""
    table.write_metrics(record, folder / "metrics.json")
    pictures = []
    for name, picture, draw in _figures(record, evidence):
        workdir.write_bytes(folder / "figures" / f"{name}.png", drawn.render(draw, drawn.LIGHT, "png"))
        light, dark = (drawn.render(draw, theme, "svg") for theme in (drawn.LIGHT, drawn.DARK))
        pictures.append(Picture(*picture, light, dark))
    worst = _rank_drops(evidence, source)
    workdir.write_text(folder / "index.html", _page(record, pictures, worst, title).render())
    return folder / "index.html"


def _page(record: RetrievalEvaluation, pictures: Sequence[Picture], worst: Sequence[RankDrop], title: str) -> Page:
    return Page(
        title=f"Evaluation of {title}",
        gallery=record.gallery,
        cards=_cards(record),
        findings=[*verdicts(record), *record.notes],
        runs=_runs_table(record),
        more=_more_tables(record),
        pictures=pictures,
        stages=_stages_table(record.timing),
        stage_notes=_stage_notes(record),
        rank_drops=worst,
    )


def _cards(record: RetrievalEvaluation) -> list[tuple[str, str, str]]:
    runs = record.runs
    full = runs["full"]
    if "routed" not in runs:
        return [(f"R@5, {_WORDS[d]}", f"{full.metrics(d)['r5']:.1f}%", "every image at full depth") for d in DIRECTIONS]
    routed, made = runs["routed"], []
    kept = routed.retention
    if kept is not None:
        noise = "not significant" if kept.low <= 100 <= kept.high else "a loss" if kept.high < 100 else "a gain"
        made.append(("R@5 kept by routing", f"{kept.value:.1f}%", f"95% [{kept.low:.1f}, {kept.high:.1f}]: {noise}"))
    cost = drawn.share_of_full(runs, "routed", "counted")
    made.append(("Counted cost", f"{100 * cost:.0f}%", "of full-depth FLOPs, router included"))
    measured = drawn.share_of_full(runs, "routed", "measured")
    if measured is not None:
        made.append(("Measured speed", f"{1 / measured:.2f}\N{MULTIPLICATION SIGN}",
                     f"of full depth, router included: routing {'saves' if measured < 1 else 'loses'} time"))  # fmt: skip
    delta = record.comparisons.get("routed_minus_random")
    if delta:
        word = "significantly above" if delta.value > 0 else "significantly below"
        word = "not significant" if delta.includes_zero else word
        how = f"points R@5, 95% [{delta.low:+.1f}, {delta.high:+.1f}]: {word}"
        made.append(("Routed minus random", f"{delta.value:+.1f}", how))
    return made


def _row(name: str, cells: Sequence[str | Interval | None | Mapping[int, float]]) -> Row:
    return Row(exit_label(name), _ABOUT.get(name) or _ABOUT.get(name.partition("_")[0], ""), cells)


def _runs_table(record: RetrievalEvaluation) -> Table:
    runs, rows = record.runs, []
    ks = "/".join(map(str, RECALL_AT))
    for name in table.run_order(runs):
        run = runs[name]
        measured, speed = drawn.share_of_full(runs, name, "measured"), run.images_per_s
        recalls = ["/".join(f"{run.metrics(d)[f'r{k}']:.1f}" for k in RECALL_AT) for d in DIRECTIONS]
        counted = f"{100 * drawn.share_of_full(runs, name, 'counted'):.0f}%"
        timed = ["–" if measured is None else f"{100 * measured:.0f}%", "–" if speed is None else f"{speed:,.0f}"]
        rows.append(_row(name, [*recalls, run.retention, counted, *timed, run.share]))
    head = ["run", *(f"{_WORDS[d]}\nR@{ks}, %" for d in DIRECTIONS), "R@5 kept, %", "counted\nFLOPs", "measured\ntime"]
    return Table("Runs", [*head, "images/s", "blocks: share of images"], rows)


def _more_tables(record: RetrievalEvaluation) -> list[tuple[str, list[Table]]]:
    """Returns tables of ranks and category metrics per direction, and of the retention of every metric."""
    runs = record.runs
    order = table.run_order(runs)
    labelled = [m for m in runs["full"].text_to_image if m.startswith("map")]
    ranked = "Ranks" + (" and category level (mAP, %)" if labelled else "")
    names = {"median_rank": "median rank", "mean_rank": "mean rank"} | {m: _map_name(m) for m in labelled}
    by_direction = []
    for direction in DIRECTIONS:
        rows = [_row(n, [f"{runs[n].metrics(direction)[m]:,.1f}" for m in names]) for n in order]
        by_direction.append(Table(f"{ranked}, {_WORDS[direction]}", [_WORDS[direction], *names.values()], rows))
    kept = [*(f"r{k}" for k in RECALL_AT), *labelled]
    rows = [_row(n, [_kept(runs[n], m) for m in kept]) for n in order]
    head = ["retention, %", *(f"R@{m[1:]}" if m[0] == "r" else _map_name(m) for m in kept)]
    return [(ranked, by_direction), ("Retention of every metric, with intervals", [Table("Retention", head, rows)])]


def _map_name(metric: str) -> str:
    k, _, kind = metric.removeprefix("map").partition("_")
    return f"mAP@{k}" + (f"\n{kind}" if kind else "")


def _kept(run: Run, metric: str) -> str | Interval | None:
    found = run.intervals["mean"].get(metric)
    return found.retention if found else "–"


def _stages_table(t: Timing) -> Table:
    parts = [
        ("decode", "one thread; for scenes, drawing", t.decode_ms),
        ("preprocessing", "resizing for every model, one thread", t.preprocess_ms),
        ("router", "complexity score", t.router_ms),
        *((f"tower, {e} blocks", "image embedding", ms) for e, ms in sorted(t.tower_ms.items())),
        ("padding", "padding rows computed by routing", t.padding.ms if t.padding else None),
        ("text, per caption", "text embedding", t.text_ms),
    ]
    rows = [Row(name, about, [f"{ms:.3g}", f"{1000 / ms:,.0f}" if ms else "–"]) for name, about, ms in parts if ms is not None]
    return Table("Time per stage", ["stage", "ms", "per second"], rows)


def _stage_notes(record: RetrievalEvaluation) -> list[str]:
    t, notes = record.timing, []
    if t.compile_s is not None:
        notes.append(f"Compilation, not included: {t.compile_s:.1f} s for {t.programs} programs.")
    flops = record.flops.exits
    pairs = [f"{e} blocks {f.counted / 1e9:.3g} ({f.compiler / 1e9:.3g})" for e, f in flops.items() if f.compiler]
    if pairs:
        what = "Counted GFLOPs per image (in brackets: XLA's count, which includes norms and softmax)"
        notes.append(f"{what}: {', '.join(pairs)}.")
    return notes


def _figures(record: RetrievalEvaluation, evidence: Evidence):
    """Yields (file name, (title, alt, note), drawing) for every figure the runs provide data for."""
    runs = record.runs
    for cost, word in (("measured", "time"), ("counted", "FLOPs")):
        points = [
            f"{exit_label(n)} retains {kept.value:.1f}% at {100 * at:.0f}%"
            for n in table.run_order(runs)
            if (kept := runs[n].retention) and (at := drawn.share_of_full(runs, n, cost)) is not None
        ]
        note = "Upper left is better. Bars: 95% intervals relative to full depth."
        alt = f"R@5 kept against {cost} cost, both in percent of full depth: {'; '.join(points)}."
        yield f"kept_{cost}", (f"R@5 kept against {cost} {word}", alt, note), drawn.kept_against_cost(record, cost)
    scores, taken = evidence.gallery.scores, evidence.exits.get("routed")
    exits = {in_cost_order(evidence.gallery.by_exit)[-1] if n == "full" else table.exit_depth(n): r
             for n, r in evidence.ranks.items() if n == "full" or n.startswith("exit_")}  # fmt: skip
    if scores is not None:
        deepest = [100 * np.mean(taken[part] == in_cost_order(evidence.gallery.by_exit)[-1]) for part in drawn.deciles(scores)]
        alt = f"Share of images at full depth by complexity decile, simplest first: {', '.join(f'{v:.0f}%' for v in deepest)}."
        note = "Exits taken by the images, by decile of the complexity score."
        yield "share_by_complexity", ("Exits by complexity", alt, note), drawn.shares_by_complexity(scores, taken)
        rows = []
        for exit in sorted(exits):
            hits = drawn.hits_per_image(exits[exit], 5)
            rows.append(f"{exit} blocks {', '.join(f'{100 * hits[part].mean():.0f}' for part in drawn.deciles(scores))}")
        note = "Each line: all images at that exit. If complex images need depth, the lines diverge to the right."
        alt = f"R@5 in percent by complexity decile, simplest first: {'; '.join(rows)}."
        yield "recall_by_complexity", ("Recall by complexity", alt, note), drawn.recall_by_complexity(scores, exits)
    changes = rank_changes(evidence)
    if changes:
        same = [f"{e} blocks: {100 * drawn.change_shares(c)[3]:.0f}% the same, {100 * np.mean(c > 0):.0f}% worse"
                for e, c in sorted(changes.items())]  # fmt: skip
        which = "images that left early under routing" if "routed" in evidence.ranks else "all images, at each early exit"
        note = f"Change in target rank of the queries for {which}, both directions."
        yield "rank_change", ("Rank change by exit", f"{note} {'; '.join(same)}.", note), drawn.rank_changes(changes)


def rank_changes(evidence: Evidence) -> dict[int, np.ndarray]:
    """Returns early exit -> rank changes relative to full depth, for all queries of the images that left there.

    Positive is worse. Uses the routed run, or without one the runs with all images at one exit.
    """
    full = evidence.ranks["full"]
    found = {}
    if "routed" in evidence.ranks:
        taken = evidence.exits["routed"]
        for exit in np.unique(taken[taken < max(evidence.gallery.by_exit)]).tolist():
            found[exit] = _changes(evidence.ranks["routed"], full, taken == exit)
    else:
        everyone = np.ones(len(full.image_to_text), bool)
        for name in evidence.ranks:
            if name.startswith("exit_"):
                found[table.exit_depth(name)] = _changes(evidence.ranks[name], full, everyone)
    return found


def _changes(run: Ranks, full: Ranks, images: np.ndarray) -> np.ndarray:
    captions = images[full.caption_image]
    return np.concatenate([
        run.text_to_image[captions] - full.text_to_image[captions], run.image_to_text[images] - full.image_to_text[images]
    ])  # fmt: skip


def _rank_drops(evidence: Evidence, source: Source) -> list[RankDrop]:
    """Returns the images with the largest rank drops at early exits, worst first, each with its worst query."""
    early = [name for name in evidence.ranks if name.startswith("exit_")]
    name = "routed" if "routed" in evidence.ranks else min(early, key=table.exit_depth, default=None)
    if name is None:
        return []
    gallery, run, full = evidence.gallery, evidence.ranks[name], evidence.ranks["full"]
    left = evidence.exits[name] < max(gallery.by_exit)
    texts = [caption for group in gallery.captions for caption in group]
    worst = run.image_to_text - full.image_to_text
    query = np.full(len(worst), -1)  # -1: the image itself
    for caption, image in enumerate(full.caption_image.tolist()):
        fell = run.text_to_image[caption] - full.text_to_image[caption]
        if fell > worst[image]:
            worst[image], query[image] = fell, caption
    order = [i for i in np.argsort(-worst, kind="stable").tolist() if left[i] and worst[i] > 0][:RANK_DROPS]
    found = []
    for i in order:
        q = query[i]
        before, after = ((r.image_to_text[i] if q < 0 else r.text_to_image[q]) for r in (full, run))
        shown = gallery.captions[i][0] if q < 0 else texts[q]
        score = float(gallery.scores[i]) if gallery.scores is not None else None
        thumbnail = _thumbnail(source, int(gallery.index[i]))
        found.append(
            RankDrop(gallery.names[i], thumbnail, shown, int(before), int(after), int(evidence.exits[name][i]), score, q < 0)
        )
    return found


def _thumbnail(source: Source, index: int) -> bytes | None:
    try:
        picture = ImageOps.contain(source[index].image().convert("RGB"), _THUMBNAIL)
    except (OSError, ImageError):
        return None
    stream = io.BytesIO()
    picture.save(stream, format="jpeg", quality=82)
    return stream.getvalue()
