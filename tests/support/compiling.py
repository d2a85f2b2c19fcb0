"""How tests compile: on the CPU, each program once a session, and in `make test` hardly optimised.

Kept in a file of its own so that child processes compile alike.
"""

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

FAST = "ICAR_JAX_TESTS_COMPILE_FAST"  # set by `make test`: compiling takes longer than running
CACHE = "ICAR_JAX_TESTS_CACHE"  # folder that keeps programs between sessions; without it they are kept for one session
_MOST_BYTES = 2_000_000_000
_session = None


def flags(fast: bool | None = None) -> str:
    """XLA flags that make compiling cheap; none where programs are to be optimised as users have them."""
    if not (bool(os.environ.get(FAST)) if fast is None else fast):
        return ""
    cheap = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
        cheap += ["--xla_cpu_use_fusion_emitters=false"]
    return " ".join(cheap)


def prepare() -> None:
    """Sets the environment of this process and its children; to be called before jax is imported anywhere."""
    global _session
    os.environ["ICAR_JAX_CACHE"] = "off"  # tests neither read nor write the user's
    os.environ.pop("XDG_RUNTIME_DIR", None)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # and one device, whatever the machine has
    if flags() not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags()}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # of workers: their parent's
        if kept := os.environ.get(CACHE):
            folder = _kept(Path(kept))
        else:
            _session = tempfile.TemporaryDirectory(prefix="icar_jax_tests_")
            folder = _session.name
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small ones, but thousands of them


def _kept(root: Path) -> Path:
    """The folder for this processor, emptied where it has grown beyond measure: programs are of one processor and jaxlib."""
    features = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    folder = root / hashlib.sha256("".join([importlib.metadata.version("jaxlib"), *features]).encode()).hexdigest()[:12]
    if folder.is_dir() and sum(file.stat().st_size for file in folder.iterdir()) > _MOST_BYTES:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
