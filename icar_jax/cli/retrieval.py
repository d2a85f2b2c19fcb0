"""The commands `icar evaluate-embeddings` and `icar labels`."""

from __future__ import annotations

import argparse
from pathlib import Path

from icar_jax.cli.arguments import positive


def add(commands) -> None:
    """Adds both commands to the subparsers."""
    _add_evaluate(commands)
    _add_labels(commands)


def _add_evaluate(commands) -> None:
    p = commands.add_parser(
        "evaluate-embeddings",
        help="evaluate retrieval by saved embeddings, without a model",
        description="Ranks images and texts by their embeddings and prints recall, median and mean rank with 95% intervals. "
        "Writes metrics.json and recall.png. Files are .npz, .npy or .parquet, of any library or of `icar evaluate "
        "--save-embeddings`.",
    )
    p.add_argument(
        "images", metavar="IMAGES", help="embeddings [images, dimensions], with `names` for --labels and pairs by name"
    )
    p.add_argument(
        "texts", metavar="TEXTS", help="embeddings [texts, dimensions], with `image` (name or row) unless --pairs is given"
    )
    p.add_argument("--pairs", metavar="FILE", help="image of each text: .csv or .parquet with the columns image and text, or "
                   "image alone in the order of the texts; .json, .npy or .npz with a list")  # fmt: skip
    p.add_argument("--distractors", nargs=2, metavar=("IMAGES", "TEXTS"), help="embeddings that are in the galleries only")
    p.add_argument("--labels", metavar="FILE", help="JSON of image name -> category labels: adds category level")
    p.add_argument("--distractor-labels", metavar="FILE", help="the same of the distractors")
    p.add_argument("--folds", type=positive, default=0, metavar="N", help="also evaluate N equal parts of the images in order, "
                   "such as COCO's 5 of 1,000")  # fmt: skip
    p.add_argument("--dot", action="store_true", help="rank by dot products; by default vectors are brought to length 1")
    p.add_argument("--bootstrap", type=positive, default=2000, metavar="N", help="resamples of images (2000)")
    p.add_argument("--out", metavar="DIR", help="folder of metrics.json and recall.png (IMAGES without suffix + _evaluation)")
    p.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from icar_jax.evaluation.embeddings.evaluate import evaluate_embeddings

    images = Path(args.images).expanduser()
    out = args.out or images.with_name(f"{images.stem}_evaluation")
    evaluate_embeddings(
        args.images, args.texts, out, pairs=args.pairs, distractors=tuple(args.distractors) if args.distractors else None,
        labels=args.labels, distractor_labels=args.distractor_labels, folds=args.folds, bootstrap=args.bootstrap,
        normalise=not args.dot,
    )  # fmt: skip
    print(f"Report: {out}: metrics.json, recall.png")


def _add_labels(commands) -> None:
    p = commands.add_parser(
        "labels",
        help="join released labels with image names or URLs",
        description="Writes labels that are keyed by running ids as evaluations read labels: category labels as JSON of "
        "image name or URL -> labels (config.eval.labels, config.eval.distractors.labels), and complexity labels 0, 1 and -1 "
        "as a table of url or file and score (config.data.ratings), without the undecided -1.",
    )
    p.add_argument("labels", metavar="LABELS", help="JSON of id, name or URL -> labels, or a list of objects with both")
    p.add_argument("--out", required=True, metavar="FILE", help=".json of category labels, or .csv of complexity labels")
    p.add_argument("--captions", metavar="JSON", help="Karpathy's JSON, whose images the ids stand for")
    p.add_argument("--by", choices=("imgid", "cocoid", "index"), help="with --captions: what the ids are; index counts images "
                   "from 0, of --split if given")  # fmt: skip
    p.add_argument("--split", metavar="NAME", help="with --captions: images of this split alone")
    p.add_argument("--manifest", metavar="FILE", help="manifest.tsv or url_to_local.json, which join ids such as "
                   "laion_00000012 with URLs")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    p.set_defaults(run=_labels)


def _labels(args: argparse.Namespace) -> None:
    from icar_jax.config import ConfigError
    from icar_jax.data.ratings.released import join_labels
    from icar_jax.workdir import write_text

    out = Path(args.out).expanduser()
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists; pass --overwrite to replace it")
    joined = join_labels(args.labels, captions=args.captions, by=args.by, split=args.split, manifest=args.manifest)
    if out.suffix.lower() != joined.suffix:
        what = "category labels" if joined.suffix == ".json" else "complexity labels"
        raise ConfigError(f"--out {out}: {what} are written as {joined.suffix}")
    write_text(out, joined.text)
    print(joined.report)
    print(f"Labels: {out}")
