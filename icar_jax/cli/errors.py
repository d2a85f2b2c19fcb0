"""Reporting of user errors by the programs."""

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
def user_errors(interrupted: str = "interrupted; the same command resumes from the last checkpoint") -> Iterator[None]:
    """Exits with a one-line message for user errors; other exceptions are bugs and keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has exited, as in `icar ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard buffered output
        sys.exit(141)  # like a shell for SIGPIPE
    except (IcarError, OSError) as error:
        _fail(error, str(error))
    except ModuleNotFoundError as error:
        if (what := extras.missing(error)) is None:
            raise
        _fail(error, what)


def without_debug(words: Sequence[str]) -> list[str]:
    """The arguments without --debug, which makes `user_errors` print tracebacks before its messages."""
    global _tracebacks
    _tracebacks = DEBUG in words
    return [word for word in words if word != DEBUG]


def _fail(error: BaseException, message: str) -> None:
    if _tracebacks:
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
