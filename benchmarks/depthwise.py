"""Compares depthwise 7x7 convolutions: shifted multiply-adds (the CPU path) and XLA's convolution (the GPU and TPU path).

    python benchmarks/depthwise.py [--quick] [--json out.json]

Prints one table of times in milliseconds (fastest run), float32, for two ConvNeXt stages at batch 8. Run it on each platform
to check that the path chosen there is the faster one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from icar_jax.models import depthwise

SIZES = ((8, 56, 56, 96), (8, 14, 14, 384))
QUICK_SIZES = ((2, 14, 14, 384),)


def shifts_backward(x, kernel, g):
    """Returns value, input gradient and kernel gradient with shifted multiply-adds."""
    gradients = depthwise._shifted_sum(g, kernel[::-1, ::-1]), depthwise._kernel_gradient_tiles(x, kernel, g)
    return depthwise._shifted_sum(x, kernel), *gradients


def conv_backward(x, kernel, g):
    """Returns value, input gradient and kernel gradient with XLA's convolution."""
    gradients = depthwise._conv(g, kernel[::-1, ::-1]), depthwise._kernel_gradient_conv(x, kernel, g)
    return depthwise._conv(x, kernel), *gradients


def fastest_ms(function, *args, repeats: int) -> float:
    """Returns the fastest of `repeats` calls of the compiled function, in milliseconds."""
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def benchmark_convolutions(sizes=SIZES, repeats: int = 5) -> list[dict]:
    """Returns one row per size and pass: `size` [B, H, W, C], `pass`, `shifts_ms`, `conv_ms`, `ratio` (conv over shifts)."""
    generator = np.random.default_rng(0)
    rows = []
    for size in sizes:
        x, g = (jax.numpy.asarray(generator.standard_normal(size, dtype=np.float32)) for _ in range(2))
        kernel = jax.numpy.asarray(generator.standard_normal((7, 7, 1, size[-1]), dtype=np.float32))
        passes = {
            "forward": (depthwise._shifted_sum, depthwise._conv, (x, kernel)),
            "forward+backward": (shifts_backward, conv_backward, (x, kernel, g)),
        }
        for name, (shifts, conv, args) in passes.items():
            row = {"size": list(size), "pass": name}
            row["shifts_ms"] = fastest_ms(shifts, *args, repeats=repeats)
            row["conv_ms"] = fastest_ms(conv, *args, repeats=min(repeats, 3))
            row["ratio"] = row["conv_ms"] / row["shifts_ms"]
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size, two repeats")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = benchmark_convolutions(QUICK_SIZES, 2) if args.quick else benchmark_convolutions()
    print(f"platform {jax.default_backend()}, jax {jax.__version__}")
    print(f"{'size':>18} {'pass':>17} {'shifts ms':>10} {'conv ms':>10} {'conv/shifts':>12}")
    for row in rows:
        size = "x".join(map(str, row["size"]))
        print(f"{size:>18} {row['pass']:>17} {row['shifts_ms']:10.2f} {row['conv_ms']:10.2f} {row['ratio']:12.1f}")
    if args.json:
        record = {"benchmark": "depthwise", "platform": jax.default_backend(), "jax": jax.__version__, "rows": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
