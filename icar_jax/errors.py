"""The base of every error that a user can cause, and the kinds that belong to no one package.

Programs catch `IcarError` and OSError, print one line and end with status 2. Whatever else reaches them is a fault of this
package, and its traceback is shown. A wrong call from other code (an array of another shape, arguments that exclude each other)
stays a ValueError or TypeError.
"""


def require_list(name: str, value: object) -> None:
    """Raises TypeError for one text where a list of texts belongs: Python takes a text for a list of its letters."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a list or tuple of texts, found the text {value!r:.80}; write [{value!r:.40}]")


class IcarError(Exception):
    """Something a user can mend: a file, a setting, weights, a missing package. The message says where, what and how."""


class ConfigError(IcarError, ValueError):
    """A setting cannot be used; the message names the field, the value and the fix."""


class DataError(IcarError, ValueError):
    """Images, captions, ratings or a tokenizer file cannot be used; the message names the file, what was expected and found."""


class ModelError(IcarError, ValueError):
    """An architecture, an exit or weights cannot be used; the message says what the model has and what was asked."""
