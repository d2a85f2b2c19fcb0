"""The process that reads the inputs: watches what they start or write, and how much memory they take."""

from __future__ import annotations

import os
import random
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from tests.support.fuzz.reader import Reader, WrongSilence

# Events of the interpreter that no reader of a file has a reason for.
_FORBIDDEN = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class", "os.putenv", "urllib.Request"),
}
_WRITES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
}


class Watch:
    """Notes forbidden events between `begin` and `end`; an audit hook cannot be removed, so one lasts for the process."""

    def __init__(self, folder: Path):
        self._folder, self._active = os.path.realpath(folder), False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def begin(self) -> None:
        self.seen, self._active = [], True

    def end(self) -> None:
        self._active = False

    def _hook(self, event: str, args: tuple) -> None:
        if not self._active:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {args!r:.200}")
        elif event in _WRITES or (event == "open" and self._is_write(args)):
            if isinstance(args[0], str | bytes) and not os.path.realpath(os.fsdecode(args[0])).startswith(self._folder):
                self.seen.append(f"{event} {args!r:.200}")

    def _is_write(self, args: tuple) -> bool:
        _, mode, flags = args
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else False
        return writes or (isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


def input_of(reader: Reader, seeds: list[bytes], seed: int, number: int) -> tuple[bytes, str]:
    """(input, its kind): the handmade ones first, then changes; the same for the same seed and number."""
    handmade = list(reader.handmade)
    if number < len(handmade):
        return reader.handmade[handmade[number]][0], handmade[number]
    return reader.change(random.Random(f"{seed} {reader.name} {number}"), seeds)


def work(reader: Reader, folder: Path, seed: int, connection: Connection) -> None:
    """Reads the inputs whose numbers arrive, and answers (number, fault or '', error class or '', seconds, megabytes)."""
    from absl import logging

    from icar_jax.errors import IcarError

    logging.set_verbosity(logging.FATAL)  # warnings about the inputs
    seeds = reader.prepare(folder)
    for data in seeds:  # imports what is imported late, and shows that valid inputs are read
        reader.read(folder, data)
    watch = Watch(folder)
    connection.send("ready")
    while (number := connection.recv()) is not None:
        data, kind = input_of(reader, seeds, seed, number)
        before, began, fault, refused = _reset_peak(), time.perf_counter(), "", ""
        watch.begin()
        try:
            reader.run(folder, seeds, data, kind)
        except (IcarError, OSError) as error:
            refused = type(error).__name__
            if "\n" in str(error).strip() and len(str(error)) > 4000:
                fault = f"message: of {len(str(error)):,} characters"
        except WrongSilence as error:
            fault = f"silence: {error}"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # panics of Rust are no Exceptions
            fault = f"crash: {traceback.format_exc(limit=-4)}"
        watch.end()
        seconds, megabytes = time.perf_counter() - began, (_peak() - before) / 1e6
        if watch.seen:
            fault = f"event: {watch.seen[0]}"
        elif not fault and megabytes > reader.megabytes:
            fault = f"memory: {megabytes:.0f} MB, more than {reader.megabytes:.0f}"
        connection.send((number, fault, refused, seconds, megabytes))


def _reset_peak() -> int:
    """Sets the peak of this process's memory to what it holds now, and returns that in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
