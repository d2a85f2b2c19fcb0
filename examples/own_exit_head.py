"""Replaces an exit head by a custom module: here the mean and maximum over all tokens, projected.

python examples/own_exit_head.py
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import icar_jax
from icar_jax.models.functional import Module


class MeanMaxHead(Module):
    """Pools tokens [B, L, W] -> [B, D]."""

    def __init__(self, width: int, embed_dim: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(2 * width, rngs=rngs)
        self.proj = nnx.Linear(2 * width, embed_dim, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(self.norm(jnp.concatenate([x.mean(axis=1), x.max(axis=1)], axis=-1)))


def main() -> tuple[icar_jax.Clip, dict]:
    arch = icar_jax.variants["vit_demo"]
    arch = dataclasses.replace(arch, vision=dataclasses.replace(arch.vision, exits=(2, 4)))
    clip = icar_jax.Clip(arch, rngs=nnx.Rngs(0))
    clip.vision.exits["2"] = MeanMaxHead(arch.vision.width, arch.vision.embed_dim, rngs=nnx.Rngs(1))
    images = jax.random.normal(jax.random.key(0), (4, arch.vision.image_size, arch.vision.image_size, 3))
    graph, params = clip.split()
    embeds = jax.jit(graph.encode_image_exits)(params, images)
    print({exit: z.shape for exit, z in embeds.items()})
    return clip, embeds


if __name__ == "__main__":
    main()
