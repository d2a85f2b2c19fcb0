"""Typed access to other libraries' JSON configuration files: every value is checked where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from icar_jax.errors import IcarError
from icar_jax.files import json_file


class ConvertError(IcarError, ValueError):
    """Weights cannot be converted or exported as requested; the message gives place, expectation, finding and fix."""


class Fields(json_file.Fields):
    """A JSON object whose methods raise ConvertError; see `icar_jax.files.json_file`."""

    error: ClassVar[type[IcarError]] = ConvertError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises ConvertError, naming the file, where it cannot be read or is no object."""
    return json_file.read_object(file, ConvertError)
