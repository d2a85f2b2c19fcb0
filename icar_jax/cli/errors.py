"""How the programs report errors a user can cause."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from icar_jax import checkpoint, extras
from icar_jax import config as cfg


@contextlib.contextmanager
def user_errors(interrupted: str = "stopped; the same command continues from the last checkpoint") -> Iterator[None]:
    """Ends the program with a plain message for errors a user can cause; other faults keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of `icar ... | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(141)  # as a shell reports SIGPIPE
    except (cfg.ConfigError, checkpoint.CheckpointError, OSError) as error:
        _fail(error)
    except ModuleNotFoundError as error:
        if (what := extras.missing(error)) is None:
            raise
        _fail(what)
    except (ValueError, RuntimeError) as error:
        # Raised by this package on purpose, or from deep inside a library: only the former reads well alone.
        if type(error).__module__.startswith("icar_jax") or _raised_here(error):
            _fail(error)
        raise


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("icar_jax")


def _fail(error: BaseException | str) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
