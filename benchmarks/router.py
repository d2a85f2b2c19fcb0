"""Routed images per second, compared with full depth and with the limit set by the counted FLOPs of towers and router.

    python benchmarks/router.py [--quick] [--towers vit_b16 vit_l14] [--batch 16] [--images 128] [--repeats 3]
        [--dtype float32] [--scorers atto@112 nano@224] [--json docs/results/router.json]

Random weights, preprocessed pixels in memory, one early exit (after 6 of 12 blocks, 13 of 24). The complexity model runs, but
random scores replace its own, which would be nearly equal with random weights; half of the images leave early. Everything is
compiled first. The runs of one tower are interleaved, and the fastest pass of each counts, since other load only adds time.

Two bounds: `ideal by FLOPs` is full depth's counted cost over that of the routed images and their scores; `ideal by parts` is
the speed of the same work with each part timed alone on full batches. They differ because FLOPs of the complexity model are
slower; the gap to the second bound is the cost of queues, copies, padding and waiting.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from icar_jax import architectures
from icar_jax.config.schema import ClipConfig
from icar_jax.inference.budgets import counted_costs
from icar_jax.inference.forward import Forward
from icar_jax.inference.router import OneExit, Router, RoutingResult
from icar_jax.models import variants
from icar_jax.models.clip import Clip
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.ops import normalise

EXITS = {"vit_b32": 6, "vit_b16": 6, "vit_l14": 13}
MEAN = STD = (0.5, 0.5, 0.5)


def random_weights(shapes: Any) -> Any:
    """Returns random weights, small enough for finite activations."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) * 0.02), shapes)


def interleave(
    runs: dict[str, Callable[[], RoutingResult]], repeats: int, title: str
) -> dict[str, tuple[float, RoutingResult]]:
    """Returns the fastest pass of each run in seconds, and its result; the first pass of each is a warm-up."""
    best: dict[str, tuple[float, RoutingResult]] = {}
    for repeat in tqdm(range(repeats + 1), desc=title, unit="round"):
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            taken = time.perf_counter() - start
            if repeat and (name not in best or taken < best[name][0]):
                best[name] = taken, result
    return best


def benchmark_router(name: str, scorer_name: str, batch: int, images: int, repeats: int, dtype: Any) -> dict[str, Any]:
    """Times one tower with one router such as 'atto@112'; returns images/s, speed-ups and efficiencies."""
    arch = architectures.clip_arch(ClipConfig(variant=name, exits=(EXITS[name],)))
    size, _, scorer_side = scorer_name.partition("@")
    scorer_arch = ComplexityArch(variants.CONVNEXT[f"convnextv2_{size}"], "regression", int(scorer_side))
    clip, scorer = Clip.graph(arch, dtype=dtype), ComplexityModel.graph(scorer_arch, dtype=dtype)
    params, scorer_params = random_weights(clip.shapes), random_weights(scorer.shapes)
    early, full = arch.vision.all_exits

    def tower(exit: int) -> Forward:
        fn = lambda params, pixels: clip.encode_image(params, normalise(pixels, MEAN, STD), exit)
        return Forward(fn, params, (batch,))

    towers = {exit: tower(exit) for exit in (early, full)}

    def drawn_score(params: Any, pixels: jax.Array) -> jax.Array:
        number = jnp.sum(pixels.astype(jnp.int32), axis=(1, 2, 3)) % 1009
        # A float times zero may be NaN, so the compiler cannot eliminate the score.
        return number / 1009 + 0 * scorer.score(params, normalise(pixels, MEAN, STD))

    score = Forward(drawn_score, scorer_params, (batch,))
    side, dim = arch.vision.image_size, arch.vision.embed_dim
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    batches = [
        (part, np.ascontiguousarray(part[:, : scorer_arch.image_size, : scorer_arch.image_size]))
        for part in (pixels[i : i + batch] for i in range(0, images, batch))
    ]
    parts = [part for _, part in batches]
    for forward in towers.values():
        forward.warm_up((side, side, 3), np.uint8)
    score.warm_up(parts[0].shape[1:], np.uint8)
    router = Router(towers, score, (float(np.median(np.concatenate([score(part) for part in parts]))),), batch)

    def scores() -> None:
        for pending in [score.submit(part) for part in parts]:
            pending.result()

    best = interleave(
        {
            "full": lambda: OneExit(full, towers[full]).embed_batches(batches, dim),
            "early": lambda: OneExit(early, towers[early]).embed_batches(batches, dim),
            "scores": scores,
            "routed": lambda: router.embed_batches(batches, dim),
        },
        repeats,
        f"{name}, {scorer_name}",
    )
    seconds = {run: taken for run, (taken, _) in best.items()}
    routed = best["routed"][1]
    share = float(np.mean(routed.exits == early))
    costs = counted_costs(arch, scorer_arch)
    by_flops = 1 / costs.share_of_full({early: share, full: 1 - share})
    by_parts = seconds["full"] / (share * seconds["early"] + (1 - share) * seconds["full"] + seconds["scores"])
    speed_up = seconds["full"] / seconds["routed"]
    return {
        "tower": name, "exit": early, "scorer": scorer_name, "batch": batch, "images": images, "dtype": jnp.dtype(dtype).name,
        "share_early": share,
        "images_per_s": {run: images / taken for run, taken in seconds.items()},
        "flops_per_s": {
            "full": costs.full * images / seconds["full"],
            "early": costs.exits[early] * images / seconds["early"],
            "scores": costs.router * images / seconds["scores"],
        },
        "speed_up": speed_up, "ideal_by_flops": by_flops, "ideal_by_parts": by_parts,
        "efficiency_by_flops": speed_up / by_flops, "efficiency_by_parts": speed_up / by_parts,
        "stats": routed.stats.as_dict(),
    }  # fmt: skip


def report(r: dict[str, Any]) -> str:
    """Formats a record of `benchmark_router`."""
    speed, rate, s = r["images_per_s"], r["flops_per_s"], r["stats"]
    rows = sum(s["rows"].values())
    return "\n".join(
        [
            f"{r['tower']}, exit after {r['exit']} blocks, {r['scorer']}, {r['dtype']}, batch {r['batch']}: "
            f"{r['share_early']:.0%} of {r['images']} images leave early",
            f"  images/s: full {speed['full']:.2f}, early {speed['early']:.2f}, scores {speed['scores']:.2f}, "
            f"routed {speed['routed']:.2f} ({r['speed_up']:.3f} times full depth)",
            "  GFLOP/s: " + ", ".join(f"{name} {value / 1e9:.0f}" for name, value in rate.items()),
            f"  ideal by FLOPs {r['ideal_by_flops']:.3f}: efficiency {r['efficiency_by_flops']:.1%}; "
            f"ideal by parts {r['ideal_by_parts']:.3f}: efficiency {r['efficiency_by_parts']:.1%}",
            f"  padding {sum(s['padding'].values()) / rows:.1%} of the rows, waiting for images "
            f"{s['input_s'] / s['total_s']:.1%} of the time, {s['compilations']} compilations",
        ]
    )


def router_name(text: str) -> str:
    """Checks a router name such as 'atto@112'. Raises ArgumentTypeError."""
    size, _, side = text.partition("@")
    if f"convnextv2_{size}" not in variants.CONVNEXT or not side.isdecimal() or not 32 <= int(side) <= 224:
        raise argparse.ArgumentTypeError(f"expected a ConvNeXt size and 32 to 224 pixels, such as atto@112, found {text!r}")
    return text


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--towers", nargs="+", choices=sorted(EXITS), default=["vit_b16", "vit_l14"])
    p.add_argument("--scorers", nargs="+", type=router_name, default=["atto@112", "nano@224"], metavar="SIZE@PIXELS",
                   help="ConvNeXt V2 routers")  # fmt: skip
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--images", type=int, default=128)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, or float32 on CPU")
    p.add_argument("--quick", action="store_true", help="ViT-B/32, few batches, as a smoke test")
    p.add_argument("--json")
    args = p.parse_args()
    if args.quick:
        args.towers, args.scorers, args.batch, args.images, args.repeats = ["vit_b32"], ["atto@112"], 8, 32, 1
    dtype = jnp.dtype(args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    records = []
    for name in args.towers:
        for scorer in args.scorers:
            records.append(benchmark_router(name, scorer, args.batch, args.images, args.repeats, dtype))
            print(report(records[-1]), flush=True)
    if args.json:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "runs": records}
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
