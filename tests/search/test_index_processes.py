"""icar index in real processes: killed at random times, run concurrently, and distributed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import icar_jax
from icar_jax.search.opening import open_store
from tests.support import collected
from tests.support.collected import draw, embeddings, index, rows
from tests.support.programs import ROOT, environment, finish, free_address

pytestmark = pytest.mark.check


@pytest.fixture(scope="module")
def bundle(clip_folder, complexity_folder, tmp_path_factory):
    return collected.bundle(clip_folder, complexity_folder, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def whole(bundle, tmp_path_factory):
    """(images, a store indexed from them in a single run)."""
    home = tmp_path_factory.mktemp("whole")
    pictures = draw(home / "pictures", 200)
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    index(icar_jax.load(bundle, batch_size=8), pictures, home / "store")
    return pictures, home / "store"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(cache, *arguments, devices=1):
    command = [sys.executable, "-m", "icar_jax.cli", "index", *map(str, arguments), "--batch-size", "8", "--skip-bad"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(cache, devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def commits(store):
    """Number of commits to the table of images, counted from its files without opening it."""
    folder = store / "images.lance" / "_versions"
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def require_same(store, whole):
    columns = ("sha256", "size", "mtime_ns", "exit")
    assert open_store(store).count() == 200, "doubled or lost"
    assert rows(store, *columns) == rows(whole, *columns)
    mine, expected = embeddings(store), embeddings(whole)
    assert all(np.allclose(mine[path], expected[path], atol=2e-3) for path in expected)
    assert len(open_store(store).bad_rows()) == 1


@pytest.mark.parametrize("stages", [[()], [("--pass", "cheap"), ("--pass", "refine")]], ids=["index", "passes"])
def test_killed_at_random_moments_nothing_is_lost_or_doubled(stages, bundle, whole, cache, tmp_path):
    pictures, expected = whole
    store, rng, kills = tmp_path / "store", np.random.default_rng(0), 0
    for stage in stages:
        folder = [] if "refine" in stage else [pictures]
        for attempt in range(12):
            process = start(cache, *folder, "--checkpoint", bundle, "--store", store, "--commit-rows", 5, *stage)
            wanted = commits(store) + int(rng.integers(0, 12)) if attempt else 0  # the first is killed while creating the store
            while process.poll() is None and commits(store) < wanted + (not attempt):
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            if process.poll() is None and attempt < 11:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            code, _, err = finish(process)
            assert code in (0, -signal.SIGKILL), err[-2000:]
            if code == 0:
                break
        assert code == 0
    assert kills >= 3 * len(stages)
    require_same(store, expected)


MAKE = """
import sys, time
from icar_jax.search.opening import create_store, open_store
from icar_jax.search.access import StoreExists
print("ready", flush=True)
start = float(sys.stdin.readline())
for i in range(int(sys.argv[2])):
    time.sleep(max(0, start + 0.1 * i - time.time()))
    try:
        create_store(f"{sys.argv[1]}/{i}", {"clip": "a"}, 4, (1, 2), "/c")
        print("made", flush=True)
    except StoreExists:
        print("exists", flush=True)
    assert open_store(f"{sys.argv[1]}/{i}").count() == 0
"""


@pytest.mark.parametrize("writers", [2, 4])
@pytest.mark.parametrize("prefix", ["", "file://"], ids=["folder", "address"])
def test_writers_that_make_a_store_at_the_same_moment_make_one(prefix, writers, tmp_path):
    """Also for an object store address, which has no lock."""
    rounds, command = 25, [sys.executable, "-c", MAKE, f"{prefix}{tmp_path}", "25"]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(writers)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * writers
    start = time.time() + 0.2
    ended = [process.communicate(f"{start}\n", timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * writers, [err[-1000:] for _, err in ended]
    said = "".join(out for out, _ in ended).split()
    assert (said.count("made"), said.count("exists")) == (rounds, rounds * (writers - 1))


def test_two_runs_at_once_write_every_row_once(bundle, whole, cache, tmp_path):
    pictures, expected = whole
    store = tmp_path / "store"
    both = [start(cache, pictures, "--checkpoint", bundle, "--store", store, "--commit-rows", 7) for _ in range(2)]
    for process in both:
        code, _, err = finish(process)
        assert code == 0, err[-2000:]
    require_same(store, expected)


def test_two_runs_at_once_on_an_address_without_locks(bundle, whole, cache, tmp_path):
    pictures, expected = whole
    address = f"file://{tmp_path}/store"
    both = [start(cache, pictures, "--checkpoint", bundle, "--store", address, "--commit-rows", 20) for _ in range(2)]
    for process in both:
        code, _, err = finish(process)
        assert code == 0, err[-2000:]
    require_same(tmp_path / "store", expected)


def test_processes_of_one_run_share_the_work(bundle, whole, cache, tmp_path):
    pictures, expected = whole
    store, address = tmp_path / "store", free_address()
    command = [pictures, "--checkpoint", bundle, "--store", store, "--commit-rows", 20]
    for again in range(2):
        joined = ("--coordinator", address if not again else free_address(), "--processes", 2)
        both = [start(tmp_path / "none", *command, *joined, "--process", i, devices=2) for i in range(2)]
        ended = [finish(process) for process in both]
        assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-2000:] + ended[1][2][-2000:]
        counts = "added 0, updated 0, removed 0, unchanged 200" if again else "added 200, updated 0, removed 0, unchanged 0"
        assert counts in ended[0][1] and "added" not in ended[1][1], "one process reports"
    require_same(store, expected)
