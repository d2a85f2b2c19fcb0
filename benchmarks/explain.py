"""Deletion test of complexity maps: how much deleting the highlighted pixels lowers the score, and overlap with objects.

    python benchmarks/explain.py --checkpoint WORKDIR [--images 128] [--json out.json] [--figure out.png]

CHECKPOINT is a complexity model trained on scenes, for example by `train.py --config=configs/demo.py:complexity`. Prints lines
for each stage (or for the patches, if the model is a head on the blocks of a CLIP) and both fills of deleted pixels. The figure
shows the default stage against the fraction of deleted pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from matplotlib.figure import Figure

import icar_jax
from icar_jax import workdir
from icar_jax.evaluation.complexity import deletion
from icar_jax.evaluation.report import figures
from icar_jax.models.complexity import MAP_STAGE, MAP_STAGES
from icar_jax.models.token_router import BlocksArch

SHARES = (0.05, 0.1, 0.2, 0.4)
_STYLES = {
    "highest": ("#D55E00", "o", "ranked highest by the map"),
    "random_cells": ("#009E73", "^", "random cells of the map"),
    "random_pixels": ("#56B4E9", "s", "random pixels"),
    "lowest": ("#000000", "v", "ranked lowest by the map"),
}
_FILLS = {"background": "the scene without its objects", "blur": "the blurred image"}


def draw(record: dict, path: str) -> None:
    """Plots the mean drop in score against the fraction of deleted pixels, one panel per fill."""
    figure = Figure(figsize=(9.6, 4.2), dpi=figures.DPI, layout="constrained")
    axes = figure.subplots(1, len(deletion.FILLS), sharey=True)
    for panel, fill in zip(axes, deletion.FILLS, strict=True):
        by_share = record["curve"][fill]
        for order, (colour, marker, label) in _STYLES.items():
            found = [by_share[f"{share:g}"][order] for share in SHARES]
            values = [each["value"] for each in found]
            bars = [[v - each["low"] for v, each in zip(values, found)], [each["high"] - v for v, each in zip(values, found)]]
            percent = [100 * share for share in SHARES]
            panel.errorbar(percent, values, bars, color=colour, marker=marker, label=label, capsize=2, linewidth=1.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
        panel.set_title(f"filled with {_FILLS[fill]}", fontsize=10)
        panel.set_xlabel("deleted pixels, %")
    axes[0].set_ylabel("drop in score (95% interval)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8.5)
    figure.suptitle(f"Deletion test on {record['images']} scenes, maps of {_called(record['default_stage'])}", fontsize=10.5)
    figures.save(figure, path)


def _called(stage: str) -> str:
    return "patches" if stage == "None" else f"stage {stage}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--images", type=int, default=128)
    p.add_argument("--json")
    p.add_argument("--figure")
    args = p.parse_args()
    model = icar_jax.load(args.checkpoint, batch_size=64)
    patches = isinstance(model.scorer.complexity.arch, BlocksArch)
    stages, default = ((None,), None) if patches else (MAP_STAGES, MAP_STAGE)
    record = deletion.deletion_test(model, images=args.images, stages=stages)
    print(
        f"{args.images} scenes of {record['pixels']} pixels, PCC {record['pcc']:.3f}; drop in score with 20% of pixels deleted"
    )
    for stage, found in record["stages"].items():
        for fill, by_share in found["deletion"].items():
            orders = "  ".join(f"{order} {by_share['0.2'][order]['value']:+.3f}" for order in deletion.ORDERS)
            print(f"{_called(stage)}  {fill:10}  {orders}")
        mass = found["mass"]["objects"]
        inside, area = mass["inside"]["value"], mass["area"]["value"]
        print(f"{_called(stage)}  map mass inside the objects' boxes {inside:.2f}, area of the boxes {area:.2f}")
    record["default_stage"], record["model"] = str(default), dataclasses.asdict(model.scorer.complexity.arch)
    if args.figure:
        more = deletion.deletion_test(model, images=args.images, stages=(default,), shares=SHARES)
        record["curve"] = more["stages"][str(default)]["deletion"]
        draw(record, args.figure)
    if args.json:
        workdir.write_text(Path(args.json), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
