"""Fine-tunes a CLIP with LoRA on the attention projections of its vision tower; all other weights are frozen.

python examples/lora.py [MODEL]
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import icar_jax
from icar_jax.models.transformer import Attention


def add_lora(clip: icar_jax.Clip, rank: int, rngs: nnx.Rngs) -> None:
    for _, module in list(nnx.iter_modules(clip.vision)):
        if isinstance(module, Attention):
            width = module.width
            module.qkv = nnx.LoRA(width, rank, 3 * width, base_module=module.qkv, rngs=rngs)


def loss(clip: icar_jax.Clip, images: jax.Array, tokens: jax.Array) -> jax.Array:
    out = clip(images, tokens)
    labels = jnp.arange(len(images))
    each = [optax.losses.softmax_cross_entropy_with_integer_labels(out.logit_scale[e] * z @ out.text.T, labels).mean()
            for e, z in out.image.items()]  # fmt: skip
    return sum(each) / len(each)


@nnx.jit
def step(clip: icar_jax.Clip, optimizer: nnx.Optimizer, images: jax.Array, tokens: jax.Array) -> jax.Array:
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(clip, images, tokens)
    optimizer.update(clip, grads)
    return value


def main(path: str = "", steps: int = 10) -> list[float]:
    clip = icar_jax.Clip.from_pretrained(path) if path else icar_jax.Clip(icar_jax.variants["vit_demo"], rngs=nnx.Rngs(0))
    add_lora(clip, rank=4, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(clip, optax.adamw(1e-2), wrt=nnx.LoRAParam)
    size, text = clip.arch.vision.image_size, clip.arch.text
    images = jax.random.normal(jax.random.key(0), (8, size, size, 3))  # replace with your own image-text pairs
    tokens = jax.random.randint(jax.random.key(1), (8, text.context_length), 0, text.vocabulary)
    losses = [float(step(clip, optimizer, images, tokens)) for _ in range(steps)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
