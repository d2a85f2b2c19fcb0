"""The PyTorch side of benchmarks/token_reduction.py computes what our towers compute; 1e-5 in float32 on small shapes."""

import inference
import jax.numpy as jnp
import numpy as np
import pytest
import token_reduction

from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.reduction_plan import reduced_vision
from icar_jax.models.vision import VisionArch

SCORER = ComplexityArch(ConvNeXtArch((1, 1, 2, 1), (8, 16, 16, 32)), "classification", 32)
SMALL = VisionArch(32, 4, 32, 3, 2, 64, 16)


@pytest.mark.parity
@pytest.mark.parametrize("method", ["none", "tome", "crossget"])
def test_both_sides_compute_the_same(method):
    pytest.importorskip("torch")
    arch = SMALL if method == "none" else reduced_vision(SMALL, method, (9,))
    case = inference.Case("small", arch, 3, SCORER, 4, 1)
    ours, theirs = token_reduction.jax_run(case, jnp.float32)(), token_reduction.torch_run(case, "f32")()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rows_cover_the_methods_and_halve_what_a_deep_tower_removes():
    assert set(token_reduction.archs("vit_l14", [8])) == {("none", 0), ("tome", 4), ("crossget", 4), ("drop", 4)}
    arch = token_reduction.archs("vit_b16", [16])["drop", 16]
    assert sum(arch.schedule) == 192 and arch.tokens_after(12) == 5
