"""Replaces the attention of a tower: a custom function of q, k, v for all blocks, or a sliding window for one block.

python examples/own_attention.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

import icar_jax


def library_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """Attention of q, k, v [B, L, H, K] -> [B, L, H, K]; pass implementation='cudnn' on NVIDIA GPUs."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def windowed(width: int):
    """Returns attention to tokens at most `width` positions away."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
        places = jnp.arange(q.shape[1])
        near = jnp.abs(places[:, None] - places[None]) <= width
        return jax.nn.dot_product_attention(q, k, v, mask=near[None, None], is_causal=causal)

    return attend


def main() -> tuple[jax.Array, jax.Array, jax.Array]:
    arch = icar_jax.variants["vit_demo"]
    images = jax.random.normal(jax.random.key(0), (4, arch.vision.image_size, arch.vision.image_size, 3))
    ours = icar_jax.Clip(arch, rngs=nnx.Rngs(0))
    theirs = icar_jax.Clip(arch, attention=library_attention, rngs=nnx.Rngs(0))
    plain, other = ours.encode_image(images), theirs.encode_image(images)
    print(f"largest difference between two attentions: {jnp.abs(plain - other).max():.1e}")
    ours.vision.blocks[1].attn.attention = windowed(8)
    local = ours.encode_image(images)
    print(f"a window in block 1 changes the embeddings by up to {jnp.abs(plain - local).max():.1e}")
    return plain, other, local


if __name__ == "__main__":
    main()
