"""The cheap ConvNeXt routers at small image sizes: both heads, sizes off the stride, cost."""

import jax
import jax.numpy as jnp
import pytest

from icar_jax import architectures
from icar_jax.config import ComplexityConfig
from icar_jax.models import variants
from icar_jax.models.complexity import ComplexityModel
from icar_jax.models.flops import complexity_flops, vision_flops


@pytest.mark.parametrize("size", [112, 127, 224])
@pytest.mark.parametrize("head", ["regression", "classification"])
@pytest.mark.parametrize("variant", ["atto", "femto", "pico", "nano"])
def test_every_variant_takes_every_size(variant, head, size):
    arch = architectures.complexity_arch(ComplexityConfig(variant=f"convnextv2_{variant}", head=head, image_size=size))
    model = ComplexityModel.graph(arch)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    assert jax.eval_shape(model.score, model.shapes, images).shape == (2,)
    assert 0 < complexity_flops(arch) < 0.04 * vision_flops(variants.CLIP["vit_l14"].vision)


def test_pixels_beyond_the_last_whole_stride_do_not_count():
    arch = architectures.complexity_arch(ComplexityConfig(variant="convnextv2_demo", image_size=35))
    model = ComplexityModel.graph(arch)
    params = ComplexityModel.init(jax.random.key(0), arch)
    images = jax.random.normal(jax.random.key(1), (2, 35, 35, 3))
    score = jax.jit(model.score)
    assert jnp.array_equal(score(params, images), score(params, images.at[:, 32:].set(9.0).at[:, :, 32:].set(9.0)))
    assert not jnp.array_equal(score(params, images), score(params, images.at[:, 31].set(9.0)))
