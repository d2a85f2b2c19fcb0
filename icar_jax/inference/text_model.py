"""The text side of a CLIP from its traced program: what one search by text needs, without importing Flax or reading images.

The program is that of `icar compile`, or one that an earlier search has kept in the user's folder (program_cache.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from safetensors import safe_open

from icar_jax import checkpoint, program_cache, pytree
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.errors import require_list
from icar_jax.inference import ahead
from icar_jax.inference.forward import Forward, bucket_sizes

TEXT = "text"  # name of the program, and of the parameters that it takes


class TextModel:
    """Encodes texts like `icar_jax.inference.model.Model`; the attributes are those of a Model.

    `open` returns None where a whole model must be loaded.
    """

    def __init__(self, folder: Path, description: dict[str, Any], file: Path, batch_size: int):
        text, vision = description["arch"]["text"], description["arch"]["vision"]
        self.path, self.batch_size = folder, batch_size
        self.identity = {"clip": checkpoint.identity(description)}
        self.exits = (*vision["exits"], vision["depth"])
        self.embed_dim, self._length = text["embed_dim"], text["context_length"]
        call = jax.export.deserialize(bytearray(file.read_bytes())).call
        with safe_open(folder / checkpoint.WEIGHTS, "np") as weights:
            names = [name for name in weights.keys() if name.startswith(f"{TEXT}/")]
            params = pytree.unflatten({name: weights.get_tensor(name) for name in names})
            self.temperature = float(np.exp(weights.get_tensor("logit_scale")))
        self._tokenizer = Tokenizer.from_json(checkpoint.read_tokenizer(folder) or "")
        self._forward = Forward(call, jax.device_put(params), bucket_sizes(batch_size))

    @classmethod
    def open(cls, folder: Path, *, batch_size: int, dtype: str) -> Self | None:
        """The text side of the CLIP in `folder`; None if its program was not kept, or something about it is unusual.

        Then loading the whole model works, or says what is wrong.
        """
        try:
            description = checkpoint.describe(folder)
            checkpoint.require_undamaged(folder, description)
            identity = {"clip": checkpoint.identity(description)}
            kept = kept_file(identity, dtype)
            files = [ahead.find(folder, identity, dtype).file(TEXT), kept] if description["kind"] == "clip" else []
        except (OSError, ValueError, KeyError):
            return None
        for file in files:
            if file is None or not file.is_file():
                continue
            try:
                model = cls(folder, description, file, batch_size)
                model.encode_text([""])  # a damaged program fails when it is compiled
                return model
            except Exception as error:  # of several libraries
                logging.info("the program %s of the text tower is not used: %s", file, error)
                if file == kept:
                    with contextlib.suppress(OSError):
                        file.unlink(missing_ok=True)  # `keep` writes it again
        return None

    def encode_text(self, texts: Sequence[str], warn: bool = True) -> np.ndarray:
        """Like Model.encode_text."""
        require_list("texts of encode_text", texts)
        tokens = tokens_of(self._tokenizer, texts, self._length, warn)
        return self._forward(tokens) if len(tokens) else np.zeros((0, self.embed_dim), np.float32)

    def is_too_long(self, text: str) -> bool:
        """Like Model.is_too_long."""
        return bool(self._tokenizer.encode([text], self._length)[1][0])


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str], length: int, warn: bool) -> np.ndarray:
    """Token ids int32 [N, length] of N texts. Long texts are truncated, with a warning if `warn`."""
    tokens, truncated = tokenizer.encode(texts, length)
    if warn and truncated.any():
        logging.warning("%d of %d texts exceed %d tokens and were truncated.", truncated.sum(), len(texts), length)
    return tokens


def kept_file(identity: dict[str, str], dtype: str) -> Path | None:
    """Where the program of a CLIP's text side is kept; None if nothing is kept."""
    about = json.dumps([identity["clip"], dtype, jax.__version__, ahead.platform(), ahead.code()])
    return program_cache.file(f"text-{hashlib.sha256(about.encode()).hexdigest()[:32]}{ahead.SUFFIX}")


def keep(programs: ahead.ExportedPrograms, identity: dict[str, str], dtype: str) -> None:
    """Keeps the text side's program of a loaded CLIP for later processes."""
    file = kept_file(identity, dtype)
    if file is None or file.exists() or not programs.has(TEXT):
        return
    made = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        made.write_bytes(programs.exported(TEXT, (ahead.platform(),)))
        made.replace(file)
    except OSError:  # no space: the next process traces it again
        made.unlink(missing_ok=True)
