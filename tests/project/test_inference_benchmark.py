"""The PyTorch side of benchmarks/inference.py computes what our towers, complexity model and router compute.

Law: 1e-5 in float32 on small shapes, drawn weights.
"""

import inference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.vision import VisionArch
from icar_jax.models.xla_options import bf16_instructions

SMALL = inference.Case(
    "small", VisionArch(32, 8, 32, 3, 2, 64, 16, exits=(1,)), 1,
    ComplexityArch(ConvNeXtArch((1, 1, 2, 1), (8, 16, 16, 32)), "classification", 32), 4, 2,
)  # fmt: skip


def test_flags_of_a_processor_tell_its_bf16_instructions():
    assert bf16_instructions("processor : 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n")
    assert bf16_instructions("Features : fp asimd bf16\n")
    assert not bf16_instructions("model name : amx_bf16\nflags : avx512f avx512_vnni\nbugs : bf16\n")


def test_routed_rows_are_the_towers_rows_in_order():
    runs, _ = inference.jax_runs(SMALL, jnp.float32)
    early, full, routed = runs["1"](2), runs["3"](2), runs["routed"](2)
    assert routed.shape == (8, 16) and not np.allclose(early, full, atol=1e-3)
    np.testing.assert_allclose(routed[0::2], early[0::2], atol=1e-6)
    np.testing.assert_allclose(routed[1::2], full[1::2], atol=1e-6)


@pytest.mark.parity
def test_both_sides_compute_the_same():
    pytest.importorskip("torch")
    ours, theirs = inference.jax_runs(SMALL, jnp.float32)[0], inference.torch_runs(SMALL)["f32"]
    for name in ("1", "3", "routed"):
        np.testing.assert_allclose(theirs[name](2), ours[name](2), atol=1e-5, err_msg=name)


@pytest.mark.parity
def test_both_sides_score_the_same():
    torch = pytest.importorskip("torch")
    import torch_towers

    from icar_jax.models.complexity import ComplexityModel
    from icar_jax.models.ops import normalise

    pixels = SMALL.parts[0]
    images = lambda pixels: normalise(pixels, inference.ICC_MEAN, inference.ICC_STD)
    score = jax.jit(lambda params, pixels: ComplexityModel.graph(SMALL.scorer).score(params, images(pixels)))
    ours = np.asarray(score(SMALL.params["scorer"], pixels))
    module = torch_towers.load(torch_towers.Complexity(SMALL.scorer.backbone), SMALL.params["scorer"])
    with torch.inference_mode():
        theirs = module(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).numpy()
    assert np.ptp(ours) > 1e-5
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parity
def test_the_benchmark_reports_every_row(capsys):
    pytest.importorskip("torch")
    rows = inference.benchmark_tower(SMALL, 1, True)
    assert [row["row"] for row in rows] == [*(f"torch {mode}" for mode in inference.TORCH_MODES), "jax f32", "jax bf16"]
    for row in rows:
        assert set(row["images_per_s"]) == {"1", "3", "scores", "routed"} and min(row["images_per_s"].values()) > 0
    assert rows[0]["to_torch_f32"]["3"] == 1
    inference.print_table(rows, 1e9)
    assert "jax bf16" in capsys.readouterr().out
