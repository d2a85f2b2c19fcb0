"""Images per second of the image towers and the router, compared with the official PyTorch implementation in the same run.

    python benchmarks/inference.py [--quick] [--towers vit_b16 vit_l14] [--batch 4] [--batches 2] [--repeats 3]
        [--json docs/results/inference.json]

Both use the same random weights and the same images in memory. On CPU their passes are interleaved and the fastest pass of each
counts, since other load only adds time; compare numbers within a run. Float32 embeddings of both must agree.

Numbered columns are one tower after that many blocks, `scores` is the complexity model (ConvNeXtV2-tiny at 224), `routed` is
scoring and encoding with half of the images at the early exit (6 of 12 blocks, 13 of 24). PyTorch's router splits each batch
by a boolean mask, as the official evaluator does; ours has one queue per exit. `of ideal` is the speed of `routed` relative to
the sum of its parts, each on full batches. PyTorch's rows need torch: float32, bf16 autocast, and bf16 weights.

GFLOP/s are counted FLOPs of the full tower (2 x multiply-accumulates) over time; `of product` is their fraction of the fastest
single product of square matrices, in JAX or PyTorch, which is close to the upper limit. On an accelerator there are no PyTorch
rows, more exits, and larger batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from icar_jax import architectures, pytree
from icar_jax.config.schema import ClipConfig
from icar_jax.inference.forward import Forward
from icar_jax.inference.router import OneExit, Router
from icar_jax.models import variants
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.encoders import unit_norm
from icar_jax.models.flops import router_flops, vision_flops
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.vision import VisionArch, VisionTower
from icar_jax.models.xla_options import has_bf16_instructions, jit_for_host

CLIP_MEAN = CLIP_STD = (0.5, 0.5, 0.5)
ICC_MEAN, ICC_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EARLY = {"vit_b32": 6, "vit_b16": 6, "vit_l14": 13}
MORE_EXITS = {"vit_b32": (3, 6, 9), "vit_b16": (3, 6, 9), "vit_l14": (9, 13, 17, 21)}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
TORCH_MODES = ("f32", "bf16 autocast", "bf16 weights")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
TOLERANCE = 1e-4  # largest difference of unit-norm float32 embeddings
Runs = dict[str, Callable[[int], np.ndarray]]  # by name; the argument is the number of batches
Timed = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Case:
    """One tower and its images uint8 [N, S, S, 3]; every second image has a first value of 255 and goes to full depth."""

    name: str
    arch: VisionArch
    early: int  # exit of half of the routed images
    scorer: ComplexityArch
    batch: int
    batches: int

    @cached_property
    def tower(self) -> Graph[VisionTower]:
        return VisionTower.graph(self.arch)

    @cached_property
    def params(self) -> dict[str, Any]:
        """Float32 parameters of the tower and the scorer: repeated random numbers, since drawing all of them takes long."""
        numbers = 0.02 * np.random.default_rng(1).standard_normal(1_000_003, np.float32)
        leaf = lambda path, s: jnp.asarray(np.resize(numbers, s.shape) + np.float32(path.endswith("scale")))
        shapes = {"tower": self.tower.shapes, "scorer": ComplexityModel.graph(self.scorer).shapes}
        return {name: pytree.map_with_path(leaf, tree) for name, tree in shapes.items()}

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """The images in batches."""
        side = self.arch.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (self.batches * self.batch, side, side, 3), dtype=np.uint8)
        pixels[:, 0, 0, 0] = 255 * (np.arange(len(pixels)) % 2)
        return np.split(pixels, self.batches)


def jax_runs(case: Case, dtype: Any) -> tuple[Runs, float]:
    """Returns the timed functions of this package by name, and the compilation time in seconds."""
    full, early = case.arch.depth, case.early
    vision, complexity = VisionTower.graph(case.arch, dtype=dtype), ComplexityModel.graph(case.scorer, dtype=dtype)

    def tower(exit: int) -> Forward:
        def embed(params: Any, pixels: jax.Array) -> jax.Array:
            images = normalise(pixels, CLIP_MEAN, CLIP_STD)
            return unit_norm(vision(params, images, (exit,))[exit])

        return Forward(embed, case.params["tower"], (case.batch,))

    def score(params: Any, pixels: jax.Array) -> jax.Array:
        # A float times zero may be NaN, so the compiler cannot eliminate the score.
        value = complexity.score(params, normalise(pixels, ICC_MEAN, ICC_STD))
        return pixels[:, 0, 0, 0] / 255 + 0 * value

    towers = {exit: tower(exit) for exit in case.arch.all_exits}
    scorer = Forward(score, case.params["scorer"], (case.batch,))
    start = time.perf_counter()
    for forward in (*towers.values(), scorer):
        forward.warm_up(case.parts[0].shape[1:], np.uint8)
    compile_s = time.perf_counter() - start
    router = Router({exit: towers[exit] for exit in (early, full)}, scorer, (0.5,), case.batch)

    def embed(way: OneExit | Router) -> Callable[[int], np.ndarray]:
        return lambda n: way.embed_batches([(part, part) for part in case.parts[:n]], case.arch.embed_dim).embeddings

    def scores(n: int) -> np.ndarray:
        return np.concatenate([pending.result() for pending in [scorer.submit(part) for part in case.parts[:n]]])

    runs = {str(exit): embed(OneExit(exit, forward)) for exit, forward in towers.items()}
    return runs | {"scores": scores, "routed": embed(router)}, compile_s


def torch_runs(case: Case) -> dict[str, Runs]:
    """Returns the timed PyTorch functions by mode and name; modes share weights where possible."""
    import torch
    import torch_towers

    full, early = case.arch.depth, case.early
    made = {"f32": [], "bf16 weights": []}
    for dtype, modules in zip((torch.float32, torch.bfloat16), made.values()):
        with torch.device("meta"):  # weights are loaded, not initialised
            vision, scorer = torch_towers.Vision(case.arch), torch_towers.Complexity(case.scorer.backbone)
        modules.append(torch_towers.load(vision, case.params["tower"]).to(dtype))
        modules.append(torch_towers.load(scorer, case.params["scorer"]).to(dtype))
    made["bf16 autocast"] = made["f32"]
    planes = [torch.from_numpy(part).permute(0, 3, 1, 2).contiguous() / 255 for part in case.parts]

    def runs(mode: str) -> Runs:
        vision, scorer = made[mode]
        parts = [part.to(torch.bfloat16) for part in planes] if mode == "bf16 weights" else planes

        def each(function: Callable) -> Callable[[int], np.ndarray]:
            def run(n: int) -> np.ndarray:
                autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16 autocast")
                with torch.inference_mode(), autocast:
                    return torch.cat([function(part).float() for part in parts[:n]]).numpy()

            return run

        towers = {str(exit): each(lambda part, exit=exit: vision(part, exit)) for exit in (early, full)}
        masked = each(lambda part: torch_towers.routed(vision, scorer, part, early, full))
        return towers | {"scores": each(scorer), "routed": masked}

    return {mode: runs(mode) for mode in TORCH_MODES}


def interleave(runs: dict[str, Runs], batches: int, repeats: int, title: str) -> tuple[Timed, dict[str, np.ndarray]]:
    """Returns the seconds of every pass, and the results of `routed`, by row; passes of different rows are interleaved.

    One warm-up batch is not timed. A row that takes over twice as long as the fastest in the first round is not repeated.
    """
    names = list(next(iter(runs.values())))
    seconds: Timed = {row: {name: [] for name in names} for row in runs}
    routed = {}
    for name in tqdm(names, desc=title, unit="run"):
        for functions in runs.values():
            functions[name](1)
        for repeat in range(repeats):
            fastest = min(min(named[name], default=0.0) for named in seconds.values())
            for row, functions in runs.items():
                if repeat and seconds[row][name][0] > 2 * fastest:
                    continue
                start = time.perf_counter()
                result = functions[name](batches)
                seconds[row][name].append(time.perf_counter() - start)
                if name == "routed":
                    routed[row] = result
    return seconds, routed


def product_flops(with_torch: bool) -> dict[str, float]:
    """Returns FLOP/s of one product of square matrices by framework and dtype, as a measure of the device's peak."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    products: dict[str, Callable[[], Any]] = {}
    for key, dtype in DTYPES.items():
        a = jnp.ones((size, size), dtype)
        product = jit_for_host(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
        products[f"jax {key}"] = lambda a=a, product=product: product(a).block_until_ready()
    if with_torch:
        import torch

        for key, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.ones(size, size, dtype=dtype)
            products[f"torch {key}"] = lambda a=a: a @ a
    best = dict.fromkeys(products, float("inf"))
    for repeat in range(5):
        for name, product in products.items():
            start = time.perf_counter()
            product()
            if repeat:  # the first call compiles
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: 2 * size**3 / seconds for name, seconds in best.items()}


def benchmark_tower(case: Case, repeats: int, with_torch: bool) -> list[dict[str, Any]]:
    """Returns one row per framework and dtype. Raises SystemExit if PyTorch's embeddings differ from ours."""
    runs, compiled = {}, {}
    if with_torch:
        runs |= {f"torch {mode}": functions for mode, functions in torch_runs(case).items()}
    for key, dtype in DTYPES.items():
        runs[f"jax {key}"], compiled[f"jax {key}"] = jax_runs(case, dtype)
    seconds, routed = interleave(runs, case.batches, repeats, case.name)
    if with_torch:
        apart = float(np.abs(routed["torch f32"] - routed["jax f32"]).max())
        if not apart < TOLERANCE:
            raise SystemExit(f"{case.name}: float32 embeddings of JAX and PyTorch differ by {apart:.1e}, more than {TOLERANCE}")
    images, full, early = case.batch * case.batches, str(case.arch.depth), str(case.early)
    rates = {row: {name: images / min(times) for name, times in named.items()} for row, named in seconds.items()}
    rows = []
    for row, rate in rates.items():
        ideal = 1 / (0.5 / rate[early] + 0.5 / rate[full] + 1 / rate["scores"])
        record = {"tower": case.name, "row": row, "images_per_s": rate, "seconds": seconds[row]}
        record |= {"speed_up": rate["routed"] / rate[full], "routed_to_ideal": rate["routed"] / ideal}
        record["flops_per_s"] = {name: vision_flops(case.arch, int(name)) * rate[name] for name in rate if name.isdigit()}
        record["flops_per_s"]["scores"] = router_flops(case.scorer) * rate["scores"]
        if row in compiled:
            record["compile_s"] = compiled[row]
        if with_torch:
            best_bf16 = {name: max(rates[f"torch {mode}"][name] for mode in TORCH_MODES[1:]) for name in rate}
            record["to_torch_f32"] = {name: rate[name] / rates["torch f32"][name] for name in rate}
            record["to_best_torch_bf16"] = {name: rate[name] / best_bf16[name] for name in rate}
        rows.append(record)
    return rows


def print_table(rows: list[dict[str, Any]], peak: float) -> None:
    """Prints the rows of one tower."""
    exits = [name for name in rows[0]["images_per_s"] if name.isdigit()]
    columns = [*sorted(exits, key=int), "scores", "routed"]
    title = "".join(f"{name + ' blocks' if name.isdigit() else name:>11}" for name in columns)
    ratios = f"{'x torch f32':>12}{'x best bf16':>12}" if "to_torch_f32" in rows[0] else ""
    print(f"{rows[0]['tower'] + ', images/s':<22}{title}{'of ideal':>10}{'GFLOP/s':>9}{'of product':>11}{ratios}")
    for row in rows:
        full = max(exits, key=int)
        line = f"{row['row']:<22}" + "".join(f"{row['images_per_s'][name]:11.2f}" for name in columns)
        flops = row["flops_per_s"][full]
        line += f"{row['routed_to_ideal']:10.1%}{flops / 1e9:9.0f}{flops / peak:11.1%}"
        if ratios:
            line += f"{row['to_torch_f32'][full]:12.2f}{row['to_best_torch_bf16'][full]:12.2f}"
        print(line)


def device() -> dict[str, Any]:
    """Describes the machine; for a CPU also the instruction sets that determine the speed of matrix products."""
    about: dict[str, Any] = {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind}
    cpuinfo = Path("/proc/cpuinfo")
    if jax.default_backend() == "cpu" and cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        present = fields.get("flags", fields.get("Features", "")).split()
        about |= {"kind": fields.get("model name", platform.machine()), "flags": [f for f in CPU_FLAGS if f in present]}
        about |= {"cores": os.cpu_count(), "bf16_instructions": has_bf16_instructions()}
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT-B/32 and the smallest ConvNeXt, one round, as a smoke test")
    parser.add_argument("--towers", nargs="+", choices=sorted(EARLY), default=["vit_b16", "vit_l14"])
    parser.add_argument("--batch", type=int, help="images per batch; 4 on CPU, else 128")
    parser.add_argument("--batches", type=int, help="batches per pass, an even number; 2 on CPU, else 16")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    batch, batches = args.batch or (4 if on_cpu else 128), args.batches or (2 if on_cpu else 16)
    if args.quick:
        args.towers, batch, batches, args.repeats = ["vit_b32"], 4, 2, 1
    if batch < 1 or batches < 2 or batches % 2 or args.repeats < 1:
        parser.error(
            f"--batch {batch} and --repeats {args.repeats} must be at least 1, --batches {batches} even and at least 2"
        )
    backbone = variants.CONVNEXT["convnextv2_atto" if args.quick else "convnextv2_tiny"]
    scorer = ComplexityArch(backbone, "classification", 224)
    with_torch = on_cpu and find_spec("torch") is not None
    if on_cpu and not with_torch:
        print("without the PyTorch rows: they need torch")
    versions = {name: version(name) for name in ("jax", "torch") if name == "jax" or with_torch}
    about = {"benchmark": "inference", "device": device(), "versions": versions, "batch": batch, "images": batch * batches}
    peaks = product_flops(with_torch)
    about["product_flops_per_s"] = peaks
    print(json.dumps(about), flush=True)
    rows = []
    for name in args.towers:
        clip = ClipConfig(variant=name, exits=(EARLY[name],) if on_cpu else MORE_EXITS[name])
        case = Case(name, architectures.clip_arch(clip).vision, EARLY[name], scorer, batch, batches)
        rows += benchmark_tower(case, args.repeats, with_torch)
        print_table([row for row in rows if row["tower"] == name], max(peaks.values()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
