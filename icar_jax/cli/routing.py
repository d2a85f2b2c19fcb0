"""The commands `icar bundle`, `icar calibrate` and `icar describe`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from icar_jax import config as cfg
from icar_jax.cli.arguments import positive


def add(commands) -> None:
    """Adds `icar bundle`, `icar calibrate` and `icar describe` to the subparsers."""
    _add_bundle(commands)
    _add_calibrate(commands)
    _add_describe(commands)


def _add_bundle(commands) -> None:
    p = commands.add_parser(
        "bundle",
        help="combine a CLIP, a complexity model and thresholds",
        description="Combines a CLIP with early exits and a complexity model into one folder that routes images. Unless "
        "thresholds are given, they are set on the calibration images of the CLIP's workdir.",
    )
    p.add_argument("--clip", required=True, help="workdir or checkpoint of the CLIP model")
    p.add_argument("--complexity", required=True, help="workdir or checkpoint of the complexity model")
    p.add_argument("--out", required=True, help="folder to write; `icar evaluate` reads WORKDIR/bundle")
    p.add_argument("--share", type=float, nargs="+", default=[], metavar="S", help="fraction of images for each early exit")
    p.add_argument("--thresholds", type=float, nargs="+", metavar="T", help="use these thresholds instead of calibrating")
    p.add_argument("--root", help="image folder, if it has moved since training")
    p.set_defaults(run=_bundle)


def _bundle(args: argparse.Namespace) -> None:
    from icar_jax import checkpoint, workdir
    from icar_jax.data import configured
    from icar_jax.evaluation.routing.calibration import make_bundle

    calibration = None
    if args.thresholds is None:
        if (Path(args.clip) / workdir.CONFIG).is_file():
            data = workdir.load_config(args.clip).data
            data.root = args.root or data.root
            calibration = configured.calibration_source(data)
    elif args.share:
        raise cfg.ConfigError("--share and --thresholds exclude each other: shares determine the thresholds")
    out = make_bundle(
        args.clip, args.complexity, args.out, calibration=calibration, shares=args.share, thresholds=args.thresholds
    )
    routing = checkpoint.describe(out)["routing"]
    print(f"Bundle: {out}: exits {routing['exits']}, thresholds {[round(t, 4) for t in routing['thresholds']]}")


def _add_calibrate(commands) -> None:
    p = commands.add_parser(
        "calibrate",
        help="set the thresholds of a bundle or of a classifier on calibration images",
        description="Sets thresholds and writes them, with the method used, into the description of a bundle (from a budget, "
        "a recall drop, shares, or labels with one early exit) or of a classifier (from labels). By default the calibration "
        "images of the checkpoint's workdir are used.",
    )
    p.add_argument("checkpoint", help="bundle, complexity classifier, or a workdir with one")
    how = p.add_mutually_exclusive_group(required=True)
    how.add_argument("--budget", type=float, help="mean cost, router included, as a fraction of full depth, such as 0.7")
    how.add_argument(
        "--max-recall-drop",
        type=float,
        metavar="POINTS",
        help="choose the cheapest thresholds and exits that lose at most POINTS of mean R@5; the images need captions",
    )
    how.add_argument("--share", type=float, nargs="+", default=[], metavar="S", help="fraction of images for each early exit")
    how.add_argument("--metric", help="maximise a metric on labelled images: f1, balanced_accuracy, accuracy or youden")
    p.add_argument(
        "--best-recall",
        action="store_true",
        help="with --budget: choose the thresholds and exits with the highest mean R@5; the images need captions. Without "
        "it, exit shares come from the budget alone",
    )
    p.add_argument("--cost", choices=["counted", "measured"], help="cost for --budget (default counted), --best-recall and "
                   "--max-recall-drop (default measured): FLOPs, or time on this machine")  # fmt: skip
    p.add_argument("--plot", metavar="PNG", help="with --max-recall-drop or --best-recall: plot of the cost-recall frontier "
                   "(BUNDLE_frontier.png)")  # fmt: skip
    p.add_argument("--images", nargs="+", metavar="PATH", help="files, folders or globs, for --budget and --share")
    p.add_argument("--labels", metavar="FILE", help="labels or ratings of images below --root: .json .csv .txt .parquet")
    p.add_argument("--root", help="image folder of --labels, or the new location of the workdir's images")
    p.add_argument("--boundary", type=float, help="for ratings: images with a higher rating are labelled complex")
    p.add_argument("--threshold-grid", type=float, nargs=3, default=[], metavar=("LOW", "HIGH", "STEP"), help="with --metric: "
                   "thresholds that are tried (0 1 0.001)")  # fmt: skip
    p.add_argument("--bad-share", type=float, help="maximum fraction of unusable lines in --labels (0.01)")
    p.add_argument("--config", help="configuration that gives the calibration images; accepts --config.a.b=value")
    p.add_argument("--batch-size", type=positive, default=64, metavar="N", help="batch size of scoring (64)")
    p.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> None:
    from icar_jax import checkpoint
    from icar_jax.data import configured
    from icar_jax.evaluation.report.calibration_table import print_calibration
    from icar_jax.evaluation.report.report_figures import write_budget_search
    from icar_jax.evaluation.routing.calibration import bundle_costs, calibrate

    folder = checkpoint.find(args.checkpoint, ("bundle", "complexity"))
    if args.best_recall and args.budget is None:
        raise cfg.ConfigError("--best-recall needs a --budget")
    if args.plot and args.max_recall_drop is None and not args.best_recall:
        raise cfg.ConfigError("--plot needs --max-recall-drop or --best-recall")
    source, data, boundary = _calibration_images(args, folder)
    if args.labels and (note := _seen_in_training(args, folder, source)):
        print(note)
    plot = args.plot or folder.resolve().with_name(f"{folder.resolve().name}_frontier.png")
    description = calibrate(
        folder, source, budget=args.budget, shares=args.share, metric=args.metric, max_recall_drop=args.max_recall_drop,
        best_recall=args.best_recall, cost=args.cost, boundary=boundary, grid=args.threshold_grid, batch_size=args.batch_size,
        loading=configured.loading(data) if data else None, draw=lambda tried: write_budget_search(tried, plot),
    )  # fmt: skip
    print_calibration(description, bundle_costs(folder) if description["kind"] == "bundle" else None)
    print(f"Written into {folder / checkpoint.DESCRIPTION}")


def _calibration_images(args: argparse.Namespace, folder: Path):
    """(image source, its DataConfig or None, rating boundary of the class 'complex' or None) from the arguments."""
    from icar_jax import workdir
    from icar_jax.data import configured
    from icar_jax.data.ratings.sources import open_rated
    from icar_jax.data.sources.files import ImageFiles

    named = [name for name in ("images", "labels", "config") if getattr(args, name)]
    if len(named) > 1:
        raise cfg.ConfigError(f"{' and '.join('--' + name for name in named)} exclude each other; pass one of them")
    if args.overrides and not args.config:
        raise cfg.ConfigError(f"{args.overrides[0]} overrides a field of --config, which is missing")
    if args.boundary is not None and not args.metric:
        raise cfg.ConfigError("--boundary needs --metric, for which it turns ratings into labels")
    if args.bad_share is not None and not (args.labels and 0 <= args.bad_share <= 1):
        raise cfg.ConfigError(f"--bad-share {args.bad_share:g} must lie in [0, 1] and needs --labels")
    if args.images and args.root:
        raise cfg.ConfigError("--root applies to --labels or to a workdir; pass the folder as --images")
    if args.images:
        if args.max_recall_drop is not None or args.best_recall:
            flag = "--best-recall" if args.best_recall else "--max-recall-drop"
            raise cfg.ConfigError(f"{flag} needs captions, which --images do not have: pass --config or a workdir")
        if args.metric:
            raise cfg.ConfigError("--metric needs labels, which --images do not have: pass --labels FILE --root FOLDER")
        return ImageFiles(args.images), None, None
    if args.labels:
        if not args.root:
            raise cfg.ConfigError("--labels needs the image folder as --root")
        share = 0.01 if args.bad_share is None else args.bad_share
        data = cfg.DataConfig(source="ratings", root=args.root, ratings=args.labels, bad_share=share)
        rated = open_rated(data)
        print("\n".join(rated.notes))
        return rated.split("+".join(sorted(rated.counts))), data, args.boundary
    if args.config:
        from icar_jax.cli.program import config_of

        config = cfg.validate(config_of(args))
    else:
        workdirs = [path for path in (Path(args.checkpoint), folder.parent) if (path / workdir.CONFIG).is_file()]
        if not workdirs:
            raise cfg.ConfigError(
                f"{folder} is not in a workdir of train.py, which gives the calibration images; pass --images, --labels or "
                "--config"
            )
        config = workdir.load_config(workdirs[0])
    config.data.root = args.root or config.data.root
    boundary = args.boundary
    if boundary is None and config.task == "complexity":
        boundary = config.complexity.threshold  # as in training
    return configured.calibration_source(config.data), config.data, boundary


def _seen_in_training(args: argparse.Namespace, folder: Path, source) -> str:
    """A note if the complexity model was trained on some of the labelled images, according to its workdir; else ''."""
    from icar_jax import workdir
    from icar_jax.data.records import record_names

    for path in {Path(args.checkpoint), folder.parent}:
        if not ((path / workdir.CONFIG).is_file() and (path / workdir.SPLITS).is_file()):
            continue
        names, root = workdir.trained_on(path)
        seen = sum(name in names for name in record_names(source))
        if seen:
            same = Path(root).expanduser().resolve() == Path(args.root).expanduser().resolve()
            are = "are training images" if same else "have the names of training images"
            return (
                f"Note: {seen} of {len(source)} images {are} of the model ({path / workdir.SPLITS}); "
                f"{'' if same else 'if they are the same, '}metrics on them are better than on unseen images"
            )
    return ""


def _add_describe(commands) -> None:
    p = commands.add_parser("describe", help="print the description of a checkpoint, bundle or workdir")
    p.add_argument("path")
    p.set_defaults(run=_describe)


def _describe(args: argparse.Namespace) -> None:
    from icar_jax import checkpoint

    description = checkpoint.describe(checkpoint.find(args.path))
    if "scores" in description.get("routing", {}):
        description["routing"]["scores"] = "quantiles of the calibration scores, for budgets"
    print(json.dumps(description, indent=2))
