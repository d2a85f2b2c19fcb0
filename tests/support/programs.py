"""Real train.py processes on a tiny configuration, for tests that kill, limit and join them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support import compiling
from tests.support.places import ROOT

FLAGS = (
    "--config=configs/demo.py:clip",
    "--config.clip.image_size=64",
    "--config.clip.patch_size=32",
    "--config.clip.depth=3",
    "--config.clip.exit_head=linear",
    "--config.optim.kind=adamw",
    "--config.clip.context_length=16",
    "--config.data.scenes_size=200",
    "--config.data.vocabulary=300",
    "--config.train.dtype=float32",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
    "--config.optim.warmup_steps=2",
    "--config.eval.size=30",
    "--config.eval.batch_size=8",
)


def environment(cache, devices=1, fast=True):
    """CPU only; every compilation is kept, so that a restart costs seconds. `fast`: hardly optimised, as that takes longest."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {compiling.flags(fast=True) if fast else ''}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": str(devices == 1).lower(),  # see distributed.avoid_cached_collectives
    }


def start(workdir, cache, *flags, devices=1):
    """train.py as a process of its own; stdout and stderr are read by `finish`."""
    command = [sys.executable, "train.py", *FLAGS, f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(cache, devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, timeout=300):
    """(return code, stdout, stderr); a process that does not end is killed, and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {timeout} s:\n{process.communicate()[1][-3000:]}") from None
    return process.returncode, out, err


def run(workdir, cache, *flags, devices=1):
    """Runs train.py to its end, which must be a good one; returns stdout."""
    code, out, err = finish(start(workdir, cache, *flags, devices=devices))
    assert code == 0, err[-3000:]
    return out


def free_address():
    """localhost:port that nobody listens at."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return f"localhost:{sock.getsockname()[1]}"


def start_several(workdirs, cache, *flags, devices=1):
    """One process for each workdir (the same one, as a rule), joined at a free port."""
    joined = (f"--coordinator={free_address()}", f"--processes={len(workdirs)}")
    return [start(workdir, cache, *flags, *joined, f"--process={i}", devices=devices) for i, workdir in enumerate(workdirs)]


def wait_for(condition, process, timeout=200):
    """Polls until `condition()` is true or `process` has ended; returns whether it became true."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    raise AssertionError(f"nothing happened within {timeout} s")


def curve(workdir):
    """Every metrics line but for what depends on the clock; evaluations are lines of their own."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]


def last_step(workdir):
    """The last step in the metrics, 0 before there is one; a line that is being written does not count."""
    try:
        text = (Path(workdir) / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    whole = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(whole[-1])["step"] if whole else 0


def saved_steps(workdir):
    """Steps of the complete checkpoints."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def unfinished_saves(workdir):
    """Names of checkpoints that are being written, or were when their writer died."""
    folder = Path(workdir) / "checkpoints"
    return {p.name for p in folder.iterdir() if "tmp" in p.name} if folder.is_dir() else set()


def weights_bytes(workdir, folder="model"):
    return (Path(workdir) / folder / "params.safetensors").read_bytes()


def on_eight_devices(script, *arguments, fast=True):
    """What a script, run with eight fake devices, prints last, as JSON."""
    env = environment(os.environ["JAX_COMPILATION_CACHE_DIR"], devices=8, fast=fast)
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
