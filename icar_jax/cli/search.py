"""The command `icar search`."""

from __future__ import annotations

import argparse
import contextlib
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
    from icar_jax.search import local_socket
    from icar_jax.search.access import QueryError, address

    if (args.query is None) == (args.image is None):
        raise QueryError("pass either a text query or --image FILE")
    if args.query is not None and not args.query.strip():
        raise QueryError("the query is empty; describe the image in a few words")
    image = None if args.image is None else str(Path(args.image).absolute())
    if image is not None and not Path(image).is_file():
        raise FileNotFoundError(f"{args.image}: no such image file")
    query = {"text": args.query, "image": image, "k": args.k, "where": args.where, "exact": args.exact}
    found = None
    if args.checkpoint is None:
        try:
            found = local_socket.ask(args.store, {**query, "dtype": args.dtype, "note": args.note_hits})
        except local_socket.Unanswered as reason:
            print(f"{reason}; searching without it", file=sys.stderr)
    if found is None:
        found = _search_here(args)
    if args.json:
        print(json.dumps({"query": query, "store": address(args.store), **found}, indent=2, ensure_ascii=False))
    else:
        print(_table(found, args.where))


def _search_here(args: argparse.Namespace) -> dict[str, Any]:
    """The result of a search without a server."""
    from icar_jax.search.model_process import ModelProcess

    # A process that has imported JAX already, such as the demo, loads the model itself.
    with contextlib.nullcontext() if "jax" in sys.modules else ModelProcess() as process:
        from icar_jax.data.images import decode
        from icar_jax.search.access import StoreError
        from icar_jax.search.query import open_searcher

        picture = decode(args.image) if args.image is not None else None
        load = process.load if process is not None else None
        progress = sys.stderr.isatty()
        searcher = open_searcher(args.store, args.checkpoint, dtype=args.dtype, progress=progress, load=load)
        store = searcher.store
        if not store.count():
            raise StoreError(f"store {store.uri} is empty; add images with `icar index FOLDER --store {store.uri}`")
        options = {"k": args.k, "where": args.where, "exact": args.exact}
        found = searcher.search_text(args.query, **options) if picture is None else searcher.search_image(picture, **options)
    if args.note_hits:
        store.note_returned(hit.path for hit in found.hits)
    return asdict(found)


def _table(found: dict[str, Any], where: str | None) -> str:
    """Text output: a note if nothing matches, one row per hit, and the latency."""
    taken = {name: f"{1000 * seconds:.0f} ms" for name, seconds in found["latency_s"].items()}
    times = f"query encoded in {taken['encode']}, searched in {taken['search']}"
    if not found["hits"]:
        return f"No image matches the filter {where!r}.\n{times}"
    verdict = found["nothing_here"]
    lines = []
    if verdict["verdict"]:
        fit, threshold = verdict["statistic"], verdict["threshold"]
        numbers = "" if fit is None else f" (fit {fit:.2f}, threshold {threshold:.2f})"
        lines += [f"Nothing here seems to match{numbers}; the closest images:"]
    lines += [f"{'rank':>4} {'cosine':>6} {'score':>6} {'exit':>4} {'complexity':>10}  path"]
    for rank, hit in enumerate(found["hits"], 1):
        complexity = "-" if hit["complexity"] is None else f"{hit['complexity']:.3f}"
        caption = (hit["caption"] or "").strip()
        shown = f"  ({printable(caption.splitlines()[0])})" if caption else ""
        numbers = f"{rank:>4} {hit['cosine']:>6.3f} {hit['score']:>6.3f} {hit['exit']:>4} {complexity:>10}"
        lines += [f"{numbers}  {printable(hit['path'])}{shown}"]
    return "\n".join([*lines, "Ranked by cosine; the score is comparable between queries.", times])
