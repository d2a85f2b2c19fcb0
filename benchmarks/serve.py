"""Latency of searches through the API of `icar serve` with 1, 8, 32 and 64 clients; or beside hostile clients; or a screenshot.

    python benchmarks/serve.py --store STORE [--checkpoint C] [--quick] [--seconds 10] [--json docs/results/serve.json]
    python benchmarks/serve.py --store STORE --hostile [--seconds 20] [--json docs/results/serve_hostile.json]
    python benchmarks/serve.py --store STORE --screenshot docs/search_page.png [--query "a red circle"] [--width 1280] [--dark]

Starts the server in a separate process, on loopback. Each client is a thread with its own connection that sends the next
request as soon as it has a response. Queries are captions of the store, or plain phrases if it has none; image queries are its
thumbnails. Refused requests (503) have a separate column. The clients run on the same machine and take CPU time from the
server. `batch` is the mean number of queries encoded together. A screenshot needs Chromium.

--hostile measures one ordinary client that searches by words, alone and beside others: 600 connections that send nothing (each
opens again when it is closed), 60 clients that request an image of 48 MB and read nothing, and 4 that upload JPEGs of 8,000
scans. Each has a server of its own, over a copy of the store to which that image was added. Linux only, for the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np

ROOT = Path(__file__).parent.parent
CLIENTS = (1, 8, 32, 64)
PHRASES = ("two dogs playing in the snow", "a child on a swing", "a man riding a bicycle", "people at a table", "a red car",
           "a boat on a lake", "a woman in a blue dress", "a mountain under clouds")  # fmt: skip


@contextlib.contextmanager
def server(store: str, checkpoint: str | None, queue: int, about: dict | None = None) -> Iterator[str]:
    """Starts `icar serve` in a separate process and yields its address; sets `process` of `about`."""
    command = [sys.executable, "-m", "icar_jax.cli", "serve", "--store", store, "--port", "0", "--queue", str(queue)]
    command += ["--checkpoint", checkpoint] if checkpoint else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if about is not None:
        about["process"] = process.pid
    try:
        found = None
        while found is None:
            line = process.stdout.readline()
            if not line:
                sys.exit("the server did not start; see its output above")
            found = re.search(r"Serving (http://\S+?)/\s", line)
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            print("the server did not end within 60 s of SIGTERM", file=sys.stderr)
            process.kill()


def measure_latency(
    ask: Callable[[httpx.Client, int], httpx.Response], address: str, clients: int, seconds: float
) -> dict[str, float]:
    """Sends requests from `clients` threads for `seconds`; returns latency percentiles in ms and counts of refusals (503)."""
    taken, refused, ready = [], [], threading.Barrier(clients + 1)

    def run(number: int) -> None:
        with httpx.Client(base_url=address, timeout=120) as client:
            client.get("/healthz")  # opens the connection
            ready.wait()
            query, until = number, time.perf_counter() + seconds
            while time.perf_counter() < until:
                start = time.perf_counter()
                answer = ask(client, query)
                spent = time.perf_counter() - start
                if answer.status_code in (503, 504):
                    refused.append(spent)
                    time.sleep(0.05)
                else:
                    answer.raise_for_status()
                    taken.append(spent)
                query += clients

    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    p50, p90, p99 = np.percentile(1000 * np.array(taken), (50, 90, 99)) if taken else [float("nan")] * 3
    return {"requests": len(taken), "refused": len(refused), "requests_per_s": len(taken) / wall, "p50_ms": p50, "p90_ms": p90,
            "p99_ms": p99, "worst_ms": 1000 * max(taken, default=float("nan"))}  # fmt: skip


def batch_counts(client: httpx.Client, kind: str) -> tuple[float, float]:
    """Returns (queries, batches) so far."""
    text = client.get("/metrics").text
    numbers = [re.search(rf'icar_batch_queries_{part}{{kind="{kind}"}} (\S+)', text) for part in ("sum", "count")]
    return tuple(float(number[1]) if number else 0.0 for number in numbers)


def request_kinds(client: httpx.Client) -> dict[str, Callable[[httpx.Client, int], httpx.Response]]:
    """Returns a function per kind of request, with varying queries."""
    hits = client.get("/api/search", params={"q": PHRASES[0], "k": 200}).raise_for_status().json()["hits"]
    texts = [hit["caption"] for hit in hits if hit["caption"]] or list(PHRASES)
    ids = [hit["id"] for hit in hits]
    images = [client.get(f"/api/images/{id}/thumbnail").raise_for_status().content for id in ids[:16]]
    return {
        "text": lambda c, i: c.get("/api/search", params={"q": texts[i % len(texts)]}),
        "image": lambda c, i: c.post("/api/search/image", files={"image": ("a.jpg", images[i % len(images)])}),
        "preview": lambda c, i: c.get(f"/api/images/{ids[i % len(ids)]}/thumbnail"),
    }


def screenshot(address: str, file: Path, query: str, width: int, height: int, dark: bool) -> None:
    """Writes a screenshot of the page with the results of a query."""
    sys.path.append(str(ROOT))  # for the Chromium driver of the tests
    from tests.support import chromium

    if chromium.PATH is None:
        sys.exit("a screenshot needs Chromium, which is not installed")
    with chromium.Browser() as browser:
        page = browser.page(f"{address}/?{httpx.QueryParams({'q': query})}", width, height, dark)
        page.wait("document.querySelectorAll('.card').length > 0 && !document.querySelector('[aria-busy]')")
        page.wait("[...document.querySelectorAll('.card img')].filter((e) => e.getBoundingClientRect().top < innerHeight)"
                  ".every((e) => e.complete)")  # fmt: skip
        page.eval("document.activeElement.blur()")
        file.write_bytes(page.picture())
    print(f"wrote {file}")


def idle(address: str, stop: threading.Event, count: int = 600) -> None:
    """Holds `count` connections open that send nothing; opens a new one for each that the server ends."""
    host, _, port = address.removeprefix("http://").partition(":")
    poll, held = select.poll(), {}
    while not stop.is_set():
        while len(held) < count:
            connection = socket.create_connection((host, int(port)), timeout=20)
            held[connection.fileno()] = connection
            poll.register(connection, select.POLLIN | select.POLLHUP)
        for number, _ in poll.poll(100):
            poll.unregister(number)
            held.pop(number).close()
    for connection in held.values():
        connection.close()


def slow_readers(address: str, stop: threading.Event, path: str, count: int = 60) -> None:
    """`count` clients that request `path` and do not read the response."""
    host, _, port = address.removeprefix("http://").partition(":")
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    held = []
    for _ in range(count):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(request)
        held.append(connection)
    stop.wait()
    for connection in held:
        connection.close()


def uploads(address: str, stop: threading.Event, data: bytes, count: int = 4) -> None:
    """`count` clients that upload the same image again and again."""

    def run() -> None:
        with httpx.Client(base_url=address, timeout=300) as client:
            while not stop.is_set():
                with contextlib.suppress(httpx.TransportError):  # the server is ended at the end
                    client.post("/api/search/image", files={"image": ("a.jpg", data)})

    for _ in range(count):
        threading.Thread(target=run, daemon=True).start()
    stop.wait()


def memory_of(process: int) -> tuple[float, float]:
    """(memory of a process now, its highest so far) in MB."""
    text = Path(f"/proc/{process}/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1.024e-3 for name in ("VmRSS", "VmHWM"))


def hostile(store: str, checkpoint: str | None, seconds: float) -> list[dict]:
    """Rows of the table of an ordinary client beside hostile ones."""
    sys.path.insert(0, str(ROOT))  # for the images of the tests
    from PIL import Image

    from tests.support import odd_images as odd

    rows = []
    print(f"{'beside':>28} {'requests':>9} {'refused':>8} {'p50 ms':>8} {'p99 ms':>8} {'worst ms':>8} {'memory MB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        copy, file = os.path.join(folder, "store"), os.path.join(folder, "large.bmp")
        shutil.copytree(store, copy)
        Image.effect_noise((4000, 4000), 90).convert("RGB").save(file)  # 48 MB
        command = [sys.executable, "-m", "icar_jax.cli", "index", file, "--store", copy]
        subprocess.run(command + (["--checkpoint", checkpoint] if checkpoint else []), check=True, capture_output=True)
        path = "/api/images/" + hashlib.sha256(Path(file).read_bytes()).hexdigest()
        scans, picture = odd.many_scans(7000, 8000), odd.saved(odd.noise(320, 240), "JPEG")
        beside = {
            "nobody": lambda address, stop: stop.wait(), "600 silent connections": idle,
            "60 clients that do not read": lambda address, stop: slow_readers(address, stop, path),
            "4 uploads of 8,000 scans": lambda address, stop: uploads(address, stop, scans),
        }  # fmt: skip
        for name, act in beside.items():
            about: dict = {}
            with server(copy, checkpoint, 2 * max(CLIENTS), about) as address:
                stop, before = threading.Event(), memory_of(about["process"])[0]
                other = threading.Thread(target=act, args=(address, stop), daemon=True)
                other.start()
                time.sleep(2.0)
                kinds = {
                    "text": lambda c, i: c.get("/api/search", params={"q": PHRASES[i % len(PHRASES)]}),
                    "image": lambda c, i: c.post("/api/search/image", files={"image": ("a.jpg", picture)}),
                }
                for kind, ask in kinds.items():
                    found = measure_latency(ask, address, 1, seconds / 2)
                    more = memory_of(about["process"])[1] - before
                    rows.append({"beside": name, "kind": kind, **found, "memory_mb": more})
                    times = " ".join(f"{found[part]:8.1f}" for part in ("p50_ms", "p99_ms", "worst_ms"))
                    print(f"{name:>28} {found['requests']:9} {found['refused']:8} {times} {more:10.0f}  {kind}", flush=True)
                stop.set()
                other.join(10)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="store made by `icar index`")
    parser.add_argument("--checkpoint", help="as for `icar serve`")
    parser.add_argument("--quick", action="store_true", help="one second of text queries at 1 and 8 clients; writes no JSON")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement")
    parser.add_argument("--json", type=Path, help="file of the results (docs/results/serve.json, serve_hostile.json)")
    parser.add_argument("--hostile", action="store_true", help="measure one client beside hostile ones instead")
    parser.add_argument("--screenshot", type=Path, metavar="PNG", help="take a screenshot of the page instead of measuring")
    parser.add_argument("--query", default="a red circle", help="query in the screenshot")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    args.json = args.json or ROOT / "docs" / "results" / ("serve_hostile.json" if args.hostile else "serve.json")
    if args.hostile:
        rows = hostile(args.store, args.checkpoint, args.seconds)
        args.json.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
        return
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(server(args.store, args.checkpoint, 2 * max(CLIENTS)))
        client = stack.enter_context(httpx.Client(base_url=address, timeout=120))
        if args.screenshot:
            screenshot(address, args.screenshot, args.query, args.width, args.height, args.dark)
            return
        info = client.get("/api/store").raise_for_status().json()
        print(f"{info['images']:,} images, {info['embed_dim']} dimensions, {os.cpu_count()} processor cores")
        print(f"{'kind':>8} {'clients':>8} {'requests':>9} {'503':>5} {'per s':>7}", end=" ")
        print(f"{'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} {'batch':>6}")
        rows = []
        for kind, ask in request_kinds(client).items():
            if args.quick and kind != "text":
                continue
            for clients in CLIENTS[:2] if args.quick else CLIENTS:
                before = batch_counts(client, kind)
                found = measure_latency(ask, address, clients, 1.0 if args.quick else args.seconds)
                queries, batches = np.subtract(batch_counts(client, kind), before)
                row = {"kind": kind, "clients": clients, **found, "batch": queries / batches if batches else None}
                rows.append(row)
                print(
                    f"{kind:>8} {clients:8} {row['requests']:9} {row['refused']:5} {row['requests_per_s']:7.1f} "
                    f"{row['p50_ms']:8.1f} {row['p90_ms']:8.1f} {row['p99_ms']:8.1f} "
                    f"{'' if row['batch'] is None else format(row['batch'], '6.2f'):>6}", flush=True,
                )  # fmt: skip
        compiled = re.search(r"^icar_compilations_total (\S+)", client.get("/metrics").text, re.M)[1]
        print(f"programs compiled while searching: {float(compiled):.0f}")
    if not args.quick:
        about = {"images": info["images"], "embed_dim": info["embed_dim"], "cores": os.cpu_count(), "compiled": float(compiled)}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"store": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
