"""Image search: a store of embedded images on disk or in an object store, queries over it, and a web page.

Needs the [search] extra; nothing of it is imported before one of its parts is used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from icar_jax import extras
from icar_jax.errors import IcarError


class MissingExtra(IcarError, ValueError):
    """A library of the [search] extra is not installed."""


def extra(name: str) -> ModuleType:
    """The module `name` of the [search] extra. Raises MissingExtra saying how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(extras.advice("image search", error.name, "search")) from error
