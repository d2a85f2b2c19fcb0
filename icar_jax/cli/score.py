"""Command on images: score."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from icar_jax.cli.arguments import add_images, positive, printable, stdin_paths
from icar_jax.cli.errors import user_errors

_BAD_SHOWN = 20


def add(commands) -> None:
    p = commands.add_parser(
        "score",
        help="score the complexity of images",
        description="Writes a table with the columns file, score, exit and milliseconds. With a bundle, exit is the number of "
        "blocks that its thresholds select. The exit status is 0 only where every image was scored, or with --skip-bad. "
        "A run that is stopped writes no table.",
    )
    add_images(p, "scored", 32)
    p.add_argument("--checkpoint", required=True, help="complexity checkpoint, bundle or workdir")
    p.add_argument("--out", required=True, metavar="FILE", help="table to write: .csv, .json, .jsonl or .parquet")
    p.add_argument("--bad", metavar="FILE", help="CSV of the images that could not be scored; FILE.bad.csv by default")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    p.add_argument("--sheet", metavar="PNG", help="contact sheet in the order of the scores, with their histogram")
    p.add_argument("--thumbnails", type=positive, default=60, metavar="N", help="images on the sheet (60)")
    p.add_argument("--explain", metavar="DIR", help="folder for pictures of where complexity was seen, most complex first")
    p.add_argument("--explain-limit", type=positive, default=50, metavar="N", help="images that are explained (50)")
    p.add_argument("--explain-stage", type=int, choices=(2, 3, 4), help="ConvNeXt stage of the maps: a cell of 8, 16 or 32 "
                   "pixels of the model's input (8); a head on the blocks of a CLIP has a cell a patch")  # fmt: skip
    p.add_argument("--explain-npy", action="store_true", help="write the maps as .npy too")
    p.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    from icar_jax.data.sources.files import ImagePaths
    from icar_jax.evaluation.report.explanations import require_folder, write_explanations
    from icar_jax.evaluation.report.score_sheet import score_sheet
    from icar_jax.inference.files.score_table import require_writable, write_scores
    from icar_jax.inference.files.scoring import require_scorer
    from icar_jax.inference.loading import load

    # What is wrong with the command is said before anything is loaded or scored.
    paths = ImagePaths(args.paths, stdin_paths())
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
        sys.exit(f"error: none of the {done.bad} images could be scored, so there is no table; reasons are in {bad}")
    threshold = model.description.get("threshold") if model.thresholds is None else None  # a classifier's own
    print(done.report(threshold))
    print(f"Scores: {args.out}")
    with user_errors(f"stopped; {args.out} is complete"):
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
            print(f"Explained: {args.explain}: {written} of {len(done.files)} images, most complex first")
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
    """Says on stderr what became of paths that were named in vain; `done` is a ScoreSummary or an Embedded."""
    for name in done.empty:
        print(f"warning: {printable(name)}: no image file", file=sys.stderr)
    if done.duplicates:
        print(f"{done.duplicates} paths were named or found again and {what} once", file=sys.stderr)
    if done.bad:
        print(f"{done.bad} images could not be {what}; all are listed in {bad}:", file=sys.stderr)
        for item in done.first_bad:
            print(f"  {printable(f'{item.file}: {item.reason}')}", file=sys.stderr)
        if done.bad > len(done.first_bad):
            print(f"  and {done.bad - len(done.first_bad)} more", file=sys.stderr)
