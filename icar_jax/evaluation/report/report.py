"""The report of an evaluation: REPORT/index.html, which needs no other file, metrics.json and figures/*.png."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from icar_jax import workdir
from icar_jax.data.images import ImageError
from icar_jax.data.records import Source
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, RECALL_AT, Ranks
from icar_jax.evaluation.report import page as html
from icar_jax.evaluation.report import report_figures as drawn
from icar_jax.evaluation.report import table
from icar_jax.evaluation.report.figures import exit_label
from icar_jax.evaluation.report.page import text
from icar_jax.evaluation.report.verdicts import verdicts
from icar_jax.evaluation.routing.gallery import Evidence

FALLS = 12  # images shown whose rank fell most
_THUMBNAIL = (176, 176)  # pixels
_WORDS = {"text_to_image": "text \N{RIGHTWARDS ARROW} image", "image_to_text": "image \N{RIGHTWARDS ARROW} text"}
_ABOUT = {
    "full": "every image at full depth", "exit": "every image after so many blocks", "static": "a smaller model",
    "routed": "by complexity, the bundle's thresholds; router counted", "budget": "thresholds for this share of the cost",
    "random": "same shares by dice; no router", "oracle": "same shares, ranks known: an upper bound",
    "lossless": "as early as no rank falls, ranks known", "routed_affine": "routed, its scores calibrated for each exit",
}  # fmt: skip


def write_report(metrics: Mapping[str, Any], evidence: Evidence, source: Source, folder: Path, *, title: str) -> Path:
    """Writes the report and returns the path of its page. `metrics` as documented in `table`; `source` has the pictures."""
    table.write_metrics(metrics, folder / "metrics.json")
    pictures = []
    for name, picture, draw in _figures(metrics, evidence):
        workdir.write_bytes(folder / "figures" / f"{name}.png", drawn.render(draw, drawn.LIGHT, "png"))
        light, dark = (drawn.render(draw, theme, "svg") for theme in (drawn.LIGHT, drawn.DARK))
        pictures.append(html.Picture(*picture, light, dark))
    worst = _falls(evidence, source)
    workdir.write_text(folder / "index.html", _page(metrics, pictures, worst, title))
    return folder / "index.html"


def _page(metrics: Mapping[str, Any], pictures: Sequence[html.Picture], worst: Sequence[html.Fall], title: str) -> str:
    gallery = metrics["gallery"]
    asked = gallery["queries"]
    far = f", {text(gallery['distractors'])} as distractors" if gallery.get("distractors") else ""
    lead = (
        f"<p>{asked['images']:,} images and {asked['captions']:,} captions of {text(gallery.get('source', 'the split'))} asked "
        f"for in a gallery of {gallery['images']:,} images and {gallery['captions']:,} captions{far}.</p>"
        f"{html.cards(_cards(metrics))}"
    )
    sections = [
        html.section("In plain words", html.sentences([*verdicts(metrics), *metrics.get("notes", [])])),
        html.section(
            "Runs side by side", html.table(_runs_table(metrics)) + _more_tables(metrics),
            "R@K: share of the queries whose right answer is among the first K. Kept: R@5, mean of both directions, in percent "
            "of full depth, with its 95% interval. Costs are in percent of full depth.",
        ),
        html.section(
            "What is kept, and what it costs", html.figures(pictures),
            "Small dots are other thresholds on these same images: a sweep that shows what is possible. Nothing was chosen on "
            "it; the thresholds of the runs come from calibration images.",
        ),
    ]  # fmt: skip
    if "timing" in metrics:
        sections.append(html.section("Where the time goes", _timing(metrics)))
    if worst:
        sections.append(
            html.section(
                "What early exits lost", html.falls(worst),
                "The images that left early and whose rank fell most for one of their queries: rank at full depth, then here.",
            )
        )  # fmt: skip
    foot = "Intervals resample images with all their captions, 95%, paired between runs. All numbers: metrics.json."
    return html.page(f"Evaluation of {title}", sections, lead, f"<p>{foot}</p>")


def _cards(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    runs = metrics["runs"]
    full = runs["full"]
    if "routed" not in runs:
        return [(f"R@5, {_WORDS[d]}", f"{full[d]['r5']:.1f}%", "every image at full depth") for d in DIRECTIONS]
    routed, made = runs["routed"], []
    kept = routed["retention"]
    if kept is not None:
        noise = "within the noise" if kept["low"] <= 100 <= kept["high"] else "a loss" if kept["high"] < 100 else "a gain"
        made.append(("R@5 kept by routing", f"{kept['value']:.1f}%", f"95% [{kept['low']:.1f}, {kept['high']:.1f}]: {noise}"))
    cost = drawn.share_of_full(runs, "routed", "counted")
    made.append(("Counted cost", f"{100 * cost:.0f}%", "of full depth's FLOPs, router included"))
    measured = drawn.share_of_full(runs, "routed", "measured")
    if measured is not None:
        made.append(("Measured speed", f"{1 / measured:.2f}\N{MULTIPLICATION SIGN}",
                     f"full depth's, router included: routing {'saves' if measured < 1 else 'loses'} time"))  # fmt: skip
    delta = metrics.get("comparisons", {}).get("routed_minus_random")
    if delta:
        word = "better than dice" if delta["value"] > 0 else "worse than dice"
        word = "not shown to beat dice" if delta["includes_zero"] else word
        how = f"points R@5, 95% [{delta['low']:+.1f}, {delta['high']:+.1f}]: {word}"
        made.append(("Against random routing", f"{delta['value']:+.1f}", how))
    return made


def _name(name: str) -> str:
    about = _ABOUT.get(name) or _ABOUT.get(name.partition("_")[0], "")
    return f"{text(exit_label(name))}<small>{text(about)}</small>"


def _runs_table(metrics: Mapping[str, Any]) -> html.Table:
    runs, rows = metrics["runs"], []
    ks = "/".join(map(str, RECALL_AT))
    for name in table.run_order(runs):
        run = runs[name]
        measured, speed = drawn.share_of_full(runs, name, "measured"), run["images_per_s"]
        cells = ["/".join(f"{run[d][f'r{k}']:.1f}" for k in RECALL_AT) for d in DIRECTIONS]
        cells.append(_interval(run["retention"]))
        cells.append(f"{100 * drawn.share_of_full(runs, name, 'counted'):.0f}%")
        cells.append("–" if measured is None else f"{100 * measured:.0f}%")
        cells.append("–" if speed is None else f"{speed:,.0f}")
        rows.append((_name(name), [*cells, html.bar(run["share"])]))
    head = ["run", *(f"{_WORDS[d]}<br>R@{ks}, %" for d in DIRECTIONS), "R@5 kept, %", "counted<br>FLOPs", "measured<br>time"]
    return html.Table("Runs side by side", [*head, "images/s", "blocks: share of the images"], rows)


def _more_tables(metrics: Mapping[str, Any]) -> str:
    runs = metrics["runs"]
    order = table.run_order(runs)
    labelled = [m for m in runs["full"]["text_to_image"] if m.startswith("map")]
    made = []
    ranked = "Ranks" + (" and category level (mAP, %)" if labelled else "")
    names = {"median_rank": "median rank", "mean_rank": "mean rank"} | {m: _map_name(m) for m in labelled}
    for direction in DIRECTIONS:
        shown = [m for m in names if m in runs["full"][direction]]
        rows = [(_name(n), [f"{runs[n][direction][m]:,.1f}" for m in shown]) for n in order]
        head = [_WORDS[direction], *(names[m] for m in shown)]
        made.append(html.table(html.Table(f"{ranked}, {_WORDS[direction]}", head, rows)))
    found = html.details(ranked, "".join(made))
    if "intervals" in runs["full"]:
        kept = [*(f"r{k}" for k in RECALL_AT), *labelled]
        rows = [(_name(n), [_kept(runs[n], m) for m in kept]) for n in order]
        head = ["kept, % of full depth", *(f"R@{m[1:]}" if m[0] == "r" else _map_name(m) for m in kept)]
        found += html.details("What every metric keeps, with intervals", html.table(html.Table("What is kept", head, rows)))
    return found


def _map_name(metric: str) -> str:
    k, _, kind = metric.removeprefix("map").partition("_")
    return f"mAP@{k}" + (f"<br>{kind}" if kind else "")


def _kept(run: Mapping[str, Any], metric: str) -> str:
    found = run["intervals"]["mean"].get(metric)
    return _interval(found["retention"]) if found else "–"


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "undefined"
    return f'{found["value"]:.1f} <small class="i">[{found["low"]:.1f}, {found["high"]:.1f}]</small>'


def _timing(metrics: Mapping[str, Any]) -> str:
    t, rows = metrics["timing"], []
    towers = sorted(t["tower_ms"].items(), key=lambda item: int(item[0]))
    parts = [
        ("decode", t["decode_ms"], "one thread; scenes are drawn"),
        ("preprocessing", t["preprocess_ms"], "resizing for every model, one thread"),
        ("router", t["router_ms"], "the complexity score"),
        *((f"tower, {e} blocks", ms, "the image embedding") for e, ms in towers),
        ("padding", t["padding"]["ms"] if t["padding"] else None, "rows that routing computed and threw away"),
        ("text, per caption", t["text_ms"], "the text embedding"),
    ]
    for name, ms, about in parts:
        if ms is not None:
            rows.append((f"{text(name)}<small>{text(about)}</small>", [f"{ms:.3g}", f"{1000 / ms:,.0f}" if ms else "–"]))
    made = html.table(html.Table("Where the time goes", ["part", "ms", "per second"], rows))
    if t.get("compile_s") is not None:
        made += f"<p>Compilation, once and apart: {t['compile_s']:.1f} s for {t['programs']} programs.</p>"
    flops = metrics.get("flops", {}).get("exits", {})
    pairs = [f"{e} blocks {f['counted'] / 1e9:.3g} ({f['compiler'] / 1e9:.3g})" for e, f in flops.items() if f["compiler"]]
    if pairs:
        what = "Counted GFLOPs per image, and in brackets what XLA counts, norms and softmax with it"
        made += f"<p>{what}: {', '.join(pairs)}.</p>"
    return made


def _figures(metrics: Mapping[str, Any], evidence: Evidence):
    """(file name, (title, alt, note), drawing) of every figure that the runs allow."""
    runs = metrics["runs"]
    for cost, word in (("measured", "time"), ("counted", "FLOPs")):
        points = [
            f"{exit_label(n)} keeps {runs[n]['retention']['value']:.1f}% at {100 * at:.0f}%"
            for n in table.run_order(runs)
            if runs[n]["retention"] and (at := drawn.share_of_full(runs, n, cost)) is not None
        ]
        note = "Up and to the left is better. Bars: 95% intervals against full depth."
        alt = f"R@5 kept against {cost} cost, both in percent of full depth: {'; '.join(points)}."
        yield f"kept_{cost}", (f"Kept against {cost} {word}", alt, note), drawn.kept_against_cost(metrics, cost)
    scores, taken = evidence.gallery.scores, evidence.exits.get("routed")
    exits = {max(evidence.gallery.by_exit) if n == "full" else table.exit_depth(n): r
             for n, r in evidence.ranks.items() if n == "full" or n.startswith("exit_")}  # fmt: skip
    if scores is not None:
        deepest = [100 * np.mean(taken[part] == max(exits)) for part in drawn.deciles(scores)]
        alt = f"Share of full depth by tenth of complexity, simplest first: {', '.join(f'{v:.0f}%' for v in deepest)}."
        note = "Which exits the images take, by tenths of their complexity scores."
        yield "share_by_complexity", ("Exits by complexity", alt, note), drawn.shares_by_complexity(scores, taken)
        rows = []
        for exit in sorted(exits):
            hits = drawn.hits_per_image(exits[exit], 5)
            rows.append(f"{exit} blocks {', '.join(f'{100 * hits[part].mean():.0f}' for part in drawn.deciles(scores))}")
        note = "If depth pays for complex images, the lines part to the right. Each line: every image at that exit."
        alt = f"R@5 in percent by tenth of complexity, simplest first: {'; '.join(rows)}."
        yield "recall_by_complexity", ("Recall by complexity", alt, note), drawn.recall_by_complexity(scores, exits)
    changes = rank_changes(evidence)
    if changes:
        same = [f"{e} blocks: {100 * drawn.change_shares(c)[3]:.0f}% the same, {100 * np.mean(c > 0):.0f}% worse"
                for e, c in sorted(changes.items())]  # fmt: skip
        which = "images that left early under routing" if "routed" in evidence.ranks else "all images, at each early exit"
        note = f"Of the queries for {which}, both directions, how the rank of the answer moved."
        yield "rank_change", ("Rank change by exit", f"{note} {'; '.join(same)}.", note), drawn.rank_changes(changes)


def rank_changes(evidence: Evidence) -> dict[int, np.ndarray]:
    """Early exit -> change of rank against full depth of every query of the images that took it; positive is worse.

    Of the routed run; without one, of the runs that take every image out at one exit.
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


def _falls(evidence: Evidence, source: Source) -> list[html.Fall]:
    """The images that fell most by leaving early, worst first, each by the worst of its queries."""
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
    order = [i for i in np.argsort(-worst, kind="stable").tolist() if left[i] and worst[i] > 0][:FALLS]
    found = []
    for i in order:
        q = query[i]
        before, after = ((r.image_to_text[i] if q < 0 else r.text_to_image[q]) for r in (full, run))
        asked = gallery.captions[i][0] if q < 0 else texts[q]
        score = float(gallery.scores[i]) if gallery.scores is not None else None
        thumbnail = _thumbnail(source, int(gallery.index[i]))
        found.append(
            html.Fall(gallery.names[i], thumbnail, asked, int(before), int(after), int(evidence.exits[name][i]), score, q < 0)
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
