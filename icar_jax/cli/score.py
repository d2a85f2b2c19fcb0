"""The command `icar score`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from icar_jax.cli.arguments import add_images, positive, printable, stdin_paths
from icar_jax.cli.errors import user_errors

_BAD_SHOWN = 20


def add(commands) -> None:
    """Adds `icar score` to the subparsers."""
    p = commands.add_parser(
        "score",
        help="score the complexity of images",
        description="Writes a table with the columns file, score, exit and milliseconds. With a bundle, exit is the number of "
        "blocks selected by its thresholds. The exit status is 0 only if every image was scored, or with --skip-bad. "
        "An interrupted run writes no table.",
    )
    add_images(p, "scored", 32)
    p.add_argument("--checkpoint", required=True, help="complexity checkpoint, bundle or workdir")
    p.add_argument("--out", required=True, metavar="FILE", help="table to write: .csv, .json, .jsonl or .parquet")
    p.add_argument("--bad", metavar="FILE", help="CSV of the images that could not be scored (OUT.bad.csv)")
    p.add_argument("--overwrite", action="store_true", help="replace existing files")
    p.add_argument("--sheet", metavar="PNG", help="contact sheet of the images sorted by score, with a score histogram")
    p.add_argument("--thumbnails", type=positive, default=60, metavar="N", help="images on the sheet (60)")
    p.add_argument("--explain", metavar="DIR", help="folder for complexity maps of the most complex images")
    p.add_argument("--explain-limit", type=positive, default=50, metavar="N", help="number of images with maps (50)")
    p.add_argument("--explain-stage", type=int, choices=(2, 3, 4), help="ConvNeXt stage of the maps, with a stride of 8, 16 or "
                   "32 input pixels (2); a head on a CLIP's blocks has one map cell per patch")  # fmt: skip
    p.add_argument("--explain-npy", action="store_true", help="also write the maps as .npy")
    p.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    from icar_jax.data.sources.files import ImagePaths
    from icar_jax.evaluation.report.explanations import require_folder, write_explanations
    from icar_jax.evaluation.report.score_sheet import score_sheet
    from icar_jax.inference.files.score_table import require_writable, write_scores
    from icar_jax.inference.files.scoring import require_scorer
    from icar_jax.inference.loading import load

    # Validate the arguments before loading or scoring anything.
    paths = ImagePaths(args.paths, stdin_paths(), args.exclude)
    if args.sheet:
        require_writable(args.sheet, "--sheet", args.overwrite, (".png",))
    if args.explain:
        require_folder(args.explain, args.overwrite)
    model = load(args.checkpoint, batch_size=args.batch_size, dtype=args.dtype)
    require_scorer(model)
    explainer = _explainer(model, args.explain_stage) if args.explain else None

    done = write_scores(
        model,
        paths,
        args.out,
        bad=args.bad,
        overwrite=args.overwrite,
        threads=args.threads,
        keep_files=bool(args.sheet or args.explain),
        bad_shown=_BAD_SHOWN,
    )
    bad = args.bad or f"{args.out}.bad.csv"
    report_bad(done, bad)
    if not len(done.scores):
        sys.exit(f"error: none of the {done.bad} images could be scored, so no table was written; see {bad} for the reasons")
    threshold = model.description.get("threshold") if model.thresholds is None else None  # of a classifier
    print(done.report(threshold))
    print(f"Scores: {args.out}")
    with user_errors(f"interrupted; {args.out} is complete"):
        if args.sheet:
            thresholds = model.thresholds or (() if threshold is None else (threshold,))
            exits = model.exits if model.thresholds is not None else ()
            name = f"{'/'.join(Path(args.checkpoint).parts[-2:])} at {model.scorer.preprocess.image_size} pixels"
            score_sheet(done.files, done.scores, args.sheet, model=name, exits=exits, thresholds=thresholds,
                        thumbnails=args.thumbnails)  # fmt: skip
            print(f"Sheet: {args.sheet}")
        if explainer is not None:
            written = write_explanations(
                explainer, done.files, done.scores, args.explain, limit=args.explain_limit, npy=args.explain_npy
            )
            print(f"Maps: {args.explain}: {written} of {len(done.files)} images, most complex first")
    if done.bad and not args.skip_bad:
        sys.exit(1)


def _explainer(model, stage: int | None):
    from icar_jax.errors import ConfigError, ModelError
    from icar_jax.inference.explain import Explainer

    try:
        return Explainer(model, stage)
    except ModelError as error:
        raise ConfigError(f"--explain-stage: {error}") from error


def report_bad(done, bad: str | Path, what: str = "scored") -> None:
    """Prints empty patterns, duplicates, unusable files and what walks left out to stderr; `done` is the result of a run."""
    for name in done.empty:
        print(f"warning: {printable(name)}: no image file", file=sys.stderr)
    if done.left_out:
        print(printable(done.left_out), file=sys.stderr)
    if done.duplicates:
        print(f"{done.duplicates} duplicate paths; each image was {what} once", file=sys.stderr)
    if done.bad:
        print(f"{done.bad} images could not be {what}; {bad} lists all of them:", file=sys.stderr)
        for item in done.first_bad:
            print(f"  {printable(f'{item.file}: {item.reason}')}", file=sys.stderr)
        if done.bad > len(done.first_bad):
            print(f"  and {done.bad - len(done.first_bad)} more", file=sys.stderr)
