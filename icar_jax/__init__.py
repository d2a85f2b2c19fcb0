"""icar_jax: image complexity-aware retrieval in JAX."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Importing the package must not start JAX: worker processes of the data pipeline import it too.
    if name == "load":
        from icar_jax.inference.loading import load

        return load
    raise AttributeError(f"module 'icar_jax' has no attribute {name!r}")
