"""Complexity models on a CLIP's own blocks, and pictures that they tell apart."""

import dataclasses

import jax
import numpy as np

from icar_jax import architectures, checkpoint, pytree
from icar_jax.config import ClipConfig, from_dict
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.token_router import BlocksArch, TokenRouter, shared_paths
from tests.support import drawn


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size=(40, 40, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 6)) for _ in range(n)]


def write_scorer(folder, clip_folder, blocks, head="regression", change=lambda flat: flat, spread=30.0, norm_parts=False):
    """A head on `clip_folder`'s first blocks, random, with scores that differ between images."""
    clip = checkpoint.read(clip_folder, "clip")
    vision = from_dict(clip.description["arch"], ClipArch).vision
    arch = BlocksArch(dataclasses.replace(vision, exits=(), routes=(), schedules=()), blocks, head, norm_parts=norm_parts)
    scorer = TokenRouter.graph(arch)
    flat, weights = pytree.flatten(TokenRouter.init(jax.random.key(3), arch)), pytree.flatten(clip.params)
    flat |= {path: weights[source] for path, source in shared_paths(scorer.shapes).items()}
    last = "head/fc3/kernel" if head == "regression" else "head/fc/kernel"
    flat[last] = flat[last] * spread
    description = {
        "arch": dataclasses.asdict(arch),
        "preprocess": clip.description["preprocess"],
        "tower": {"clip": "clips/first", "sha256": clip.description["hashes"][checkpoint.WEIGHTS]},
    }
    return checkpoint.write(folder, "complexity", description, pytree.unflatten(change(flat)))


# Merged after one block, two and three: the head at the exit reads what two mergings have left, and the rest merges once more.
VISION = {"exits": (3,), "exit_head": "attention", "merge": (1, 2, 1), "patch_size": 8, "image_size": 32, "depth": 4}


def write_clip(folder, seed=0, **changes):
    words = Tokenizer.train(["a small red circle", "two stripes"], 300)
    config = ClipConfig(variant="vit_demo", context_length=16, **VISION | changes)
    arch = architectures.clip_arch(config, words.vocab_size, words.end_id)
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    return checkpoint.write(folder, "clip", description, drawn.params(Clip.graph(arch).shapes, seed), words.to_json())
