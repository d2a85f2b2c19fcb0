"""The version of this package; apart from icar_jax/__init__.py so that every layer can import it."""

VERSION = "0.2.0"
