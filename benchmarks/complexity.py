"""Images per second of the complexity models, compared with timm in the same run, and cost relative to ViT-L/14.

    python benchmarks/complexity.py [--quick] [--batch 8] [--repeats 5] [--tower] [--json docs/results/complexity_speed.json]

One forward pass on preprocessed images in memory. The runs of one model are interleaved, and the fastest pass of each counts,
since other load only adds time; compare numbers within a run. PyTorch's rows need torch and timm. A head on the first blocks of
a tower shares the tower's computation, so its rows time only the head, on given tokens. FLOPs are counted (models/flops.py) and
given as a fraction of ViT-L/14's image tower; with --tower that tower is timed too, for the fraction of wall time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch_complexity
from tqdm import tqdm

from icar_jax.models import variants
from icar_jax.models.clip import Clip
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.flops import router_flops, vision_flops
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.token_router import BlocksArch, TokenRouter
from icar_jax.models.xla_options import jit_for_host

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
CONVNEXTS = (
    ("tiny", 224), ("nano", 224), ("nano", 512), ("pico", 224), ("femto", 224), ("atto", 224), ("nano", 112), ("pico", 112),
    ("femto", 112), ("atto", 112), ("nano", 64), ("pico", 64), ("femto", 64), ("atto", 64), ("demo", 64),
)  # fmt: skip
TIMM = [size for size in variants.CONVNEXT if not size.endswith("_demo")]  # timm has no model of the demo size
HEADS = (("vit_l14", 2), ("vit_l14", 4), ("vit_b16", 2), ("vit_b16", 4))
TOWER = variants.CLIP["vit_l14"].vision
TOWER_BATCH = 2


@dataclass(frozen=True)
class Case:
    """A complexity model: `runs` create the timed functions by name, `share` is its counted cost over ViT-L/14's."""

    name: str
    images: int  # images per batch
    share: float
    runs: dict[str, Callable[[], Callable[[], object]]]


def compile_call(function: Callable, *args) -> Callable[[], object]:
    """Compiles the function; returns a function without arguments that runs it and waits for the result."""
    run = jit_for_host(function).lower(*args).compile()
    return lambda: jax.block_until_ready(run(*args))


def random_images(batch: int, side: int) -> np.ndarray:
    """Returns random images, float32 [batch, side, side, 3]."""
    return np.random.default_rng(0).standard_normal((batch, side, side, 3), dtype=np.float32)


def convnext_case(size: str, side: int, batch: int, with_torch: bool) -> Case:
    name = f"convnextv2_{size}"
    arch = ComplexityArch(variants.CONVNEXT[name], "regression", side)
    images = random_images(batch, side)

    def ours(dtype):
        params = ComplexityModel.init(jax.random.key(0), arch)
        return compile_call(ComplexityModel.graph(arch, dtype=dtype).score, params, jnp.asarray(images))

    runs = {f"jax {key}": lambda dtype=dtype: ours(dtype) for key, dtype in DTYPES.items()}
    if with_torch and name in TIMM:
        for mode in torch_complexity.MODES:
            runs[f"timm {mode}"] = lambda mode=mode: torch_complexity.make_forward(name, images, mode)
    return Case(f"{size}@{side}", batch, router_flops(arch) / vision_flops(TOWER), runs)


def head_case(variant: str, blocks: int, batch: int) -> Case:
    vision = variants.CLIP[variant].vision
    arch = BlocksArch(vision, blocks, "regression", norm_parts=True)

    def ours(dtype):
        model = TokenRouter.graph(arch, dtype=dtype)
        tokens = Tokens(jnp.ones((batch, vision.tokens, vision.width), dtype), jnp.ones((batch, vision.tokens)))
        head = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), model.shapes)
        return compile_call(model.score_of_tokens, head, tokens)

    runs = {f"jax {key}": lambda dtype=dtype: ours(dtype) for key, dtype in DTYPES.items()}
    return Case(f"head on {variant} block {blocks}", batch, router_flops(arch) / vision_flops(TOWER), runs)


def tower_case() -> Case:
    def ours(dtype):
        clip = Clip.graph(variants.CLIP["vit_l14"], dtype=dtype)
        # Constant weights: time does not depend on them, and drawing 300 million numbers would take longer.
        params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), {"vision": clip.shapes["vision"]})
        params |= {name: leaf for name, leaf in clip.shapes.items() if name != "vision"}
        images = jnp.asarray(random_images(TOWER_BATCH, TOWER.image_size))
        given, rest = {"vision": params.pop("vision")}, params
        return compile_call(lambda p, x: clip.encode_image({**_zeros(rest), **p}, x), given, images)

    runs = {f"jax {key}": lambda dtype=dtype: ours(dtype) for key, dtype in DTYPES.items()}
    return Case("vit_l14 tower", TOWER_BATCH, 1.0, runs)


def _zeros(shapes):
    """Returns zeros for weights that the program does not use; created inside it, so they are eliminated."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def time_case(case: Case, repeats: int) -> dict:
    """Returns images/s of each run, from the fastest of `repeats` interleaved passes."""
    runs = {name: make() for name, make in case.runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()  # the first pass allocates
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    rates = {name: case.images / seconds for name, seconds in best.items()}
    ours = {name: rate for name, rate in rates.items() if name.startswith("jax")}
    chosen = max(ours, key=ours.get)
    row = {"model": case.name, "batch": case.images, "flops_share_of_vit_l14": case.share}
    row |= {"images_per_s": rates, "best": chosen}
    theirs = {name: rate for name, rate in rates.items() if name.startswith("timm")}
    for kind in ("f32", "bf16"):
        same = [rate for name, rate in theirs.items() if name.startswith(f"timm {kind}")]
        if same:
            row[f"best_to_timm_{kind}"] = ours[chosen] / max(same)
    return row


def benchmark_models(batch: int, repeats: int, tower: bool, quick: bool) -> list[dict]:
    """Returns one row per model."""
    try:
        torch_complexity.import_timm()
        with_torch = True
    except ImportError as error:
        print(f"without the PyTorch rows: {error}")
        with_torch = False
    sizes = CONVNEXTS[-2:] if quick else CONVNEXTS
    cases = [convnext_case(size, side, max(1, batch * 224**2 // max(224, side) ** 2), with_torch) for size, side in sizes]
    cases += [head_case(variant, blocks, batch) for variant, blocks in (HEADS[-1:] if quick else HEADS)]
    rows = [time_case(case, repeats) for case in tqdm(cases, desc="models", unit="model")]
    if tower:
        whole = time_case(tower_case(), min(repeats, 3))
        rows.append(whole)
        rate = whole["images_per_s"][whole["best"]]
        for row in rows:
            row["wall_share_of_vit_l14"] = rate / row["images_per_s"][row["best"]]
    return rows


def print_table(rows: list[dict]) -> None:
    columns = ["jax f32", "jax bf16", *(f"timm {mode}" for mode in torch_complexity.MODES)]
    short = [c.replace("channels_last", "cl") for c in columns]
    titles = f"{'x timm bf16':>12}{'x timm f32':>11}{'FLOPs':>8}{'wall':>8}"
    print(f"{'images/s':<26}" + "".join(f"{c:>13}" for c in short) + titles)
    number = lambda value, width, digits: f"{value:{width}.{digits}f}" if value is not None else f"{'-':>{width}}"
    for row in rows:
        line = f"{row['model']:<26}" + "".join(number(row["images_per_s"].get(c), 13, 1) for c in columns)
        line += number(row.get("best_to_timm_bf16"), 12, 2) + number(row.get("best_to_timm_f32"), 11, 2)
        wall = row.get("wall_share_of_vit_l14")
        percent = lambda share: "-" if share is None else f"{100 * share:.2g}%"
        print(line + f"{percent(row['flops_share_of_vit_l14']):>8}{percent(wall):>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest ConvNeXts and one head, two repeats")
    parser.add_argument(
        "--batch", type=int, default=8, help="images of 224 pixels per batch; larger images use smaller batches"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tower", action="store_true", help="also time ViT-L/14's image tower")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = benchmark_models(args.batch, 2 if args.quick else args.repeats, args.tower, args.quick)
    print(f"{jax.devices()[0].device_kind}, {jax.default_backend()}, jax {jax.__version__}, fastest of the passes")
    print_table(rows)
    if args.json:
        record = {"benchmark": "complexity", "platform": jax.default_backend(), "jax": jax.__version__, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
