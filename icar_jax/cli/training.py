"""The commands `icar train` and `icar evaluate`, which use absl flags, `icar plan` and `icar scenes`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from icar_jax import config as cfg

PROGRAMS = {
    "train": "train CLIP with early exits, or the complexity model that routes it",
    "evaluate": "evaluate a trained model on its held-out split",
}


def add(commands) -> None:
    """Adds `icar train`, `icar evaluate`, `icar plan` and `icar scenes` to the subparsers."""
    for name, what in PROGRAMS.items():
        commands.add_parser(name, help=what)  # only for --help; `cli.main` passes these commands to absl
    _add_plan(commands)
    _add_scenes(commands)


def _add_plan(commands) -> None:
    p = commands.add_parser(
        "plan",
        help="memory and FLOPs of a training configuration on a TPU slice, compiled without a TPU",
        description="Compiles the training step for a TPU slice and prints memory, FLOPs, collectives and a bound on its "
        "speed. The exit status is 0 only if it fits. Needs `pip install libtpu`; --devices compiles for CPUs instead.",
    )
    p.add_argument("--config", required=True, help="configs/x.py or configs/x.py:argument")
    p.add_argument("--topology", default="", help="slice such as v5e:16x16 or v5p:4x4x4; with --devices, a chip such as h100")
    p.add_argument("--devices", type=int, default=0, help="compile for this many CPU devices instead")
    p.add_argument("--sweep", action="store_true", help="try mesh shapes, remat and scan; list those that fit, fastest first")
    p.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from icar_jax.cli.program import config_of
    from icar_jax.planner.report import run

    sys.exit(run(config_of(args), args.topology, args.devices, args.sweep, sys.stdout))


def _add_scenes(commands) -> None:
    p = commands.add_parser("scenes", help="write synthetic scenes with captions: a contact sheet, or a folder of images")
    p.add_argument("out", help="PNG file for a contact sheet, or folder for images/ and captions.jsonl")
    p.add_argument("--split", default="val", help="train, calibration, val, test, relations or heldout")
    p.add_argument("-n", type=int, default=20, help="number of images")
    p.set_defaults(run=_scenes)


def _scenes(args: argparse.Namespace) -> None:
    from icar_jax.data.scenes import Scenes, contact_sheet, picture_folder

    suffix = Path(args.out).suffix.lower()
    if suffix not in ("", ".png"):
        raise cfg.ConfigError(f"{args.out} must end in .png (contact sheet) or have no suffix (folder)")
    (contact_sheet if suffix else picture_folder)(Scenes(args.split, args.n), args.n, args.out)
    print(f"{args.n} images of scenes/{args.split}: {args.out}")
