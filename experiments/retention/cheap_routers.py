"""Compares cheap routers by complexity prediction on held-out scenes and by cost relative to ViT-L/14.

    python -m experiments.retention.cheap_routers --workdir workdir/routers [--clip workdir/demo] [--only atto nano] [--quick]
        [--speed docs/results/complexity_speed.json] [--json docs/results/cheap_routers.json] [--figure docs/cheap_routers.png]

Trains every router through train.py and configs/complexity.py, for ten to twenty CPU-minutes each, and evaluates it with
evaluate.py on 1,000 scenes of `test`. ConvNeXts at 112 pixels are initialised from the same model at 64. The same command
resumes an interrupted run. With --clip, a head on that CLIP's first blocks is included. Small routers see more scenes in the
same time, so the table shows what a router learns in a given time, not its best possible accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from icar_jax import workdir as files
from icar_jax.evaluation.report import figures

ROOT = Path(__file__).parents[2]
BATCH = 64


@dataclass(frozen=True)
class Stage:
    """One run of train.py: the argument of configs/complexity.py, the steps, and additional flags."""

    argument: str
    steps: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.argument.replace(",", "-") if not self.flags else "blocks"

    @property
    def title(self) -> str:
        variant, _, size = self.argument.partition(",")
        return f"{variant}@{size or 64}" if not self.flags else "head on two blocks"


ROUTERS: dict[str, tuple[Stage, ...]] = {
    "atto": (Stage("atto", 1000), Stage("atto,112", 150)),
    "femto": (Stage("femto", 500), Stage("femto,112", 50)),
    "pico": (Stage("pico", 200), Stage("pico,112", 20)),
    "nano": (Stage("nano", 120), Stage("nano,112", 12)),
    "demo": (Stage("demo", 7000),),
}
HEAD_STEPS = 1000


def head(clip: str) -> Stage:
    """Returns a head on the first two blocks of the CLIP at `clip`, which takes 64-pixel images, as `demo` does."""
    chosen = ("--config.complexity.variant=blocks", f"--config.complexity.clip={clip}", "--config.complexity.blocks=2")
    return Stage("demo", HEAD_STEPS, chosen)


def config_flag(stage: Stage) -> str:
    return f"--config={ROOT / 'configs/complexity.py'}:{stage.argument}"


def train(stage: Stage, folder: Path, init: Path | None, quick: bool) -> None:
    """Runs or resumes train.py; does nothing for a finished run."""
    steps = 4 if quick else stage.steps
    often, saved = max(2, min(500, steps // 2)), max(2, min(250, steps // 2))
    flags = [config_flag(stage), f"--workdir={folder}", f"--config.train.steps={steps}", f"--config.train.eval_every={often}"]
    flags += [f"--config.train.checkpoint_every={saved}", f"--config.optim.warmup_steps={min(100, steps // 4)}", *stage.flags]
    if init is not None:
        flags += [f"--config.train.init={init}", "--config.optim.lr=5e-4"]
    subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True)


def evaluate(stage: Stage, folder: Path, quick: bool) -> dict:
    """Runs evaluate.py if needed and returns its metrics.json."""
    found = folder / "metrics.json"
    if not found.exists():
        size = ["--config.eval.size=100"] if quick else []
        command = [sys.executable, ROOT / "evaluate.py", config_flag(stage), f"--workdir={folder}", *stage.flags, *size]
        subprocess.run(command, check=True)
    return json.loads(found.read_text(encoding="utf-8"))


def train_and_evaluate(stages: tuple[Stage, ...], folder: Path, quick: bool) -> list[dict]:
    """Trains and evaluates the stages; returns one row per stage: quality with intervals, cost, training scenes so far."""
    rows, scenes, before = [], 0, None
    for stage in stages:
        workdir = folder / stage.name
        train(stage, workdir, before, quick)
        scenes += BATCH * (4 if quick else stage.steps)
        before = workdir
        rows.append({"router": stage.title, "scenes_seen": scenes, **quality(stage, workdir, quick)})
    return rows


def quality(stage: Stage, workdir: Path, quick: bool) -> dict:
    metrics = evaluate(stage, workdir, quick)
    model, cost = metrics["runs"]["model"], metrics["cost"]["model"]
    added = (
        cost.get("routing_flops", cost["flops_per_image"]) / cost["flops_per_image"]
    )  # below 1 for a head that shares the tower
    return {
        "images": metrics["images"],
        **{metric: model[metric] for metric in ("pcc", "srcc", "rmse")},
        "margin": metrics["margin"],
        "classical_pcc": {run: values["pcc"] for run, values in metrics["runs"].items() if run != "model"},
        "nuisance_pcc": {
            kind: {level: part["pcc"] for level, part in levels.items()} for kind, levels in metrics["nuisance"].items()
        },
        "flops_share_of_vit_l14": added * cost["share_of_vit_l14"],
    }


def wall_shares(path: Path | None) -> dict[str, float]:
    """Reads router -> wall time as a fraction of ViT-L/14's image tower, as written by benchmarks/complexity.py --tower."""
    if path is None:
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["model"]: row["wall_share_of_vit_l14"] for row in rows if "wall_share_of_vit_l14" in row}


def print_table(rows: list[dict]) -> None:
    table = Table(title=f"Routers on {rows[0]['images']:,} held-out scenes")
    titles = ("PCC", "95% interval", "margin over classical", "lowest PCC by nuisance level", "of ViT-L/14: FLOPs", "time",
              "scenes seen")  # fmt: skip
    table.add_column("router")
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        pcc, margin, wall = row["pcc"], row["margin"], row.get("wall_share_of_vit_l14")
        percent = lambda share: "-" if share is None else f"{100 * share:.2g}%"
        worst = min(
            (part["model"]["value"], f"{kind} {level}")
            for kind, levels in row["nuisance_pcc"].items()
            for level, part in levels.items()
            if part["model"] is not None
        )
        table.add_row(
            row["router"], f"{pcc['value']:.3f}", f"{pcc['low']:.3f} to {pcc['high']:.3f}", f"{margin['value']:+.3f}",
            f"{worst[0]:.3f} ({worst[1]})", percent(row["flops_share_of_vit_l14"]), percent(wall),
            f"{row['scenes_seen']:,}",
        )  # fmt: skip
    Console(width=150).print(table)


def draw(rows: list[dict], path: str) -> None:
    """Plots PCC with its interval against the counted cost."""
    figure = Figure(figsize=(7.2, 4.4), dpi=figures.DPI, layout="constrained")
    axes = figure.subplots()
    for row in rows:
        pcc, share = row["pcc"], 100 * row["flops_share_of_vit_l14"]
        bars = [[pcc["value"] - pcc["low"]], [pcc["high"] - pcc["value"]]]
        axes.errorbar([share], [pcc["value"]], bars, marker="o", capsize=3, color="#0072B2")
        axes.annotate(row["router"], (share, pcc["value"]), xytext=(7, -3), textcoords="offset points", fontsize=9)
    name, best = max(rows[0]["classical_pcc"].items(), key=lambda item: item[1]["value"])
    axes.axhline(best["value"], color="#D55E00", linestyle="--", linewidth=1)
    axes.annotate(
        f"best classical measure ({name.replace('_', ' ')})", (0.01, best["value"]), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", fontsize=9, color="#D55E00",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("counted cost, % of ViT-L/14's image tower")
    axes.set_ylabel("PCC on held-out scenes")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workdir", type=Path, required=True, help="folder of the runs")
    p.add_argument("--clip", help="workdir or checkpoint of a 64-pixel CLIP, for a head on its first blocks")
    p.add_argument("--only", nargs="+", choices=list(ROUTERS), help="only these ConvNeXts")
    p.add_argument("--speed", type=Path, help="output of benchmarks/complexity.py --tower --json, for wall time")
    p.add_argument("--quick", action="store_true", help="four steps and 100 scenes each, as a smoke test")
    p.add_argument("--json", type=Path)
    p.add_argument("--figure")
    args = p.parse_args()
    routers = [stages for name, stages in ROUTERS.items() if not args.only or name in args.only]
    if args.clip:
        routers.append((head(args.clip),))
    shares = wall_shares(args.speed)
    folder = args.workdir / "quick" if args.quick else args.workdir
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        for stages in routers:
            for row in train_and_evaluate(stages, folder, args.quick):
                share = shares.get(row["router"])
                rows.append(row if share is None else row | {"wall_share_of_vit_l14": share})
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # train.py or evaluate.py printed the error
    print_table(rows)
    if args.figure:
        draw(rows, args.figure)
    if args.json:
        files.write_text(args.json, json.dumps({"benchmark": "cheap_routers", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
