"""icar_jax: image complexity-aware retrieval in JAX.

    import icar_jax

    model = icar_jax.load("workdir/demo")      # text and images in, numpy out; routed where it is a bundle
    model.clip, model.params                   # the Flax module and its weights

Names are imported when they are first used: `import icar_jax` alone does not start JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from icar_jax.version import VERSION

if TYPE_CHECKING:
    from icar_jax.data.images import Preprocess
    from icar_jax.data.tokenizer import Tokenizer
    from icar_jax.errors import IcarError
    from icar_jax.inference.loading import load
    from icar_jax.inference.pretrained import Clip
    from icar_jax.models.clip import ClipArch
    from icar_jax.models.complexity import ComplexityModel
    from icar_jax.models.text import TextArch
    from icar_jax.models.variants import CLIP as variants
    from icar_jax.models.vision import VisionArch

__version__ = VERSION
__all__ = [
    "Clip", "ClipArch", "ComplexityModel", "IcarError", "Preprocess", "TextArch", "Tokenizer", "VisionArch", "load", "variants",
]  # fmt: skip

_HOMES = {
    "Clip": "inference.pretrained", "ClipArch": "models.clip", "ComplexityModel": "models.complexity",
    "Preprocess": "data.images", "TextArch": "models.text", "Tokenizer": "data.tokenizer", "VisionArch": "models.vision",
    "load": "inference.loading", "variants": "models.variants", "IcarError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Importing the package must not start JAX: worker processes of the data pipeline import it too.
    if name not in _HOMES:
        raise AttributeError(f"module 'icar_jax' has no attribute {name!r}")
    home = importlib.import_module(f"icar_jax.{_HOMES[name]}")
    found = globals()[name] = home.CLIP if name == "variants" else getattr(home, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
