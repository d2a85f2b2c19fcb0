"""Plain sentences about what an evaluation does and does not show."""

from __future__ import annotations

import math
from collections.abc import Mapping

from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, chance_recall
from icar_jax.evaluation.records.retrieval import Difference, RetrievalEvaluation, Run
from icar_jax.evaluation.routing.timing import Timing


def verdicts(record: RetrievalEvaluation) -> list[str]:
    """Returns sentences about the runs of an evaluation."""
    runs, comparisons = record.runs, record.comparisons
    lines = [_against_chance(record)]
    if "routed" in runs:
        lines.append(_retention("routed", runs["routed"], runs["full"]))
        if "routed_minus_random" in comparisons:
            lines.append(_against_random(comparisons["routed_minus_random"]))
        if "routed_affine_minus_routed" in comparisons:
            lines.append(_calibrated(comparisons["routed_affine_minus_routed"]))
        lines += _time("routed", runs["routed"], runs["full"])
        lines += _padding(record.timing)
        lines += _one_exit(runs["routed"])
        lines += _dominating_runs(runs, "routed")
        if "oracle" in runs:
            lines += _oracle(runs)
    for name in sorted(name for name in runs if name.startswith("budget_")):
        lines.append(_retention(name, runs[name], runs["full"]))
        lines += _time(name, runs[name], runs["full"])
        lines += _dominating_runs(runs, name)
    return lines


def _against_chance(record: RetrievalEvaluation) -> str:
    full, gallery = record.runs["full"], record.gallery
    parts, least = [], math.inf
    own = gallery.queries.captions / gallery.queries.images
    for direction in DIRECTIONS:
        shown = []
        for k in (5, 10):
            chance = chance_recall(gallery.images, gallery.captions, k, own)[direction]
            recall = full.metrics(direction)[f"r{k}"]
            times = recall / chance
            least = min(least, times)
            shown.append(f"R@{k} {recall:.1f}% ({times:.1f} times chance, {chance:.2g}%)")
        parts.append(f"{direction.replace('_', ' ')} {', '.join(shown)}")
    line = f"full depth: {'; '.join(parts)}"
    if least < 2:
        line += ": less than twice chance, so the comparisons below say little"
    return line


def _retention(name: str, routed: Run, full: Run) -> str:
    kept = routed.retention
    if kept is None:
        return f"the retention of {_display_name(name)} is undefined: full depth has too few hits at R@5"
    flops = 100 * routed.flops_per_image / full.flops_per_image
    line = (
        f"{name} retains {kept.value:.1f}% of full-depth R@5 (mean of both directions) at {flops:.0f}% of its FLOPs, "
        f"router included; 95% interval [{kept.low:.1f}, {kept.high:.1f}]"
    )
    if kept.low > 100:
        return f"{line}: above 100, so routing retrieves better than full depth here"
    if kept.high < 100:
        return f"{line}: below 100, so routing loses retrieval quality"
    return f"{line}: includes 100, so neither a loss nor a gain is shown in this gallery"


def _against_random(delta: Difference) -> str:
    line = f"routed - random = {delta.value:+.1f} points R@5, 95% interval [{delta.low:.1f}, {delta.high:.1f}]"
    if delta.includes_zero:
        return f"{line}: includes zero, so routing is not shown to beat random routing at these shares"
    if delta.value > 0:
        return f"{line}: above zero, so routing beats random routing at these shares"
    return f"{line}: below zero, so routing is worse than random routing at these shares"


def _calibrated(delta: Difference) -> str:
    line = (
        f"per-exit score calibration: {delta.value:+.1f} points R@5 compared with the same routing without it, 95% interval "
        f"[{delta.low:.1f}, {delta.high:.1f}]"
    )
    return f"{line}: includes zero, so no effect is shown" if delta.includes_zero else line


def _time(name: str, routed: Run, full: Run) -> list[str]:
    lines, who = [], _display_name(name)
    if routed.images_per_s is not None and full.images_per_s is not None:
        ratio = routed.images_per_s / full.images_per_s
        word = "loses" if ratio < 1 else "saves"
        lines.append(
            f"{who} {word} time: {routed.images_per_s:.1f} images/s, router included, against "
            f"{full.images_per_s:.1f} at full depth ({ratio:.2f} times the speed)"
        )
    if routed.flops_per_image >= full.flops_per_image:
        lines.append(f"{who} saves no FLOPs: with the router counted it costs at least as much as full depth")
    return lines


def _one_exit(routed: Run) -> list[str]:
    exit, share = max(routed.share.items(), key=lambda item: item[1])
    if share < 0.995:
        return []
    return [f"{100 * share:.1f}% of the images take exit {exit}: this equals a single exit plus the router's cost"]


def _dominating_runs(runs: Mapping[str, Run], name: str) -> list[str]:
    """Lists single exits and the shallower baseline that are at least as good as a routed run at no higher cost."""
    routed, lines = runs[name], []
    for other, run in runs.items():
        if not (other == "static" or other.startswith("exit_")) or run.mean_r5 < routed.mean_r5:
            continue
        who = "the shallower baseline" if other == "static" else f"{other} for every image"
        recalls = f"(mean R@5 {run.mean_r5:.1f}% against {routed.mean_r5:.1f}%)"
        speeds = run.images_per_s, routed.images_per_s
        if run.flops_per_image <= routed.flops_per_image:
            lines.append(f"{who} is at least as good as {_display_name(name)} at no more FLOPs {recalls}")
        elif None not in speeds and speeds[0] >= speeds[1]:
            lines.append(
                f"{who} is at least as good as {_display_name(name)} and no slower {recalls}: {speeds[0]:.1f} images/s against "
                f"{speeds[1]:.1f}"
            )
    return lines


def _display_name(name: str) -> str:
    return "routing" if name == "routed" else name


def _oracle(runs: Mapping[str, Run]) -> list[str]:
    """Bounds what a better router could gain at the same shares."""
    kept, routed = runs["oracle"].retention, runs["routed"].retention
    if kept is None or routed is None:
        return []
    line = (
        f"the oracle (upper bound) retains {kept.value:.1f}% at the same shares, routed {routed.value:.1f}%: the "
        "difference bounds what a better score could gain"
    )
    if "lossless" in runs:
        share = 100 * runs["lossless"].flops_per_image / runs["full"].flops_per_image
        line += (
            "; with the lossless oracle (every image at the earliest exit where none of its ranks gets worse), the towers "
            f"alone would cost {share:.0f}% of full depth"
        )
    return [line]


def _padding(timing: Timing) -> list[str]:
    """Warns if padding takes a large part of the computed rows."""
    wasted = timing.padding
    if wasted is None or wasted.share < 0.1:
        return []
    return [
        f"{100 * wasted.share:.0f}% of the rows that routing computed for {timing.images} images were padding: use a "
        "smaller batch, or more images at a time"
    ]
