"""The one error of this package."""

from __future__ import annotations


class ConvertError(ValueError):
    """A source cannot be converted as asked; the message says where, what was expected, what was found, and the fix."""
