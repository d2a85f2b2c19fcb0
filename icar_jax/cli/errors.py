"""How the programs report errors a user can cause."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from icar_jax import extras
from icar_jax.errors import IcarError

DEBUG = "--debug"
_tracebacks = False


@contextlib.contextmanager
def user_errors(interrupted: str = "stopped; the same command continues from the last checkpoint") -> Iterator[None]:
    """Ends the program with one line for errors a user can cause; anything else is a bug and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of `icar ... | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(141)  # as a shell reports SIGPIPE
    except (IcarError, OSError) as error:
        _fail(error, str(error))
    except ModuleNotFoundError as error:
        if (what := extras.missing(error)) is None:
            raise
        _fail(error, what)


def without_debug(words: Sequence[str]) -> list[str]:
    """The arguments of a program without --debug, which makes `user_errors` show tracebacks before its messages."""
    global _tracebacks
    _tracebacks = DEBUG in words
    return [word for word in words if word != DEBUG]


def _fail(error: BaseException, message: str) -> None:
    if _tracebacks:
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
