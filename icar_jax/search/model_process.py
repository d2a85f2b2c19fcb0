"""A model in a process of its own: one search then imports JAX and LanceDB at the same time.

Each of the two imports takes a second of one core, longer than the search. The process imports JAX while the caller opens the
store, whose description names the model to load.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from icar_jax.errors import IcarError, ModelError, require_list

FACTS = ("identity", "path", "exits", "temperature", "batch_size")  # attributes of Model that a search reads


class ModelProcess:
    """What a `Searcher` needs of `icar_jax.inference.model.Model`, computed in a child process.

    Use it as a context manager. `load` must be called first; it raises what `icar_jax.load` raises, and sets the attributes
    FACTS. Calls raise the IcarError or OSError of the child, and ModelError if the child has ended.
    """

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        # With the path of this process: `python -c` would import modules from the current folder.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import answer; answer({theirs.fileno()})"
        command = [sys.executable, "-P", "-c", code]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pipe.close()
        self._process.kill()  # it holds nothing that must be saved
        self._process.wait()

    def load(self, folder: Path, *, batch_size: int, dtype: str) -> Self:
        """Loads a model as `icar_jax.load` does and returns this object."""
        vars(self).update(self._call("load", folder, batch_size=batch_size, dtype=dtype))
        return self

    def encode_text(self, texts: Sequence[str], warn: bool = True) -> np.ndarray:
        """Like Model.encode_text."""
        require_list("texts of encode_text", texts)
        return self._call("encode_text", list(texts), warn=warn)

    def encode_image(self, images: Sequence[Any], exit: int | None = None) -> np.ndarray:
        """Like Model.encode_image."""
        return self._call("encode_image", list(images), exit=exit)

    def is_too_long(self, text: str) -> bool:
        """Like Model.is_too_long."""
        return self._call("is_too_long", text)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            self._pipe.send((name, args, kwargs))
            failed, found = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            status = self._process.wait()
            raise ModelError(
                f"the process that runs the model ended with status {status}" + (" (out of memory?)" if status == -9 else "")
            ) from error
        if failed:
            raise found if isinstance(found, Exception) else RuntimeError(f"in the process that runs the model:\n{found}")
        return found


def _traced_model(folder: Path, batch_size: int, dtype: str) -> Any:
    """The whole model, traced; keeps the program of its text side for the next search."""
    from icar_jax.inference import text_model
    from icar_jax.inference.ahead import ExportedPrograms
    from icar_jax.inference.loading import load

    programs = ExportedPrograms()
    model = load(folder, batch_size=batch_size, dtype=dtype, programs=programs)
    text_model.keep(programs, model.identity, dtype)
    return model


def answer(descriptor: int) -> None:
    """Answers the calls of a ModelProcess until its pipe is closed."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C ends the caller, and with it the pipe
    pipe = Connection(descriptor)
    # A search by text, the usual one, needs neither Flax nor the vision tower; importing JAX takes longest.
    from icar_jax.inference.text_model import TextModel

    model: Any = None
    arguments: dict[str, Any] = {}
    while True:
        try:
            name, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            if name == "load":
                arguments = {"folder": args[0], **kwargs}
                model = TextModel.open(**arguments) or _traced_model(**arguments)
                found = {fact: getattr(model, fact, None) for fact in FACTS}
            else:
                if not hasattr(model, name):  # an image came
                    from icar_jax.inference.loading import load

                    model = load(arguments.pop("folder"), **arguments)
                found = getattr(model, name)(*args, **kwargs)
            said = (False, found)
        except (IcarError, OSError) as error:
            said = (True, error)
        except Exception:
            said = (True, traceback.format_exc())
        try:
            pipe.send(said)
        except BrokenPipeError:
            return
