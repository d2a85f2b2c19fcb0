"""Command on stores: index."""

from __future__ import annotations

import argparse
import json
import os
import sys

from icar_jax.cli.arguments import add_images, positive, printable, stdin_paths
from icar_jax.cli.errors import user_errors
from icar_jax.cli.score import report_bad


def add(commands) -> None:
    p = commands.add_parser(
        "index",
        help="index images for search",
        description="Embeds images into a store for `icar search` and `icar serve`. Running it again adds new files, updates "
        "changed ones and touches nothing else; a run that was stopped is continued. The exit status is 0 only where every "
        "image was embedded, or with --skip-bad.",
    )
    add_images(p, "embedded", 64, nargs="*")
    p.add_argument("--store", required=True, metavar="DIR", help="folder of the store, or an address such as s3://bucket/name")
    p.add_argument("--checkpoint", metavar="C", help="bundle, CLIP checkpoint or workdir; by default the one that the store "
                   "was last indexed with")  # fmt: skip
    how = p.add_mutually_exclusive_group()
    how.add_argument("--budget", type=float, metavar="B", help="mean counted cost, router included, as a share of full depth; "
                     "by default the thresholds of the bundle hold")  # fmt: skip
    how.add_argument("--exit", type=int, metavar="BLOCKS", help="run every new image to this depth instead of routing")
    p.add_argument("--pass", dest="stage", choices=("cheap", "refine"), help="cheap: score every new image, and run it at the "
                   "first exit; refine: run images of the store deeper where their score asks for it")  # fmt: skip
    p.add_argument("--order", choices=("oldest", "returned"), default="oldest", help="of --pass refine: what was embedded "
                   "first, or what searches returned most (oldest)")  # fmt: skip
    p.add_argument("--captions", metavar="FILE", help="captions to keep with the images: Karpathy's .json, .csv or .jsonl")
    p.add_argument("--prune", action="store_true", help="remove rows whose files vanished from the folders")
    p.add_argument("--prune-missing", action="store_true", help="with --prune: also where a whole folder is missing or empty")
    p.add_argument("--rehash", action="store_true", help="read every file, although its size and time have not changed")
    p.add_argument("--retry-bad", action="store_true", help="read files that were bad, although they have not changed")
    p.add_argument("--bad", action="store_true", help="list what could not be embedded, and why, and do nothing else; with "
                   "PATH what lies there or below")  # fmt: skip
    p.add_argument("--json", action="store_true", help="of --bad: as JSON")
    p.add_argument("--commit-rows", type=positive, default=1000, metavar="N", help="images a commit; a kill costs one (1000)")
    group = p.add_argument_group("several processes, each started with the same command")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--processes", type=int, default=0, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, default=-1, metavar="I", help="which one this is, from 0")
    p.set_defaults(run=_index)


def _index(args: argparse.Namespace) -> None:
    from icar_jax.search.indexing import IndexingError

    if args.bad:
        return _list_bad(args)
    wrong = {
        "--json": args.json, "PATH missing: name folders or images": not args.paths and args.stage != "refine",
        "--prune-missing without --prune": args.prune_missing and not args.prune,
        "--pass with --exit": args.stage and args.exit is not None,
        "--pass cheap with --budget: it sends all images to the first exit": args.stage == "cheap" and args.budget is not None,
        "--pass refine reads files that the store has: leave out --prune, --rehash, --captions and --retry-bad":
            args.stage == "refine" and (args.prune or args.rehash or args.captions or args.retry_bad),
        "--order without --pass refine": args.order != "oldest" and args.stage != "refine",
    }  # fmt: skip
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise IndexingError(what if what != "--json" else "--json is of --bad")

    from icar_jax.parallel import distributed

    with distributed.exit_on_error(), user_errors(f"stopped; the same command continues what {args.store} holds"):
        distributed.start(args.coordinator, args.processes, args.process)
        _update_store(args)


def _update_store(args: argparse.Namespace) -> None:
    from icar_jax.data.sources.files import ImagePaths
    from icar_jax.inference.loading import load
    from icar_jax.parallel import distributed
    from icar_jax.search.indexing import index_files
    from icar_jax.search.opening import open_store
    from icar_jax.search.refine import refine
    from icar_jax.search.vector_index import maintain

    def model(path):
        return load(path, batch_size=args.batch_size, dtype=args.dtype)

    if args.stage == "refine":
        done = refine(
            args.store, args.paths, args.checkpoint, model, order=args.order, budget=args.budget,
            commit_rows=args.commit_rows, threads=args.threads,
        )  # fmt: skip
    else:
        done = index_files(
            args.store, ImagePaths(args.paths, stdin_paths()), args.checkpoint, model, exit=args.exit, budget=args.budget,
            cheap=args.stage == "cheap", prune=args.prune, prune_missing=args.prune_missing, rehash=args.rehash,
            retry_bad=args.retry_bad, captions=args.captions, commit_rows=args.commit_rows, threads=args.threads,
        )  # fmt: skip
    main = distributed.is_main()
    distributed.leave()  # a vector index of many images takes one process hours
    if main:
        report_bad(done, f"`icar index --bad --store {args.store}`", "embedded")
        if done.still_bad:
            again = "were bad before and have not changed; --retry-bad reads them again"
            print(f"{done.still_bad} images {again}", file=sys.stderr)
        print(done.report())
        print(f"Store: {args.store}: {done.total:,} images")
        if (work := maintain(open_store(args.store))) is not None:
            print(work.report())
    if (done.bad or done.still_bad) and not args.skip_bad:
        sys.exit(1)


def _list_bad(args: argparse.Namespace) -> None:
    from icar_jax.search.opening import open_store
    from icar_jax.search.scan import is_below

    roots = [os.path.abspath(os.path.expanduser(name)) for name in args.paths]
    rows = sorted(open_store(args.store).bad_rows().to_pylist(), key=lambda row: row["path"])
    rows = [row for row in rows if not roots or is_below(row["path"], roots)]
    if args.json:
        print(json.dumps([{**row, "found_at": row["found_at"].isoformat(timespec="seconds")} for row in rows], indent=2))
        return
    for row in rows:
        print(printable(f"{row['path']}: {row['reason']}"))
    print(f"{len(rows)} files could not be embedded", file=sys.stderr)
