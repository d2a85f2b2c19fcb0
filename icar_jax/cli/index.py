"""The command `icar index`."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time

from icar_jax.cli.arguments import add_images, add_profile, positive, printable, stdin_paths
from icar_jax.cli.errors import user_errors
from icar_jax.cli.score import report_bad


def add(commands) -> None:
    """Adds `icar index` to the subparsers."""
    p = commands.add_parser(
        "index",
        help="index images for search",
        description="Embeds images into a store for `icar search` and `icar serve`. Running it again adds new files and "
        "updates changed ones; an interrupted run is resumed. The exit status is 0 only if every image was embedded, or with "
        "--skip-bad.",
    )
    add_images(p, "embedded", 64, nargs="*")
    p.add_argument("--store", required=True, metavar="DIR", help="folder of the store, or an address such as s3://bucket/name")
    p.add_argument("--checkpoint", metavar="C", help="bundle, CLIP checkpoint or workdir; default: the one last used for "
                   "this store")  # fmt: skip
    how = p.add_mutually_exclusive_group()
    how.add_argument("--budget", type=float, metavar="B", help="mean counted cost, router included, as a fraction of full "
                     "depth; by default the bundle's thresholds apply")  # fmt: skip
    how.add_argument("--exit", type=int, metavar="BLOCKS", help="run every new image to this depth instead of routing")
    p.add_argument("--pass", dest="stage", choices=("cheap", "refine"), help="cheap: score every new image and embed it at the "
                   "first exit; refine: embed images deeper if their score requires it")  # fmt: skip
    p.add_argument("--order", choices=("oldest", "returned"), default="oldest", help="order of --pass refine: oldest "
                   "embeddings, or images most often returned by searches, first (oldest)")  # fmt: skip
    p.add_argument("--tiles", metavar="ROWSxCOLUMNS", help="also cut each picture of the folders into tiles, such as 2x2, with "
                   "an embedding each; a search joins the hits of a picture")  # fmt: skip
    p.add_argument("--tile-budget", type=float, metavar="RATE", help="with --tiles and a CLIP that drops patches: share "
                   "of all patches that is kept, half of it in the whole picture, the rest where it looks")  # fmt: skip
    p.add_argument("--captions", metavar="FILE", help="captions to store with the images: Karpathy .json, .csv, .tsv, .jsonl, "
                   "Flickr30k's .token, or a folder with a .txt beside each image")  # fmt: skip
    p.add_argument("--image-column", default="image", metavar="NAME", help="with --captions: column of the files (file)")
    p.add_argument("--caption-column", default="caption", metavar="NAME", help="with --captions: column of the captions "
                   "(caption)")  # fmt: skip
    p.add_argument("--prune", action="store_true", help="remove rows whose files no longer exist in the folders")
    p.add_argument("--prune-missing", action="store_true", help="with --prune: also if a whole folder is missing or empty")
    p.add_argument("--rehash", action="store_true", help="read every file even if its size and time are unchanged")
    p.add_argument("--retry-bad", action="store_true", help="retry files that could not be embedded even if unchanged")
    p.add_argument("--bad", action="store_true", help="only list files that could not be embedded, with the reasons; with "
                   "PATH, only those at or below it")  # fmt: skip
    p.add_argument("--json", action="store_true", help="with --bad: print JSON")
    p.add_argument("--commit-rows", type=positive, default=1000, metavar="N", help="images per atomic commit (1000)")
    add_profile(p, "icar_profile in the current folder")
    group = p.add_argument_group("multiple processes, each started with the same command")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, default=0, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, default=-1, metavar="I", help="index of this process, from 0")
    p.set_defaults(run=_index)


def _index(args: argparse.Namespace) -> None:
    since = time.perf_counter()
    from icar_jax.search.indexing import IndexingError

    if args.bad:
        return _list_bad(args)
    wrong = {
        "--json needs --bad": args.json, "PATH missing: pass folders or images": not args.paths and args.stage != "refine",
        "--prune-missing without --prune": args.prune_missing and not args.prune,
        "--pass with --exit": args.stage and args.exit is not None,
        "--pass cheap runs all images at the first exit; leave out --budget": args.stage == "cheap" and args.budget is not None,
        "--pass refine only reads files in the store; leave out --prune, --rehash, --captions and --retry-bad":
            args.stage == "refine" and (args.prune or args.rehash or args.captions or args.retry_bad),
        "--image-column and --caption-column without --captions":
            not args.captions and (args.image_column, args.caption_column) != ("image", "caption"),
        "--tile-budget without --tiles": args.tile_budget is not None and not args.tiles,
        "--tile-budget chooses the exits itself; leave out --exit, --budget and --pass":
            args.tile_budget is not None and (args.exit is not None or args.budget is not None or args.stage is not None),
        "--tiles with --pass: index the tiles in a run of their own": args.tiles and args.stage is not None,
        "--order without --pass refine": args.order != "oldest" and args.stage != "refine",
    }  # fmt: skip
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise IndexingError(what)

    from icar_jax import profiling
    from icar_jax.parallel import distributed

    with distributed.exit_on_error(), user_errors(f"interrupted; the same command resumes {args.store}"):
        distributed.start(args.coordinator, args.processes, args.process)
        with profiling.profile("icar_profile" if args.profile == "" else args.profile, "index", since):
            _update_store(args)


def _update_store(args: argparse.Namespace) -> None:
    from icar_jax import profiling
    from icar_jax.data.sources.caption_files import Columns
    from icar_jax.data.sources.files import ImagePaths
    from icar_jax.inference.loading import load
    from icar_jax.parallel import distributed
    from icar_jax.search.indexing import checkpoint_of, index_files, named_roots
    from icar_jax.search.opening import open_store
    from icar_jax.search.refine import refine
    from icar_jax.search.tiles import TileBudget, index_tiles, parse_grid
    from icar_jax.search.vector_index import maintain

    def model(path):
        return load(path, batch_size=args.batch_size, dtype=args.dtype)

    if args.stage == "refine":
        done = refine(
            args.store, args.paths, args.checkpoint, model, order=args.order, budget=args.budget,
            commit_rows=args.commit_rows, threads=args.threads,
        )  # fmt: skip
    else:
        grid = parse_grid(args.tiles) if args.tiles else None
        model = functools.cache(model)
        exit, tile_budget = args.exit, None
        if args.tile_budget is not None:
            tile_budget = TileBudget(model(checkpoint_of(args.store, args.checkpoint)), grid, args.tile_budget)
            exit = tile_budget.whole
        done = index_files(
            args.store, ImagePaths(args.paths, stdin_paths(), args.exclude), args.checkpoint, model, exit=exit,
            budget=args.budget, cheap=args.stage == "cheap", prune=args.prune, prune_missing=args.prune_missing,
            rehash=args.rehash, retry_bad=args.retry_bad, captions=args.captions,
            columns=Columns(args.image_column, args.caption_column), commit_rows=args.commit_rows,
            threads=args.threads,
        )  # fmt: skip
    cut = None
    if args.stage != "refine" and grid is not None:
        store = open_store(args.store)
        roots, _ = named_roots(args.paths)
        with distributed.together("cutting pictures into tiles"):
            cut = index_tiles(
                store, model(store.meta["checkpoint"]), grid, roots, exit=args.exit, budget=args.budget,
                tile_budget=tile_budget, commit_rows=args.commit_rows, threads=args.threads,
            )  # fmt: skip
    main = distributed.is_main()
    distributed.leave()  # building a large vector index takes one process hours
    if main:
        report_bad(done, f"`icar index --bad --store {args.store}`", "embedded")
        if done.still_bad:
            again = "could not be embedded in earlier runs and are unchanged; --retry-bad retries them"
            print(f"{done.still_bad} images {again}", file=sys.stderr)
        print(done.report())
        if cut is not None:
            print(cut.report())
        print(f"Store: {args.store}: {done.total:,} images")
        with profiling.section("saving"):
            work = maintain(open_store(args.store))
        if work is not None:
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
