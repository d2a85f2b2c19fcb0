"""The command `icar serve`."""

from __future__ import annotations

import argparse

from icar_jax.cli.arguments import positive
from icar_jax.cli.errors import user_errors


def add(commands) -> None:
    """Adds `icar serve` to the subparsers."""
    p = commands.add_parser(
        "serve",
        help="search a store of images in the browser",
        description="Serves a web page and a JSON API for searching a store made by `icar index`, by text or by image. By "
        "default it is reachable only from this machine; other --host addresses need a token. It serves only images of the "
        "store unchanged since indexing. /openapi.json describes the API; /healthz, /readyz and /metrics are for monitoring.",
    )
    p.add_argument("--store", required=True, metavar="DIR", help="store made by `icar index`")
    p.add_argument("--checkpoint", help="bundle or CLIP; default: the one the store was indexed with")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="port to listen on; 0 selects a free one (8000)")
    secret = p.add_mutually_exclusive_group()
    secret.add_argument("--token", help="secret required in every request; visible in the process list of this machine")
    secret.add_argument("--token-file", metavar="FILE", help="read the token from a file")
    p.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="host name of a proxy on this machine "
                   "through which browsers reach this server; may be repeated; needs a token")  # fmt: skip
    p.add_argument("--max-upload-mb", type=positive, default=20, metavar="MB", help="largest image file of a query (20)")
    p.add_argument("--max-pixels", type=positive, default=50_000_000, metavar="N", help="largest image to decode (50000000)")
    p.add_argument("--queue", type=positive, default=32, metavar="N", help="searches that may wait; others get status 503 (32)")
    p.add_argument("--timeout", type=positive, default=30, metavar="S", help="timeout of a search in seconds (30)")
    p.add_argument("--follow-links", action="store_true", help="also serve files that links reach outside the indexed folders")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of activations (float32)")
    p.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    from icar_jax.search import extra, local_socket

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
        print(f"Store {own.uri}: {own.count():,} images; loading the model", flush=True)
        searcher = open_searcher(args.store, args.checkpoint, batch_size=TEXT_BATCH, dtype=args.dtype, progress=True)
        backend = Backend(searcher, own, settings.queue)
        backend.warm_up()
        answer = lambda request: backend.answer_locally(request, args.dtype, settings.timeout_s)
        with local_socket.listening(own.uri, answer) as path:
            if path is None:
                print(
                    "`icar search` will not ask this server: another one does, or there is no private folder (docs/startup.md)"
                )
            serve(backend, settings, bound, lambda line: print(line, flush=True))
    print("stopped")
