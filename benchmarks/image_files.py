"""Peak memory and time of decoding image files that are large, odd or hostile, each in a process of its own.

    python benchmarks/image_files.py                     # prints a table, exits with 1 if an image exceeds the bound
    python benchmarks/image_files.py --out results.json

Files are made by tests/support/odd_images.py. `all pixels` decodes at full size, as a training with crops does; `small` asks
for at least 672 pixels a side, as a model of 224 pixels does. Linux only (VmHWM).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from icar_jax.files import limits  # noqa: E402
from tests.support import odd_images as odd  # noqa: E402

_TIMEOUT_S = 120
_ONE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
from icar_jax.data.images import decode
from PIL import Image
decode(sys.argv[3])
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1.024e-3
before, start = peak(), time.perf_counter()
try:
    found = "x".join(map(str, decode(sys.argv[1], at_least=int(sys.argv[2])).size))
except Exception as error:
    found = str(error).removeprefix(sys.argv[1] + ": ")
print(json.dumps({"seconds": time.perf_counter() - start, "MB": peak() - before, "result": found}))
"""


def flat(side: int, mode: str, format: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (side, side)).save(stream, format, **options)
    return stream.getvalue()


def cases(side: int) -> dict[str, tuple[str, bytes]]:
    """{name: (suffix, bytes of the file)}."""
    small = odd.saved(odd.noise(16, 16), "JPEG")
    busy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (750, 1000, 3), np.uint8)).resize((6000, 4500))
    return {
        "photograph, 27 megapixels": (".jpg", odd.saved(busy, "JPEG", quality=90)),
        "the same, progressive": (".jpg", odd.saved(busy, "JPEG", quality=90, progressive=True)),
        "PNG, 16-bit grey": (".png", odd.flat_png(side, side, 16, 0)),
        "PNG, RGB": (".png", odd.flat_png(side, side, 8, 2)),
        "PNG, RGBA": (".png", odd.flat_png(side, side, 8, 6)),
        "PNG, 16-bit RGBA": (".png", odd.flat_png(side, side, 16, 6)),
        "JPEG": (".jpg", flat(side, "RGB", "JPEG")),
        "JPEG, progressive, 4:4:4": (".jpg", flat(side, "RGB", "JPEG", progressive=True, subsampling=0)),
        "JPEG, CMYK": (".jpg", flat(side, "CMYK", "JPEG")),
        "TIFF, deflated RGB": (".tif", flat(side, "RGB", "TIFF", compression="tiff_adobe_deflate")),
        "TIFF, deflated, one strip": (".tif", flat(side, "RGB", "TIFF", compression="tiff_adobe_deflate", strip_size=1 << 30)),
        "GIF": (".gif", flat(side, "P", "GIF")),
        "WebP": (".webp", flat(min(side, 9000), "RGB", "WEBP", lossless=True, method=0)),
        "WebP, RGBA": (".webp", flat(min(side, 9000), "RGBA", "WEBP", lossless=True, method=0)),
        "AVIF": (".avif", flat(min(side, 9000), "RGB", "AVIF", speed=10)),
        "JPEG of 1 kB that claims this size": (".jpg", odd.claiming(small, side, side)),
        "progressive JPEG of 8,000 scans": (".jpg", odd.many_scans(min(side, 7000), 8000)),
        "PNG of 200,000 chunks": (".png", odd.png(np.zeros((4, 4, 3), np.uint8), 2, *[odd.png_chunk(b"teSt", b"")] * 200_000)),
        "TIFF of 20 MB, 2,000 tags share all of it": (".tif", odd.tiff_sharing(2000, 20_000_000)),
    }  # fmt: skip


def measure(file: Path, at_least: int, first: Path) -> dict:
    words = [sys.executable, "-c", _ONE, str(file), str(at_least), str(first)]
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH") or root}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, env=env)
    except subprocess.TimeoutExpired:
        return {"seconds": float(_TIMEOUT_S), "MB": float("nan"), "result": "no end"}
    return (
        json.loads(done.stdout) if done.returncode == 0 else {"seconds": 0.0, "MB": float("nan"), "result": done.stderr[-200:]}
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--side", type=int, default=13000, help="side of the large images in pixels (13000)")
    p.add_argument("--out", help="also write JSON")
    args = p.parse_args()
    rows, most = [], limits.DECODED_BYTES / 1e6
    print("| file | bytes | all pixels: MB | s | small: MB | s | result |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.png"
        first.write_bytes(odd.saved(odd.noise(), "PNG"))
        for name, (suffix, data) in cases(args.side).items():
            file = Path(folder) / f"case{suffix}"
            file.write_bytes(data)
            whole, small = measure(file, 0, first), measure(file, 672, first)
            rows.append({"file": name, "bytes": len(data), "all pixels": whole, "small": small})
            numbers = " | ".join(f"{each['MB']:,.0f} | {each['seconds']:.2f}" for each in (whole, small))
            results = dict.fromkeys([whole["result"], small["result"]])
            print(f"| {name} | {len(data):,} | {numbers} | {'; '.join(results)} |", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps({"side": args.side, "files": rows}, indent=1) + "\n", encoding="utf-8")
    over = [
        row["file"] for row in rows for each in (row["all pixels"], row["small"]) if not each["MB"] < most + row["bytes"] / 1e6
    ]
    if over:
        sys.exit(f"beyond the bound of {most:,.0f} MB and the bytes of the file: {', '.join(over)}")


if __name__ == "__main__":
    main()
