"""Plans: FLOPs, chips and slices, decisions, sweeps, and real plans on CPU devices and with the TPU compiler."""

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from icar_jax import architectures
from icar_jax.config import ClipConfig, ConfigError, ExperimentConfig, LossConfig, MeshConfig, TrainConfig
from icar_jax.models import flops
from icar_jax.models.clip import Clip
from icar_jax.models.transformer import Execution
from icar_jax.planner import flops as plan_flops
from icar_jax.planner import plan as plans
from icar_jax.planner import report as plan_report
from icar_jax.planner.chips import CHIPS, PlanError, parse_topology, target
from icar_jax.planner.cost import Collective
from icar_jax.planner.plan import Memory, Plan
from tests.support.counting import dot_flops
from tests.support.places import ROOT

# --- FLOPs ---


def embeddings_of(arch, remat="none"):
    """(a scalar of all embeddings of one pair, its arguments as shapes)."""
    clip = Clip.graph(arch, execution=Execution(remat=remat))
    size = arch.vision.image_size
    shapes = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1, 77), jnp.int32)

    def scalar(params, images, tokens):
        embeds = [clip.encode_text(params, tokens), *clip.encode_image_exits(params, images).values()]
        return sum(z.sum() for z in embeds)

    return scalar, (clip.shapes, *shapes)


def test_forward_and_backward_flops_are_those_of_the_traced_program():
    arch = architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2, 4)))
    scalar, shapes = embeddings_of(arch)
    forward = plan_flops.image_flops(arch.vision) + flops.text_flops(arch.text)
    assert dot_flops(jax.make_jaxpr(scalar)(*shapes).jaxpr) == forward
    assert dot_flops(jax.make_jaxpr(jax.grad(scalar))(*shapes).jaxpr) == 3 * forward


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputed_flops_are_those_of_the_traced_program(remat):
    arch = architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2,)))
    counts = []
    for policy in ("none", remat):
        scalar, shapes = embeddings_of(arch, policy)
        counts.append(dot_flops(jax.make_jaxpr(jax.grad(scalar))(*shapes).jaxpr))
    again = sum(plan_flops.recomputed_flops(tower, remat) for tower in (arch.vision, arch.text))
    assert counts[1] - counts[0] == again > 0


def config_of(batch=32, exits=(2,), chunk=0, mesh=(), **train):
    return ExperimentConfig(
        clip=ClipConfig(variant="vit_demo", exits=exits),
        loss=LossConfig(chunk=chunk),
        train=TrainConfig(batch_size=batch, **train),
        mesh=MeshConfig(*mesh),
    )


def test_step_flops():
    arch = architectures.clip_arch(config_of().clip)
    image, text = 32 * plan_flops.image_flops(arch.vision), 32 * flops.text_flops(arch.text)
    logits = 2 * 32 * 32 * 128 * 2  # two exits, 128 wide
    counted = lambda **options: dataclasses.astuple(plan_flops.step_flops(config_of(**options), arch))
    model = 3 * (image + text + logits)
    assert counted() == (model, 0)
    assert counted(chunk=8) == (model, logits)
    assert counted(accumulate=4) == (model, image + text)
    assert counted(freeze=("text",)) == (model - 2 * text, 0)
    assert counted(freeze=("text",), accumulate=4) == (model - 2 * text, image)
    assert counted(freeze=("image",), accumulate=4) == (model - 2 * image, image + text)  # the exit heads still learn
    assert counted(freeze=("image", "exits"), accumulate=4) == (model - 2 * image, text)
    full, dots = counted(remat="full"), counted(remat="dots")
    assert full[0] == dots[0] == model and 0 < dots[1] < full[1] < image + text
    text_again = 32 * plan_flops.recomputed_flops(arch.text, "full")
    assert counted(remat="full", freeze=("image",)) == (model - 2 * image, text_again)


# --- chips, slices, decisions ---


def test_topologies():
    assert parse_topology("v5e:16x16") == (CHIPS["v5e"], (16, 16))
    assert parse_topology(" V5P:4x4x4") == (CHIPS["v5p"], (4, 4, 4))
    assert parse_topology("h100") == (CHIPS["h100"], ())


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5x:16x16", "did you mean 'v5.'?.*v5e:16x16"),
        ("v5e:16x16x2", "has 2 dimensions, such as v5e:16x16"),
        ("v5p:4x4", "has 3 dimensions, such as"),
        ("v5e:0x4", "has 2 dimensions"),
        ("v5e:", "has 2 dimensions"),
        ("v5e:32x16", "512 chips; the largest slice of v5e has 256"),
        ("h100:8", "is a GPU and has no slice; write --topology=h100 --devices 8"),
    ],
)
def test_a_topology_that_is_none(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(text)


@pytest.mark.parametrize(
    "topology, devices, message",
    [
        ("", 0, "needs a slice, such as v5e:16x16"),
        ("v5e", 0, "has no shape; such as v5e:16x16"),
        ("h100", 0, "has no shape; write --topology=h100 --devices 8"),
        ("v5e:2x4", 4, "has 8 chips, but --devices=4; write --topology=v5e --devices 4"),
        ("v5e", -1, "--devices=-1 must be at least 1"),
    ],
)
def test_a_target_that_is_none(topology, devices, message):
    with pytest.raises(ConfigError, match=message):
        target(topology, devices)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match="pip install libtpu.*--devices 8"):
        target("v5e:2x4", 0)


def made(temporaries=0, error="", needed=0, chip="v5e", **figures):
    memory = Memory(2 * plans.GIB, 4 * plans.GIB, 0, 2**20, temporaries, 0, needed)
    return Plan(CHIPS[chip], {"data": 2, "fsdp": 4, "tensor": 1}, 1024, "none", False, "TPU", 1.0, 2.0, 2.0, memory,
                **{"model_flops": 197e12, "step_flops": 197e12, **figures}, error=error)  # fmt: skip


def test_it_fits_up_to_the_usable_memory():
    left = int(9.75 * plans.GIB) - 2**20
    assert made(temporaries=left).fits
    assert not made(temporaries=left + 1).fits
    assert made(temporaries=left + 1, chip="v6e").fits
    assert not made(error="RESOURCE_EXHAUSTED: ...", needed=plans.GIB).fits


@pytest.mark.parametrize(
    "message, gib",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (33.37G) exceeds available HBM (15.75G).",
            33.37,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.50M of 256.00M hbm.", 512.5 / 1024),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_what_the_compiler_asks_for(message, gib):
    assert plans.needed_bytes(message) == int(gib * plans.GIB)


def test_the_estimate_is_the_slowest_bound():
    assert made().step_s == pytest.approx(1.0)
    assert made(traffic_bytes=int(2 * 819e9)).step_s == pytest.approx(2.0)
    links = made(collectives=(Collective("all-reduce", 3, int(400e9)), Collective("all-gather", 1, int(200e9))))
    assert links.links_s == links.step_s == pytest.approx(3.0)
    slow = made(cycles=int(6e9))
    assert (slow.roofline_s, slow.step_s, slow.pairs_per_s) == pytest.approx((1.0, 4.0, 256.0))
    assert slow.peak_share == pytest.approx(0.25)
    assert json.loads(json.dumps(slow.to_dict()))["chip"] == "v5e"


def test_the_report_says_what_it_is():
    fits = plan_report.format_plan(made(temporaries=plans.GIB, unknown_loops=2), config_of(exits=(2, 4)))
    assert "total                           7.00 of 15.75 usable: fits" in fits
    assert "ESTIMATE, not a measurement: 1.000 s per step, 1,024 pairs/s on 8 chips, 100% of the bf16 peak" in fits
    assert "2 loops with unknown trip count" in fits and "cycle estimates" not in fits
    kernels = plan_report.format_plan(made(cycles=int(6e9), kernels=72), config_of(exits=(2, 4)))
    assert "4.0000: sum of its cycle estimates at 1.5 GHz, without 72 runs of attention kernels" in kernels
    too_large = plan_report.format_plan(
        made(error="RESOURCE_EXHAUSTED: (33.37G) exceeds", needed=int(33.37 * plans.GIB)), config_of()
    )
    assert "33.37 of 15.75 usable: DOES NOT FIT\n\nRESOURCE_EXHAUSTED: (33.37G) exceeds" in too_large
    assert "ESTIMATE" not in too_large


# --- sweeps ---


def test_sizes_of_the_fsdp_axis():
    assert plan_report.fsdp_sizes(256) == [1, 16, 256]
    assert plan_report.fsdp_sizes(8) == [1, 2, 8]
    assert plan_report.fsdp_sizes(12) == [1, 3, 12]
    assert plan_report.fsdp_sizes(1) == [1]
    assert plan_report.fsdp_sizes(7) == [1, 7]


@pytest.fixture
def swept(monkeypatch):
    """Sweeps with made-up memory: fits where state / fsdp + activations of the remat level stay under the limit."""

    def plan(config, devices, chip, compiler):
        m, train = config.mesh, config.train
        activations = {"none": 20, "dots": 12, "full": 4}[train.remat] - train.scan_blocks
        seconds = {"none": 1.0, "dots": 1.1, "full": 1.3}[train.remat] + (0.2 if train.scan_blocks else 0) + 0.1 * m.tensor
        memory = Memory(24 * plans.GIB // m.fsdp, 0, 0, 0, activations * plans.GIB)
        one = made(model_flops=1.0, step_flops=seconds * 197e12)
        return dataclasses.replace(
            one,
            chip=chip,
            memory=memory,
            mesh=dataclasses.asdict(m),
            remat=train.remat,
            scan=train.scan_blocks,
            batch_size=train.batch_size,
        )

    monkeypatch.setattr(plan_report, "plan", plan)
    return lambda config, n=8: list(plan_report.sweep_plans(config, [None] * n, CHIPS["v5e"], "TPU"))


def test_a_sweep_climbs_until_it_fits_and_lists_the_fastest_first(swept):
    plans_made = swept(config_of(batch=64))
    assert len(plans_made) == len({(str(p.mesh), p.remat, p.scan) for p in plans_made})
    one = [(p.mesh["fsdp"], p.remat, p.fits) for p in plans_made if p.mesh["tensor"] == 1 and p.scan]
    assert one == [  # a level that was too large on the mesh before is not tried again
        (8, "none", False), (8, "dots", True), (2, "dots", False), (2, "full", True), (1, "full", False),
    ]  # fmt: skip
    lines = plan_report.format_sweep(plans_made).splitlines()
    assert lines[0].startswith(f"{sum(p.fits for p in plans_made)} of {len(plans_made)} compiled combinations fit")
    seconds = [float(line.split()[6]) for line in lines[2:]]
    assert len(seconds) == sum(p.fits for p in plans_made) and seconds == sorted(seconds)
    assert lines[2].split()[:5] == ["1", "8", "1", "dots", "unrolled"]


def test_a_sweep_keeps_to_meshes_that_divide_the_batch(swept):
    meshes = {(p.mesh["data"] * p.mesh["fsdp"], p.mesh["tensor"]) for p in swept(config_of(batch=4))}
    assert meshes == {(4, 2), (2, 4)}
    with pytest.raises(ConfigError, match="batch_size=3 is not divisible for any mesh of 8 devices; use a multiple of 8"):
        swept(config_of(batch=3))


def test_a_sweep_without_a_fit_fails(swept, monkeypatch):
    monkeypatch.setattr(
        plan_report, "target", lambda topology, devices: (dataclasses.replace(CHIPS["v5e"], usable_gib=1.0), [None] * 8, "TPU")
    )
    out = io.StringIO()
    assert plan_report.run(config_of(batch=64), "v5e:2x4", 0, True, out) == 1
    assert "Nothing fits" in out.getvalue() and "does not fit:" in out.getvalue()


# --- real compilers ---

SCRIPT = """
import sys
from icar_jax.config import ClipConfig, ExperimentConfig, MeshConfig, TrainConfig
from icar_jax.models import variants
from icar_jax.planner.report import run
variants.CLIP["vit_nano"] = variants._clip((32, 16, 32, 2, 2, 64), (32, 1, 2), 16)
config = ExperimentConfig(
    clip=ClipConfig(variant="vit_nano", exits=(1,)), train=TrainConfig(batch_size=16), mesh=MeshConfig(2, 4, 1)
)
print("status", run(config, {topology!r}, {devices}, False, sys.stdout))
"""


def plan_in_a_process(topology, devices):
    """The report on a model of two blocks, cut over eight devices; in a new process, as jax makes its devices once."""
    # Nothing of the program runs: machine code need not be good.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    script = SCRIPT.format(topology=topology, devices=devices)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0] == "vit_nano, exits after 1, 2 blocks, text vocabulary 49408"
    assert "mesh data 2 x fsdp 4 x tensor 1; 16 pairs per step, 2 per chip" in done.stdout
    return done.stdout


@pytest.mark.check
def test_a_plan_on_eight_cpu_devices():
    report = plan_in_a_process("h100", 8)
    assert "8 x h100, each simulated by a CPU device" in report and "by the CPU compiler" in report
    assert "all-gather" in report and "all-reduce" in report and "cycle estimates" not in report
    assert "of 78 usable: fits" in report and report.splitlines()[-1] == "status 0"


@pytest.mark.check
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")
def test_a_plan_by_the_tpu_compiler():
    report = plan_in_a_process("v5e:2x4", 0)
    assert "TPU compiler" in report and "its cycle estimates" in report and "all-reduce" in report
    assert "of 15.75 usable: fits" in report and report.splitlines()[-1] == "status 0"
