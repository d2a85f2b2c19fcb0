"""Images per second of image towers with token reduction, against what the counted FLOPs allow, beside PyTorch in one run.

    python benchmarks/token_reduction.py [--quick] [--towers vit_b16 vit_l14] [--removed 8 16] [--dtype f32] [--batch 8]
        [--repeats 5] [--json docs/results/token_reduction.json]

Rows are ToMe, CrossGET (image tower) and dropping, each removing so many tokens a block; dropping removes as many in all, after
a third of the blocks. ViT-L/14 has twice the blocks, so it removes half as many a block. `allowed` is the speed-up if time were
counted FLOPs, `of allowed` is the measured speed-up over it. PyTorch has ToMe and CrossGET with sorting and scattering, as
published, with the same random weights and the same images; float32 embeddings of both must agree.

Passes of all rows are interleaved and the fastest of each counts, since other load only adds time; compare numbers of one run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import inference
import jax
import numpy as np
from tqdm import tqdm

from icar_jax.inference.forward import Forward
from icar_jax.models import variants
from icar_jax.models.clip import unit_norm
from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.flops import vision_flops
from icar_jax.models.ops import normalise
from icar_jax.models.reduction_plan import reduced_vision
from icar_jax.models.vision import VisionArch, VisionTower

METHODS = ("tome", "crossget", "drop")
HALVED = ("vit_l14", "vit_l14_336")  # twice the blocks
TOLERANCE = 2e-4  # largest difference of unit-norm float32 embeddings
Run = Callable[[], np.ndarray]


def archs(tower: str, removed: list[int]) -> dict[tuple[str, int], VisionArch]:
    """{(method, tokens removed a block): architecture}; ('none', 0) is the tower as it is."""
    base = variants.CLIP[tower].vision
    found = {("none", 0): base}
    for each in removed:
        count = each // 2 if tower in HALVED else each
        for method in METHODS:
            total = (min(count * base.depth, base.grid**2 - 1),) if method == "drop" else (count,)
            found[method, count] = reduced_vision(base, method, total)
    return found


def jax_run(case: inference.Case, dtype: Any) -> Run:
    """The images embedded by this package, compiled."""
    vision = VisionTower.graph(case.arch, dtype=dtype)

    def embed(params: Any, pixels: jax.Array) -> jax.Array:
        images = normalise(pixels, inference.CLIP_MEAN, inference.CLIP_STD)
        return unit_norm(vision(params, images, (case.arch.depth,))[case.arch.depth])

    forward = Forward(embed, params_of(case), (case.batch,))
    forward.warm_up(case.parts[0].shape[1:], np.uint8)
    return lambda: forward(case.parts[0])


def params_of(case: inference.Case) -> dict[str, Any]:
    """Random parameters, the same for every method."""
    params = case.params["tower"]
    return params if case.arch.has_cross else {name: leaf for name, leaf in params.items() if name != "cross"}


def torch_run(case: inference.Case, dtype_name: str) -> Run:
    """The same by PyTorch."""
    import torch
    import torch_reduction
    import torch_towers

    with torch.device("meta"):
        made = torch_reduction.Reduced(case.arch)
    dtype = torch.float32 if dtype_name == "f32" else torch.bfloat16
    module = torch_towers.load(made, params_of(case)).to(dtype)
    planes = (torch.from_numpy(case.parts[0]).permute(0, 3, 1, 2).contiguous() / 255).to(dtype)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return module(planes, case.arch.depth).float().numpy()

    return run


def measure(runs: dict[Any, Run], repeats: int, title: str) -> tuple[dict[Any, float], dict[Any, np.ndarray]]:
    """({row: seconds of its fastest pass}, {row: embeddings}); passes of all rows are interleaved."""
    best = dict.fromkeys(runs, float("inf"))
    found = {name: run() for name, run in runs.items()}
    for _ in tqdm(range(repeats), desc=title, unit="round"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best, found


def benchmark_tower(tower: str, args: argparse.Namespace, with_torch: bool) -> list[dict[str, Any]]:
    """Rows of one tower. Raises SystemExit if PyTorch's float32 embeddings differ from ours."""
    wanted = archs(tower, args.removed)
    scorer = ComplexityArch(variants.CONVNEXT["convnextv2_atto"], "classification", 224)
    runs: dict[tuple[str, str, int], Run] = {}
    for (method, count), arch in wanted.items():
        case = inference.Case(tower, arch, arch.depth, scorer, args.batch, 1)
        runs["jax", method, count] = jax_run(case, inference.DTYPES[args.dtype])
        if with_torch and method != "drop":
            runs["torch", method, count] = torch_run(case, args.dtype)
    seconds, found = measure(runs, args.repeats, tower)
    rows = []
    for (framework, method, count), took in seconds.items():
        arch = wanted[method, count]
        speed_up = seconds[framework, "none", 0] / took
        allowed = vision_flops(wanted["none", 0]) / vision_flops(arch)
        row = {
            "tower": tower, "framework": framework, "method": method, "removed": count, "dtype": args.dtype,
            "tokens_left": arch.tokens_after(arch.depth), "gflops": vision_flops(arch) / 1e9,
            "images_per_s": args.batch / took, "speed_up": speed_up, "allowed": allowed, "of_allowed": speed_up / allowed,
        }  # fmt: skip
        if ("torch", method, count) in seconds and framework == "jax":
            row["to_torch"] = seconds["torch", method, count] / took
            apart = float(np.abs(found["torch", method, count] - found["jax", method, count]).max())
            row["apart"] = apart
            if args.dtype == "f32" and not apart < TOLERANCE:
                raise SystemExit(f"{tower} {method} {count}: float32 embeddings of JAX and PyTorch differ by {apart:.1e}")
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of one tower."""
    tower, dtype = rows[0]["tower"], rows[0]["dtype"]
    print(f"{tower + ', ' + dtype:<30}{'tokens':>7}{'GFLOP':>8}{'images/s':>10}{'speed-up':>10}{'allowed':>9}{'of allowed':>12}"
          f"{'x torch':>9}")  # fmt: skip
    for row in rows:
        name = f"{row['framework']} {row['method']}" + (f", {row['removed']} a block" if row["method"] != "none" else "")
        torch = f"{row['to_torch']:9.2f}" if "to_torch" in row else ""
        print(f"{name:<30}{row['tokens_left']:7d}{row['gflops']:8.2f}{row['images_per_s']:10.2f}{row['speed_up']:10.2f}"
              f"{row['allowed']:9.2f}{row['of_allowed']:12.1%}{torch}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT-B/32, one round, as a smoke test")
    parser.add_argument("--towers", nargs="+", choices=sorted(variants.CLIP), default=["vit_b16", "vit_l14"])
    parser.add_argument("--removed", nargs="+", type=int, default=[8, 16], help="tokens removed a block (8 16)")
    parser.add_argument("--dtype", choices=sorted(inference.DTYPES), default="f32", help="of activations (f32)")
    parser.add_argument("--batch", type=int, help="images per batch; 8 on CPU, else 128")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    args.batch = args.batch or (8 if on_cpu else 128)
    if args.quick:
        args.towers, args.removed, args.batch, args.repeats = ["vit_b32"], [2], 2, 1
    if args.batch < 1 or args.repeats < 1 or min(args.removed) < 1:
        parser.error(f"--batch {args.batch}, --repeats {args.repeats} and --removed {args.removed} must be at least 1")
    with_torch = on_cpu and find_spec("torch") is not None
    if on_cpu and not with_torch:
        print("without the PyTorch rows: they need torch")
    versions = {name: version(name) for name in ("jax", "torch") if name == "jax" or with_torch}
    about = {"benchmark": "token_reduction", "device": inference.device(), "versions": versions, "batch": args.batch}
    print(json.dumps(about), flush=True)
    rows = []
    for tower in args.towers:
        own = benchmark_tower(tower, args, with_torch)
        print_table(own)
        rows += own
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
