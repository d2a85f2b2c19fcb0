"""Command that searches a store: search."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icar_jax.cli.arguments import positive, printable


def add(commands) -> None:
    p = commands.add_parser(
        "search",
        help="search a store of images by words or by an image",
        description="Lists the images of a store made by `icar index` that are closest to the words, or to --image. The score "
        "says how likely an image goes with these words rather than with other captions, and can be compared between queries; "
        "the cosine cannot. Where nothing in the store matches, that is said, and the closest images are listed nevertheless.",
    )
    p.add_argument("query", nargs="?", help="what the image shows, in a few words")
    p.add_argument("--store", required=True, metavar="DIR", help="store made by `icar index`")
    p.add_argument("--image", metavar="FILE", help="search by this image instead of words")
    p.add_argument("-k", type=positive, default=20, metavar="N", help="images to list (20)")
    p.add_argument("--where", metavar="SQL", help='only images for which this holds, such as "complexity < 0.4 AND exit = 6"')
    p.add_argument("--exact", action="store_true", help="compare every image even where the store has a vector index")
    p.add_argument("--note-hits", action="store_true", help="count these hits in the store, for `icar index --pass refine "
                   "--order returned`, as `icar serve` does; without it nothing is counted")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("--checkpoint", help="bundle or CLIP; by default the one that the store was indexed with")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations (float32)")
    p.set_defaults(run=_search)


def _search(args: argparse.Namespace) -> None:
    from icar_jax.data.images import decode
    from icar_jax.search.access import StoreError
    from icar_jax.search.query import QueryError, open_searcher

    if (args.query is None) == (args.image is None):
        raise QueryError("say what to search for: either words or --image FILE, and not both")
    if args.query is not None and not args.query.strip():
        raise QueryError("the query is empty; say in a few words what the image shows")
    picture = decode(args.image) if args.image is not None else None
    searcher = open_searcher(args.store, args.checkpoint, dtype=args.dtype, progress=sys.stderr.isatty())
    store = searcher.store
    if not store.count():
        raise StoreError(f"the store {store.uri} is empty; `icar index FOLDER --store {store.uri}` adds images")
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
    """Lines of text: the verdict where there is one, a row a hit, and the latency."""
    times = f"query encoded in {1000 * found.latency_s['encode']:.0f} ms, searched in {1000 * found.latency_s['search']:.0f} ms"
    if not found.hits:
        return f"No image satisfies {where!r}.\n{times}"
    verdict = found.nothing_here
    lines = []
    if verdict:
        numbers = "" if verdict.statistic is None else f" (fit {verdict.statistic:.2f}, needed {verdict.threshold:.2f})"
        lines += [f"Nothing here seems to match{numbers}; the closest images:"]
    lines += [f"{'rank':>4} {'cosine':>6} {'score':>6} {'exit':>4} {'complexity':>10}  path"]
    for rank, hit in enumerate(found.hits, 1):
        complexity = "-" if hit.complexity is None else f"{hit.complexity:.3f}"
        caption = f"  ({printable(hit.caption.strip().splitlines()[0])})" if hit.caption and hit.caption.strip() else ""
        numbers = f"{rank:>4} {hit.cosine:>6.3f} {hit.score:>6.3f} {hit.exit:>4} {complexity:>10}"
        lines += [f"{numbers}  {printable(hit.path)}{caption}"]
    return "\n".join([*lines, "Ordered by cosine; the score compares between queries.", times])
