"""What is kept between runs in a folder of the user: compiled programs, and which weights were found undamaged.

JAX's persistent compilation cache is on by default:

    ICAR_JAX_CACHE=off        no cache
    ICAR_JAX_CACHE=FOLDER     instead of $XDG_CACHE_HOME/icar_jax or ~/.cache/icar_jax

A cache that the user has configured in JAX (JAX_COMPILATION_CACHE_DIR) is left alone. Programs are native code: the folder is
only used if nobody else can write to it, and has one subfolder for each processor, jaxlib and version of this package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

from icar_jax.version import VERSION

VARIABLE = "ICAR_JAX_CACHE"
MOST_BYTES = 2_000_000_000  # of all subfolders; the least recently used programs are removed at the next start
_OFF = ("off", "0", "no", "none", "false")
_MARK = "-jaxlib"  # in the names of the subfolders
_SUFFIXES = ("-cache", "-atime", ".stablehlo")
_SETTLED_S = 3.0  # a file changed again within the clock's tick would keep its times
_CPUINFO_BYTES = 16_384  # contains the first processor
_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def user_folder() -> Path | None:
    """The cache folder of the user, which need not exist; None if it is switched off or there is no home folder."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() in _OFF:
        return None
    if given:
        return Path(os.path.abspath(os.path.expanduser(given)))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "icar_jax") if os.path.isabs(home) else None


def verified(file: Path, sha256: str, check: Callable[[Path], str]) -> bool:
    """Whether `check(file)`, its SHA-256, is `sha256`; remembered as long as the file keeps its size, inode and times.

    Reading the weights of a large model for their hash takes longer than a search.
    """
    root, found = user_folder(), file.stat()
    known = [os.path.realpath(file), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, sha256]
    name = hashlib.sha256(repr(known).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    mark = root / "verified" / name if root is not None else None
    if mark is not None and mark.is_file() and is_private(mark.parent):
        return True
    if check(file) != sha256:
        return False
    if mark is not None and time.time() - found.st_ctime > _SETTLED_S and is_private(mark.parent):
        with contextlib.suppress(OSError):  # no space
            mark.touch()
    return True


def enable() -> Path | None:
    """Turns the cache on, also before JAX is imported; returns its folder, or None if it is off.

    It stays off with several CPU devices, whose collectives deadlock in programs that are read from a cache (jaxlib 0.10.2).
    """
    if _configured() or _several_cpu_devices():
        return None
    if (folder := _folder()) is None:
        return None
    _prune(folder.parent)
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0}
    if (jax := sys.modules.get("jax")) is not None and hasattr(jax, "config"):
        from jax.experimental.compilation_cache import compilation_cache

        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX decides at its first program whether there is a cache
    else:
        os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    return folder


def file(name: str) -> Path | None:
    """A file of this version and processor beside the programs; None if nothing is kept."""
    folder = _folder()
    return folder / name if folder is not None else None


def _folder() -> Path | None:
    """The folder of programs of this version and processor, made if needed; None if nothing is kept."""
    root = user_folder()
    folder = root / "programs" / _version() if root is not None else None
    return folder if folder is not None and is_private(folder) else None


def _configured() -> bool:
    """Whether there is a cache already, of the user or from an earlier call."""
    config = getattr(sys.modules.get("jax"), "config", None)
    return bool(os.environ.get("JAX_COMPILATION_CACHE_DIR") or getattr(config, "jax_compilation_cache_dir", None))


def _several_cpu_devices() -> bool:
    counts = [*_DEVICES.findall(os.environ.get("XLA_FLAGS", "")), os.environ.get("JAX_NUM_CPU_DEVICES", "")]
    return any(count.isdigit() and int(count) > 1 for count in counts)


@functools.cache
def _version() -> str:
    return f"{VERSION}{_MARK}{importlib.metadata.version('jaxlib')}-{_processor()}"


def _processor() -> str:
    """A short hash of the processor's model and instruction sets, on which compiled programs depend."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(_CPUINFO_BYTES).partition("\n\n")[0]
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        known = "\n".join(line for line in first.splitlines() if line.startswith(wanted))
    except OSError:
        known = f"{platform.machine()} {platform.processor()}"
    return hashlib.sha256(known.encode()).hexdigest()[:10]


def is_private(folder: Path) -> bool:
    """Creates a folder below `user_folder` for this user alone; False if it cannot be written, or others can write to it.

    The same holds for every folder between the two: who can rename one can replace what is in it.
    """
    root = user_folder()
    levels = [folder, *(parent for parent in folder.parents if root is not None and parent.is_relative_to(root))]
    try:
        for level in reversed(levels):
            level.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = level.stat()
            mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
            if not mine or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return False
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _prune(root: Path) -> None:
    """Removes the programs used longest ago until those kept have MOST_BYTES, and empty files of killed runs.

    Only files that JAX or this package writes, in folders that this package names, are touched.
    """
    entries = []
    for sub in _entries(root):
        for entry in _entries(Path(sub.path)) if _MARK in sub.name else ():
            with contextlib.suppress(OSError):  # another process removed it
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and (entry.name.endswith(_SUFFIXES) or entry.name.startswith(".text-")):
                    entries.append((max(found.st_atime, found.st_mtime), found.st_size, entry.path))
    left = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if left > MOST_BYTES or not size:
            left -= size
            with contextlib.suppress(OSError):
                os.unlink(path)


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder; nothing if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
