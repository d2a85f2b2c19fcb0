"""Data workers exit with their parent process, however it ends, and ignore signals to the group."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.places import ROOT

SCRIPT = """
import os, signal, sys, time
import numpy as np
from icar_jax.data.loader.iterator import BatchIterator

def make(step):
    return {"step": np.array(step)}

if __name__ == "__main__":
    batches = BatchIterator(make, 10**6, 1, 1)
    next(batches)
    batches._workers.look()
    print(batches._workers.found[0].pid, flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
            os.killpg(0, number)  # like a scheduler or a terminal
        time.sleep(1)
        found = [int(next(batches)["step"]) for _ in range(50)]  # more than were prefetched
        assert found == list(range(1, 51)), found
        batches.close()
    print("ended", flush=True)  # "forgotten": without closing
"""


def gone(pid):
    return not os.path.exists(f"/proc/{pid}") or "zombie" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.check
@pytest.mark.parametrize("way, code", [("kill", -signal.SIGKILL), ("signals", 0), ("forgotten", 0)])
def test_workers_exit_with_their_parent_and_ignore_signals_to_the_group(way, code, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.Popen([sys.executable, file, way], env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True)
    pid = int(done.stdout.readline())
    assert done.wait(60) == code
    assert way == "kill" or done.stdout.read() == "ended\n"
    until = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert gone(pid), f"the worker {pid} of a process that ended by {way} still runs"
