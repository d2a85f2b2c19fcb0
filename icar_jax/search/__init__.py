"""Image search: a store of image embeddings on disk or in an object store, queries over it, and a web page.

Needs the [search] extra, whose libraries are imported lazily.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from icar_jax import extras
from icar_jax.errors import IcarError

# lancedb imports this client of a REST service for its types. Half of lancedb's import time is spent on the client's functions,
# which a folder or bucket does not need.
_REST_CLIENT = "lance_namespace_urllib3_client"


class MissingExtra(IcarError, ValueError):
    """A library of the [search] extra is not installed."""


def extra(name: str) -> ModuleType:
    """Imports the module `name` of the [search] extra. Raises MissingExtra with the install command."""
    try:
        if name == "lancedb":
            _defer(_REST_CLIENT)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(extras.advice("image search", error.name, "search")) from error


def _defer(name: str) -> None:
    """Lets submodules of the package `name` be imported without its __init__, which runs when one of its names is used."""
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None or spec.loader is None:
        return
    package = importlib.util.module_from_spec(spec)

    def load(attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = load
    sys.modules[name] = package
