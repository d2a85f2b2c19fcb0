"""FLOPs of traced programs, beside the counted ones."""

import math

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from icar_jax.models import flops
from icar_jax.models.clip import Clip
from icar_jax.planner import flops as plan_flops


def dot_flops(jaxpr) -> int:
    """FLOPs of all matrix products of a program, on one platform."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contract, _), _) = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contract)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        nested = list(jaxprs_in_params(equation.params))
        branches = equation.primitive.name == "cond"  # one for each platform
        total += sum(dot_flops(inner) for inner in (nested[:1] if branches else nested))
    return total


def require_counted(arch):
    """The counted FLOPs of the image tower are those of the traced programs, of each exit and of all together."""
    clip = Clip.graph(arch)
    image = jax.ShapeDtypeStruct((1, arch.vision.image_size, arch.vision.image_size, 3), jnp.float32)
    for exit in arch.vision.all_exits:
        program = jax.make_jaxpr(lambda p, x, e=exit: clip.encode_image(p, x, e))(clip.shapes, image)
        assert dot_flops(program.jaxpr) == flops.vision_flops(arch.vision, exit)
    program = jax.make_jaxpr(clip.encode_image_exits)(clip.shapes, image)
    assert dot_flops(program.jaxpr) == plan_flops.image_flops(arch.vision)
