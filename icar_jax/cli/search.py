"""The command `icar search`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icar_jax.cli.arguments import positive, printable


def add(commands) -> None:
    """Adds `icar search` to the subparsers."""
    p = commands.add_parser(
        "search",
        help="search a store of images by text or by image",
        description="Lists the images of a store made by `icar index` that are closest to a text or to --image. The score is "
        "the probability that an image matches the query rather than other captions; unlike the cosine, it is comparable "
        "between queries. If nothing in the store matches, a note says so and the closest images are still listed.",
    )
    p.add_argument("query", nargs="?", help="description of the image in a few words")
    p.add_argument("--store", required=True, metavar="DIR", help="store made by `icar index`")
    p.add_argument("--image", metavar="FILE", help="search by this image instead of text")
    p.add_argument("-k", type=positive, default=20, metavar="N", help="images to list (20)")
    p.add_argument("--where", metavar="SQL", help='SQL filter, such as "complexity < 0.4 AND exit = 6"')
    p.add_argument("--exact", action="store_true", help="exact search, even if the store has a vector index")
    p.add_argument("--note-hits", action="store_true", help="count these hits in the store for `icar index --pass refine "
                   "--order returned`; `icar serve` always does")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("--checkpoint", help="bundle or CLIP; default: the one the store was indexed with")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of activations (float32)")
    p.set_defaults(run=_search)


def _search(args: argparse.Namespace) -> None:
    from icar_jax.data.images import decode
    from icar_jax.search.access import StoreError
    from icar_jax.search.query import QueryError, open_searcher

    if (args.query is None) == (args.image is None):
        raise QueryError("pass either a text query or --image FILE")
    if args.query is not None and not args.query.strip():
        raise QueryError("the query is empty; describe the image in a few words")
    picture = decode(args.image) if args.image is not None else None
    searcher = open_searcher(args.store, args.checkpoint, dtype=args.dtype, progress=sys.stderr.isatty())
    store = searcher.store
    if not store.count():
        raise StoreError(f"store {store.uri} is empty; add images with `icar index FOLDER --store {store.uri}`")
    options = {"k": args.k, "where": args.where, "exact": args.exact}
    found = searcher.search_text(args.query, **options) if picture is None else searcher.search_image(picture, **options)
    if args.json:
        print(json.dumps(_record(args, store.uri, found), indent=2, ensure_ascii=False))
    else:
        print(_table(found, args.where))
    if args.note_hits:
        store.note_returned(hit.path for hit in found.hits)


def _record(args: argparse.Namespace, uri: str, found: Any) -> dict[str, Any]:
    image = None if args.image is None else str(Path(args.image).absolute())
    query = {"text": args.query, "image": image, "k": args.k, "where": args.where, "exact": args.exact}
    return {"query": query, "store": uri, **asdict(found)}


def _table(found: Any, where: str | None) -> str:
    """Text output: a note if nothing matches, one row per hit, and the latency."""
    times = f"query encoded in {1000 * found.latency_s['encode']:.0f} ms, searched in {1000 * found.latency_s['search']:.0f} ms"
    if not found.hits:
        return f"No image matches the filter {where!r}.\n{times}"
    verdict = found.nothing_here
    lines = []
    if verdict:
        numbers = "" if verdict.statistic is None else f" (fit {verdict.statistic:.2f}, threshold {verdict.threshold:.2f})"
        lines += [f"Nothing here seems to match{numbers}; the closest images:"]
    lines += [f"{'rank':>4} {'cosine':>6} {'score':>6} {'exit':>4} {'complexity':>10}  path"]
    for rank, hit in enumerate(found.hits, 1):
        complexity = "-" if hit.complexity is None else f"{hit.complexity:.3f}"
        caption = f"  ({printable(hit.caption.strip().splitlines()[0])})" if hit.caption and hit.caption.strip() else ""
        numbers = f"{rank:>4} {hit.cosine:>6.3f} {hit.score:>6.3f} {hit.exit:>4} {complexity:>10}"
        lines += [f"{numbers}  {printable(hit.path)}{caption}"]
    return "\n".join([*lines, "Ranked by cosine; the score is comparable between queries.", times])
