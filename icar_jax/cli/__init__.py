"""`icar <command>`: argument parsing only, one function a command; the commands of a subject share a file."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from absl import logging

from icar_jax.cli import embed, index, routing, score, search, serve, training, weights
from icar_jax.cli.arguments import require_local_paths
from icar_jax.cli.errors import user_errors
from icar_jax.cli.program import run_program

__all__ = ["main", "run_program", "user_errors"]


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `icar`."""
    parser = argparse.ArgumentParser(prog="icar", description="Image complexity-aware retrieval in JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (weights, routing, training, score, embed, index, search, serve):
        group.add(commands)
    args, rest = parser.parse_known_args(argv)
    args.overrides = [word for word in rest if word.startswith("--config.")]
    if set(rest) - set(args.overrides) or (rest and "config" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.set_verbosity(logging.WARNING)
    # So that half-written folders are removed before the program ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with user_errors("stopped; nothing was written"):
        require_local_paths(args, sys.argv[1:] if argv is None else argv)
        args.run(args)
