"""Command that serves a store: serve."""

from __future__ import annotations

import argparse

from icar_jax.cli.arguments import positive
from icar_jax.cli.errors import user_errors


def add(commands) -> None:
    p = commands.add_parser(
        "serve",
        help="search a store of images in the browser",
        description="Serves a page and a JSON API for searching a store made by `icar index`, by words or by an image. It can "
        "be reached from this machine only, unless --host says otherwise, which needs a token. Only pictures of the store are "
        "served, and only as they were when they were indexed. /openapi.json describes the API, /healthz, /readyz and /metrics "
        "are for machines.",
    )
    p.add_argument("--store", required=True, metavar="DIR", help="store made by `icar index`")
    p.add_argument("--checkpoint", help="bundle or CLIP; by default the one that the store was indexed with")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (8000)")
    secret = p.add_mutually_exclusive_group()
    secret.add_argument("--token", help="secret that every request must carry; other users of this machine may see it here")
    secret.add_argument("--token-file", metavar="FILE", help="the same, read from a file")
    p.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="name by which browsers reach this "
                   "server through a proxy on this machine; may be repeated, and needs a token")  # fmt: skip
    p.add_argument("--max-upload-mb", type=positive, default=20, metavar="MB", help="largest image file to search by (20)")
    p.add_argument("--max-pixels", type=positive, default=50_000_000, metavar="N", help="largest image to decode (50000000)")
    p.add_argument("--queue", type=positive, default=32, metavar="N", help="searches that may wait; beyond, 503 is sent (32)")
    p.add_argument("--timeout", type=positive, default=30, metavar="S", help="seconds until a search is given up (30)")
    p.add_argument("--follow-links", action="store_true", help="also serve what links reach outside the indexed folders")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations (float32)")
    p.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    from icar_jax.search import extra

    for library in ("lancedb", "fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        extra(library)
    from icar_jax.search.opening import open_store
    from icar_jax.search.query import open_searcher
    from icar_jax.search.server.backend import TEXT_BATCH, Backend
    from icar_jax.search.server.run import bind, serve
    from icar_jax.search.server.settings import ServerSettings, read_token

    settings = ServerSettings(
        host=args.host, port=args.port, token=read_token(args.token_file) if args.token_file else args.token,
        allowed_hosts=tuple(args.allowed_host), max_upload_bytes=args.max_upload_mb * 1_000_000, max_pixels=args.max_pixels,
        queue=args.queue, timeout_s=args.timeout, follow_links=args.follow_links,
    )  # fmt: skip
    with user_errors("stopped"):
        own = open_store(args.store)
        bound = bind(settings)
        print(f"{own.count():,} images in {own.uri}; loading the model", flush=True)
        searcher = open_searcher(args.store, args.checkpoint, batch_size=TEXT_BATCH, dtype=args.dtype, progress=True)
        backend = Backend(searcher, own, settings.queue)
        backend.warm_up()
        serve(backend, settings, bound, lambda line: print(line, flush=True))
    print("stopped")
