"""Image search: a store of image embeddings on disk or in an object store, queries over it, and a web page.

Needs the [search] extra, whose libraries are imported lazily.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from icar_jax import extras
from icar_jax.errors import IcarError


class MissingExtra(IcarError, ValueError):
    """A library of the [search] extra is not installed."""


def extra(name: str) -> ModuleType:
    """Imports the module `name` of the [search] extra. Raises MissingExtra with the install command."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(extras.advice("image search", error.name, "search")) from error
