"""Commands on models: bundle, describe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from icar_jax import checkpoint, workdir
from icar_jax import config as cfg


def add(commands) -> None:
    _add_bundle(commands)
    _add_describe(commands)


def _add_bundle(commands) -> None:
    p = commands.add_parser(
        "bundle",
        help="join a CLIP and a complexity model with thresholds",
        description="Joins a CLIP with early exits and a complexity model into one folder that routes. Thresholds are "
        "set on calibration images, which the CLIP's workdir names, unless they are given.",
    )
    p.add_argument("--clip", required=True, help="workdir or checkpoint of the CLIP model")
    p.add_argument("--complexity", required=True, help="workdir or checkpoint of the complexity model")
    p.add_argument("--out", required=True, help="folder to write; WORKDIR/bundle is where evaluate.py looks")
    p.add_argument("--share", type=float, nargs="+", default=[], metavar="S", help="share of the images for each early exit")
    p.add_argument("--thresholds", type=float, nargs="+", metavar="T", help="use these instead of calibrating")
    p.add_argument("--root", help="folder of the pictures, where it moved since training")
    p.set_defaults(run=_bundle)


def _bundle(args: argparse.Namespace) -> None:
    from icar_jax.data import sources
    from icar_jax.evaluation.calibration import make_bundle

    calibration = None
    if args.thresholds is None:
        if (Path(args.clip) / workdir.CONFIG).is_file():
            data = workdir.load_config(args.clip).data
            data.root = args.root or data.root
            calibration = sources.calibration_source(data)
    elif args.share:
        raise cfg.ConfigError("--share and --thresholds exclude each other: a share is turned into a threshold")
    out = make_bundle(
        args.clip, args.complexity, args.out, calibration=calibration, shares=args.share, thresholds=args.thresholds
    )
    routing = checkpoint.describe(out)["routing"]
    print(f"Bundle: {out}: exits {routing['exits']}, thresholds {[round(t, 4) for t in routing['thresholds']]}")


def _add_describe(commands) -> None:
    p = commands.add_parser("describe", help="print what a checkpoint, bundle or workdir holds")
    p.add_argument("path")
    p.set_defaults(run=lambda args: print(json.dumps(checkpoint.describe(checkpoint.find(args.path)), indent=2)))
