"""`icar plan`: compiles one step or a sweep of steps and prints memory, work and estimated time per chip."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TextIO

from icar_jax.config import ConfigError, ExperimentConfig, MeshConfig
from icar_jax.models.transformer import REMAT
from icar_jax.planner.chips import Chip, target
from icar_jax.planner.plan import GIB, Plan, checked, plan
from icar_jax.training.tasks.clip import ClipRun
from icar_jax.training.tasks.kinds import kind_of

TENSOR = (1, 2, 4)


def run(config: ExperimentConfig, topology: str, devices: int, sweep: bool, out: TextIO) -> int:
    """Prints the plan of `config` for a slice ('v5e:16x16') or for `devices` CPU devices; returns the exit status.

    The status is 0 if the step (in a sweep: any step) fits, else 1. See `chips.target` for `topology` and `devices`. Raises
    ConfigError and PlanError.
    """
    config = checked(config)
    chip, found, compiler = target(topology, devices)
    if sweep:
        plans = []
        print(f"sweep for {len(found)} x {chip.name}; each line is one compilation", file=out, flush=True)
        for made in sweep_plans(config, found, chip, compiler):
            plans.append(made)
            print(f"  {_choice(made)}: {_outcome(made)}", file=out, flush=True)
        print("\n" + format_sweep(plans), file=out)
        return 0 if any(p.fits for p in plans) else 1
    made = plan(config, found, chip, compiler)
    print(format_plan(made, config, topology), file=out)
    return 0 if made.fits else 1


# --- one plan ---


def format_plan(made: Plan, config: ExperimentConfig, topology: str = "") -> str:
    """Returns the report of one plan as text: memory, work and time per chip."""
    lines = [*_heading(made, config, topology), "", *_memory_lines(made)]
    if not made.error:
        lines += ["", *_work_lines(made), "", *_time_lines(made)]
    return "\n".join(lines)


def _heading(made: Plan, config: ExperimentConfig, topology: str) -> list[str]:
    c, per_chip = config, made.batch_size / made.devices
    kind = kind_of(c)
    if isinstance(kind, ClipRun):
        arch = kind.arch(None)
        exits = ", ".join(map(str, arch.vision.all_exits))
        what = f"{c.clip.variant}, exits after {exits} blocks, text vocabulary {arch.text.vocabulary}"
        loss = f"{c.loss.kind} loss {f'in chunks of {c.loss.chunk} texts' if c.loss.chunk else 'over all logits at once'}"
    else:
        what, loss = f"complexity model on {c.complexity.variant}", c.complexity.head
    options = [f"remat {made.remat}", "scanned blocks" if made.scan else "unrolled blocks", loss]
    if c.train.accumulate > 1:
        options.append(f"accumulated over {c.train.accumulate} parts")
    where = f"{made.devices} x {made.chip.name}"
    if made.compiler == "CPU":
        where += (
            f", each simulated by a CPU device{'' if topology else f' (use --topology for other chips than {made.chip.name})'}"
        )
    return [
        what,
        f"{where}: mesh {_mesh(made)}; {made.batch_size} pairs per step, {per_chip:g} per chip; {', '.join(options)}",
        f"{made.compiler} compiler: {made.compile_s:.0f} s ({made.compile_cpu_s:.0f} s of processor time), "
        f"after {made.lower_s:.0f} s of tracing",
    ]


def _memory_lines(made: Plan) -> list[str]:
    m, usable = made.memory, made.chip.usable_gib
    source = "" if made.compiler == "TPU" else ", by the CPU compiler, which lays out and fuses differently"
    rows = [("parameters", m.params), ("optimizer state", m.optimizer)]
    rows += [("moving average", m.ema)] if m.ema else []
    rows += [("batch", m.batch)]
    if not made.error:
        rows += [("activations and temporaries", m.temporaries), ("program, padding", m.other)]
    lines = [f"memory per chip in GiB{source}", *(f"  {name:<28}{size / GIB:8.2f}" for name, size in rows)]
    verdict = "fits" if made.fits else "DOES NOT FIT"
    if made.error:
        needed = f"  {'total (compiler)' if m.needed else 'total without activations':<28}{m.total / GIB:8.2f}"
        return [*lines, f"{needed} of {usable:g} usable: {verdict}", "", *made.error.strip().splitlines()]
    return [*lines, f"  {'total':<28}{m.total / GIB:8.2f} of {usable:g} usable: {verdict}"]


def _work_lines(made: Plan) -> list[str]:
    again = made.step_flops - made.model_flops
    lines = [
        "work per chip and step",
        f"  {'model':<20}{made.model_flops / 1e12:12.2f} TFLOP, forward and backward",
        f"  {'recomputation':<20}{again / 1e12:12.2f} TFLOP",
        f"  {'memory traffic':<20}{made.traffic_bytes / GIB:12.2f} GiB",
    ]
    for c in made.collectives:
        lines.append(f"  {c.kind:<20}{c.sent_bytes / GIB:12.3f} GiB sent in {c.count} collectives")
    if not made.collectives:
        lines.append("  no collectives")
    if made.unknown_loops:
        lines.append(f"  {made.unknown_loops} loops with unknown trip count are counted once")
    return lines


def _time_lines(made: Plan) -> list[str]:
    chip = made.chip
    lines = [
        "roofline, seconds per step",
        f"  {'compute':<20}{made.compute_s:12.4f} at {chip.bf16_flops / 1e12:g} TFLOP/s (bf16)",
        f"  {'memory':<20}{made.memory_s:12.4f} at {chip.hbm_bytes_s / 1e9:g} GB/s",
        f"  {'links':<20}{made.links_s:12.4f} at {chip.link_bytes_s / 1e9:g} GB/s",
        f"  {'bound':<20}{made.roofline_s:12.4f}: at most {made.batch_size / made.roofline_s:,.0f} pairs/s",
    ]
    if made.schedule_s:
        without = f", without {made.kernels} runs of attention kernels" if made.kernels else ""
        estimates = f"sum of its cycle estimates at {chip.clock_hz / 1e9:g} GHz{without}"
        lines.append(f"  {'compiler':<20}{made.schedule_s:12.4f}: {estimates}")
    return [
        *lines,
        f"ESTIMATE, not a measurement: {made.step_s:.3f} s per step, {made.pairs_per_s:,.0f} pairs/s on {made.devices} chips, "
        f"{made.peak_share:.0%} of the bf16 peak",
    ]


def _mesh(made: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in made.mesh.items())


# --- a sweep ---


def sweep_plans(config: ExperimentConfig, devices: list, chip: Chip, compiler: str) -> Iterator[Plan]:
    """Yields plans over mesh shapes, remat and scanned blocks, in the order of compilation.

    For each size of the tensor axis, scanned and unrolled, fsdp goes from large to small. For each mesh, remat starts at the
    level the previous mesh needed and increases until the step fits. Temporaries hardly depend on how data and fsdp share the
    devices, so a level that did not fit before would not fit now, and a stronger level than needed is only slower.

    Raises ConfigError if the batch size fits none of the meshes.
    """
    has_options = kind_of(config).trains_clip  # complexity models support neither scan nor remat
    ways, levels = ([True, False], REMAT) if has_options else ([False], REMAT[:1])
    tried = False
    for tensor in (t for t in TENSOR if len(devices) % t == 0):
        for scan in ways:
            level = 0
            for fsdp in reversed(fsdp_sizes(len(devices) // tensor)):
                data = len(devices) // tensor // fsdp
                if config.train.batch_size % (data * fsdp * config.train.accumulate):
                    continue
                for level in range(level, len(levels)):
                    tried = True
                    made = plan(_with(config, MeshConfig(data, fsdp, tensor), levels[level], scan), devices, chip, compiler)
                    yield made
                    if made.fits:
                        break
    if not tried:
        raise ConfigError(
            f"config.train.batch_size={config.train.batch_size} is not divisible for any mesh of {len(devices)} devices; "
            f"use a multiple of {len(devices) * config.train.accumulate}"
        )


def fsdp_sizes(devices: int) -> list[int]:
    """Returns the sizes of the fsdp axis that a sweep tries: 1, the divisor closest to the square root, and all devices."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    if len(divisors) <= 3:
        return divisors
    middle = min(divisors[1:-1], key=lambda d: abs(d - devices // d))
    return [1, middle, devices]


def _with(config: ExperimentConfig, mesh: MeshConfig, remat: str, scan: bool) -> ExperimentConfig:
    train = dataclasses.replace(config.train, remat=remat, scan_blocks=scan)
    return dataclasses.replace(config, mesh=mesh, train=train)


def format_sweep(plans: list[Plan]) -> str:
    """Returns a table of the plans that fit, sorted by estimated time, then by memory."""
    fit = sorted((p for p in plans if p.fits), key=lambda p: (p.step_s, p.memory.total))
    if not fit:
        return (
            f"Nothing fits: {len(plans)} combinations were compiled. Use a smaller batch per chip, a larger "
            "config.train.accumulate, config.loss.chunk, or more chips."
        )
    source = "" if fit[0].compiler == "TPU" else "; memory by the CPU compiler"
    heads = ("data", "fsdp", "tensor", "remat", "blocks", "GiB", "s/step", "pairs/s", "of peak", "compile s")
    rows = [
        (*map(str, p.mesh.values()), p.remat, "scanned" if p.scan else "unrolled", f"{p.memory.total / GIB:.2f}",
         f"{p.step_s:.4f}", f"{p.pairs_per_s:,.0f}", f"{p.peak_share:.0%}", f"{p.compile_s:.0f}")
        for p in fit
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (heads, *rows)]
    usable = fit[0].chip.usable_gib
    return "\n".join(
        [f"{len(fit)} of {len(plans)} compiled combinations fit {usable:g} GiB; ESTIMATES, fastest first{source}", *table]
    )


def _choice(made: Plan) -> str:
    return f"{_mesh(made)}, remat {made.remat}, {'scanned' if made.scan else 'unrolled'}"


def _outcome(made: Plan) -> str:
    size = f"{made.memory.total / GIB:.2f} of {made.chip.usable_gib:g} GiB"
    return f"{size}, {made.step_s:.4f} s per step" if made.fits else f"does not fit: {size}"
