"""Which optional dependency a library belongs to, for errors that say what to install."""

from __future__ import annotations

# {top-level module: extra of pyproject.toml}
EXTRAS = {
    "array_record": "train", "cloudpickle": "train", "grain": "train", "jinja2": "train", "matplotlib": "train",
    "ml_collections": "train", "optax": "train", "orbax": "train", "tensorflow_datasets": "train",
    "pyarrow": "tables",
    "fastapi": "search", "lancedb": "search", "multipart": "search", "prometheus_client": "search", "uvicorn": "search",
    "huggingface_hub": "hub",
    "tensorboardX": "tensorboard",
    "open_clip": "parity", "timm": "parity", "torch": "parity", "transformers": "parity",
}  # fmt: skip


def missing(error: ModuleNotFoundError) -> str | None:
    """What to do about a library that is not installed; None where no extra has it."""
    library = error.name or ""
    extra = EXTRAS.get(library.partition(".")[0])
    return None if extra is None else advice("this", library, extra)


def advice(what: str, library: str, extra: str) -> str:
    """The sentence about a library that `what` needs."""
    return f"{what} needs {library}, which is not installed; install it with pip install 'icar-jax[{extra}]'"
