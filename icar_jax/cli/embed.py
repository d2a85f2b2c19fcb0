"""The command `icar embed`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from icar_jax.cli.arguments import add_images, add_profile, positive, stdin_paths
from icar_jax.cli.errors import user_errors
from icar_jax.cli.score import report_bad


def add(commands) -> None:
    """Adds `icar embed` to the subparsers."""
    p = commands.add_parser(
        "embed",
        help="embed images into a corpus on disk",
        description="Writes float16 embeddings and a Parquet table of path, sha256, complexity, exit and milliseconds into a "
        "folder for icar_jax.inference.files.corpus.open_corpus. A bundle routes each image; a plain CLIP runs full depth. "
        "The same command resumes an interrupted run and adds new images. The exit status is 0 only if every image was "
        "embedded, or with --skip-bad.",
    )
    add_images(p, "embedded", 64)
    p.add_argument("--checkpoint", required=True, help="bundle, CLIP checkpoint or workdir")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the corpus, new or from an earlier run")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--budget", type=float, metavar="B", help="mean counted cost, router included, as a fraction of full "
                     "depth; by default the bundle's thresholds apply")  # fmt: skip
    how.add_argument("--exit", type=int, metavar="BLOCKS", help="run every image to this depth instead of routing")
    p.add_argument("--shard-rows", type=positive, default=4096, metavar="N", help="images per shard, written atomically (4096)")
    p.add_argument("--sharded", action="store_true", help="shard each batch over all devices of this machine")
    add_profile(p, "OUT/profile")
    p.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> None:
    from icar_jax import profiling

    folder = os.path.join(args.out, "profile") if args.profile == "" else args.profile
    with profiling.profile(folder, "embed"):
        _write_corpus(args)


def _write_corpus(args: argparse.Namespace) -> None:
    from icar_jax.data.sources.files import ImagePaths
    from icar_jax.inference.files.corpus import BAD
    from icar_jax.inference.files.embedding import embed_files
    from icar_jax.inference.loading import load, local_mesh

    paths = ImagePaths(args.paths, stdin_paths(), args.exclude)
    mesh = local_mesh(args.batch_size) if args.sharded else None
    model = load(args.checkpoint, batch_size=args.batch_size, dtype=args.dtype, mesh=mesh)
    with user_errors(f"interrupted; the same command resumes {args.out}"):
        done = embed_files(
            model, paths, args.out, exit=args.exit, budget=args.budget, shard_rows=args.shard_rows, threads=args.threads
        )
    bad = Path(args.out) / BAD
    report_bad(done, bad, "embedded")
    if not done.total:
        sys.exit(f"error: none of the {done.bad} images could be embedded; see {bad} for the reasons")
    print(done.report())
    print(f"Corpus: {args.out}: {done.total:,} images, float16 [{done.total}, {model.embed_dim}]")
    if done.bad and not args.skip_bad:
        sys.exit(1)
