"""Failing, stalled or missing storage and dying workers: bounded retries, then an error that names the cause."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from PIL import Image

from icar_jax.data.images import Preprocess
from icar_jax.data.loader import iterator
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches, train_batches
from icar_jax.data.loader.iterator import BatchIterator
from icar_jax.data.loader.watch import StalledData, WorkerDied
from icar_jax.data.records import Record, Source
from icar_jax.data.sources import shards
from icar_jax.data.sources.folders import CaptionFolder
from icar_jax.data.sources.shards import ShardError, attempt, retrying
from icar_jax.data.sources.webdataset import WebDataset
from tests.support.shardfiles import write_shards

PREPROCESS = Preprocess(8)
BATCHES = {"batch_size": 4, "seed": 0, "num_threads": 0}


class Fails:
    """Raises OSError the first `times` times."""

    def __init__(self, times):
        self.left = times

    def __call__(self, *_):
        self.left -= 1
        if self.left >= 0:
            raise OSError(5, "Input/output error")
        return "read"


@pytest.fixture
def pauses(monkeypatch):
    """Records the pauses between retries without waiting."""
    slept = []
    monkeypatch.setattr(shards.time, "sleep", slept.append)
    return slept


def test_pauses_grow_and_end(pauses):
    with retrying(9) as retried:
        assert attempt("a.tar", Fails(9)) == "read"
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert retried == [("a.tar", "Input/output error")] * 9


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_are_bounded(pauses, retries):
    read = Fails(100)
    with (
        retrying(retries),
        pytest.raises(ShardError, match=rf"a\.tar: cannot be read: Input/output error \({retries + 1} tries"),
    ):
        attempt("a.tar", read)
    assert read.left == 100 - retries - 1 and len(pauses) == retries


def test_other_errors_are_not_retried(pauses):
    def fault():
        raise KeyError("fault")

    with pytest.raises(KeyError):
        attempt("a.tar", fault)
    assert not pauses


def test_retries_are_per_thread_and_nest():
    with retrying(7):
        with retrying(1):
            assert shards.retries_now() == 1
        assert shards.retries_now() == 7
        other = []
        thread = threading.Thread(target=lambda: other.append(shards.retries_now()))
        thread.start()
        thread.join()
    assert other == [shards.RETRIES] == [shards.retries_now()]


def test_retried_reads_are_counted_and_reported(tmp_path, pauses, monkeypatch):
    source = WebDataset(str(write_shards(tmp_path, 2, 8)))
    pread, faults = os.pread, iter([True, False, True, True] + [False] * 1000)

    def flaky(*args):
        if next(faults):
            raise OSError(5, "Input/output error")
        return pread(*args)

    monkeypatch.setattr(shards.os, "pread", flaky)
    bad = BadFiles()
    assert not bad
    with train_batches(source, PREPROCESS, None, **BATCHES) as batches:
        for _ in range(4):
            bad.add(next(batches))
    assert bad and not bad.reasons and sum(bad.retried.values()) == 3
    assert "All images were readable.\n" in bad.summary()
    assert re.search(
        r"[12] shards had failed reads that were retried \(3 times\):\n  .*\.tar: \d times, last Input/output", bad.summary()
    )


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.check)])
def test_a_missing_shard_stops_the_run(tmp_path, workers):
    source = WebDataset(str(write_shards(tmp_path, 2, 8)))
    (tmp_path / "00001.tar").unlink()
    started = time.monotonic()
    with pytest.raises(
        ShardError, match=r"00001\.tar: cannot be read: No such file or directory \(2 tries, config.data.retries=1"
    ):
        with train_batches(source, PREPROCESS, None, **BATCHES, num_workers=workers, retries=1) as batches:
            for _ in range(4):
                next(batches)
    assert time.monotonic() - started > 0.5
    with pytest.raises(ShardError, match="1 tries"):
        with eval_batches(source, {"a": PREPROCESS}, batch_size=4, retries=0) as batches:
            list(batches)


def test_a_shard_truncated_after_indexing_stops_the_run(tmp_path, pauses):
    source = WebDataset(str(write_shards(tmp_path, 1, 8)))
    os.truncate(tmp_path / "00000.tar", 5000)
    with train_batches(source, PREPROCESS, None, **BATCHES) as batches:
        with pytest.raises(ShardError, match=r"00000\.tar: cannot be read: the file ends before byte"):
            for _ in range(4):
                next(batches)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 3)
    source = WebDataset(str(write_shards(tmp_path, 9, 1)))
    before = len(os.listdir("/proc/self/fd"))
    errors = []

    def read(source):
        try:
            for i in np.random.default_rng().integers(0, 9, 200):
                assert source[int(i)].captions == (f"picture {i}",)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(source,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(source._files._open) == 3
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


class Stalls(Source):
    """Blocks forever in image 5, like unresponsive storage, or fails as given by `how`."""

    name = "stalls"

    def __init__(self, how="block", at=5):
        self.how, self.at = how, at

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return Record(f"{i}.jpg", lambda: self.picture(i), ("x",))

    def picture(self, i):
        if i >= self.at and self.how == "block":
            attempt("/data/00012.tar", lambda: time.sleep(10_000))
        if i >= self.at and self.how == "exit":
            os._exit(3)
        if i >= self.at and self.how == "slow":
            time.sleep(0.3)
        return Image.new("RGB", (16, 16), (i, i, i))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stalled_source_stops_the_run_and_is_named(threads):
    options = {"batch_size": 2, "num_threads": threads, "stall_timeout_s": 0.4}
    started = time.monotonic()
    with eval_batches(Stalls(), {"a": PREPROCESS}, **options) as batches:
        assert [len(next(batches)["index"]) for _ in range(2)] == [2, 2]
        message = (
            r"no batch for 0\.4 s .*waiting for images 4 to 5 of source 'stalls'; this process is reading shard /data/00012"
        )
        with pytest.raises(StalledData, match=message):
            next(batches)
    assert time.monotonic() - started < 5


def test_a_stalled_training_source_names_positions(tmp_path):
    with train_batches(Stalls(at=0), PREPROCESS, None, **BATCHES, stall_timeout_s=0.3, start_position=8) as batches:
        with pytest.raises(StalledData, match="positions 8 to 11 of source 'stalls'"):
            next(batches)


@pytest.mark.check
def test_a_folder_on_unresponsive_storage(tmp_path):
    """Opening a pipe without a writer blocks in the system, like a hung mount; the program still exits."""
    script = textwrap.dedent(f"""
        import dataclasses
        import os
        from PIL import Image
        from icar_jax.data.sources.folders import CaptionFolder
        from icar_jax.data.images import Preprocess
        from icar_jax.data.loader.batches import train_batches
        for i in range(3):
            Image.new("RGB", (9, 9)).save({str(tmp_path)!r} + f"/{{i}}.png")
        os.mkfifo({str(tmp_path)!r} + "/3.png")
        open({str(tmp_path)!r} + "/captions.csv", "w").write("file,caption\\n" + "".join(f"{{i}}.png,x\\n" for i in range(4)))

        class Hung(CaptionFolder):
            def __getitem__(self, i):
                record = super().__getitem__(i)
                return record if i < 3 else dataclasses.replace(record, image=lambda: open({str(tmp_path)!r} + "/3.png", "rb"))

        source = Hung({str(tmp_path)!r})
        batches = train_batches(source, Preprocess(8), None, batch_size=4, seed=0, stall_timeout_s=1)
        next(batches)
    """)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "StalledData: no batch for 1 s" in done.stderr
    assert "is reading image 3.png (for 1 s)" in done.stderr, done.stderr
    assert time.monotonic() - started < 30


def test_a_pipe_in_a_folder_is_a_bad_file_that_nothing_waits_for(tmp_path):
    for i in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.png")
    os.mkfifo(tmp_path / "3.png")
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(f"{i}.png,x\n" for i in range(4)))
    with train_batches(CaptionFolder(tmp_path), PREPROCESS, None, batch_size=4, seed=0, stall_timeout_s=20) as batches:
        (bad,) = next(batches)["bad"]
    assert bad[0] == "3.png" and "pipe" in bad[1]


def test_slow_batches_are_not_a_stall():
    with eval_batches(Stalls("slow", 0), {"a": PREPROCESS}, batch_size=2, num_threads=0, stall_timeout_s=30) as batches:
        assert len(next(batches)["index"]) == 2


def test_waiting_can_be_interrupted_and_resumed():
    """A signal handler may raise while waiting for the next batch (Ctrl-C); no batch is lost."""

    class Interrupt(Exception):
        pass

    def interrupt(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with eval_batches(Stalls("slow", 0), {"a": PREPROCESS}, batch_size=2, num_threads=0) as batches:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupt):
                next(batches)
            assert [batch["index"].tolist() for batch in (next(batches), next(batches))] == [[0, 1], [2, 3]]
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_timeouts_must_be_positive(timeout):
    with pytest.raises(ValueError, match="stall_timeout_s"):
        BatchIterator(lambda step: {}, 1, 0, 0, timeout)


def worker_pids(batches):
    batches._workers.look()
    return {index: process.pid for index, process in batches._workers.found.items()}


def test_worker_messages_fit_in_a_pipe_buffer():
    """Data not in shared memory goes through a pipe and must be short enough for an atomic write."""
    import pickle

    many = np.array([f"shard/{'x' * 80}{i}" for i in range(4096)], object)
    packed = iterator._packed({"name": many, "nested": {"bad": many[:0]}, "index": np.arange(3)})
    assert all(not value.dtype.hasobject for value in (packed["name"][iterator._PICKLED], packed["index"]))
    plain = iterator._plain(pickle.loads(pickle.dumps(packed)))
    assert plain["name"].tolist() == many.tolist() and plain["nested"]["bad"].dtype == object


@pytest.mark.check
@pytest.mark.parametrize("which, delay", [(0, 0.0), (1, 0.0), (1, 0.3), (0, 1.0)])
def test_a_killed_worker_is_named_with_its_signal(tmp_path, which, delay):
    source = WebDataset(str(write_shards(tmp_path, 4, 300)))  # large batches, whose names alone fill a pipe
    with train_batches(source, PREPROCESS, None, batch_size=1024, seed=0, num_workers=2, num_threads=1) as batches:
        next(batches)
        next(batches)
        time.sleep(delay)
        pids = worker_pids(batches)
        os.kill(pids[which], signal.SIGKILL)
        started = time.monotonic()
        message = (
            rf"data worker {which} of 2 \(process {pids[which]}\) was killed by signal 9, SIGKILL, before positions \d+ to"
        )
        with pytest.raises(WorkerDied, match=message):
            for _ in range(30):
                next(batches)
        assert time.monotonic() - started < 60
    assert time.monotonic() - started < 60
    for pid in pids.values():  # the other worker has exited too
        assert not os.path.exists(f"/proc/{pid}") or "zombie" in open(f"/proc/{pid}/status").read()


@pytest.mark.check
def test_a_worker_that_exits_is_named():
    with pytest.raises(
        WorkerDied, match=r"data worker [01](, [01])? of 2 \(process \d+.* ended with exit code 3 before images"
    ):
        with eval_batches(Stalls("exit"), {"a": PREPROCESS}, batch_size=2, num_workers=2) as batches:
            list(batches)


@pytest.mark.check
def test_a_stalled_worker_reports_what_it_reads():
    with pytest.raises(
        StalledData, match=r"images 4 to 5 .*data worker 0 of 2 \(process \d+\) is reading shard /data/00012.tar"
    ):
        with eval_batches(Stalls(), {"a": PREPROCESS}, batch_size=2, num_workers=2, stall_timeout_s=4) as batches:
            list(batches)


@pytest.mark.check
def test_a_worker_that_hangs_completely(tmp_path, monkeypatch):
    monkeypatch.setattr(iterator, "_GRACE_S", 3.0)
    source = WebDataset(str(write_shards(tmp_path, 2, 30)))
    started = time.monotonic()
    with train_batches(source, PREPROCESS, None, batch_size=4, seed=0, num_workers=1, stall_timeout_s=2) as batches:
        next(batches)
        os.kill(worker_pids(batches)[0], signal.SIGSTOP)
        with pytest.raises(StalledData, match="waiting for positions .*the workers did not report"):
            for _ in range(100):
                next(batches)
    assert time.monotonic() - started < 60


@pytest.mark.check
def test_evaluation_with_more_workers_than_batches():
    with eval_batches(Stalls("slow"), {"a": PREPROCESS}, batch_size=10, num_workers=4) as batches:
        assert [len(batch["index"]) for batch in batches] == [10, 10, 4]
