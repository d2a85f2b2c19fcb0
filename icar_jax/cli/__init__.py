"""The `icar` command line: argument parsing only, one function per command, related commands in one file."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from icar_jax import program_cache
from icar_jax.cli import embed, index, retrieval, routing, score, search, serve, training, weights
from icar_jax.cli.arguments import require_local_paths
from icar_jax.cli.errors import user_errors, without_debug

__all__ = ["main", "user_errors"]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script `icar`. Signal handlers are only installed in the main thread."""
    words = without_debug(sys.argv[1:] if argv is None else argv)
    if words and words[0] in training.PROGRAMS:
        with user_errors():
            from icar_jax.cli.program import run

            run(words[0], words[1:])
    parser = argparse.ArgumentParser(
        prog="icar", description="Image complexity-aware retrieval in JAX.", epilog="--debug prints the traceback of an error."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (weights, routing, training, retrieval, score, embed, index, search, serve):
        group.add(commands)
    args, rest = parser.parse_known_args(words)
    args.overrides = [word for word in rest if word.startswith("--config.")]
    if set(rest) - set(args.overrides) or (rest and "config" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from absl import logging  # after --help, which must be quick

    logging.set_verbosity(logging.WARNING)
    program_cache.enable()
    with _cleaning_up(), user_errors("interrupted; nothing was written"):
        require_local_paths(args, words)
        args.run(args)


@contextlib.contextmanager
def _cleaning_up() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit while a command runs, so that partially written folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
