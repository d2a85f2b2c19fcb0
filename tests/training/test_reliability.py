"""Killed, preempted, and out of disk: the same command continues as if nothing had happened."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple

import pytest

from icar_jax import workdir as files
from icar_jax.config import ConfigError
from icar_jax.training import checkpoints
from icar_jax.training.logs import RunLog
from icar_jax.training.loop import train
from icar_jax.training.preemption import StopRequest
from tests.support import programs
from tests.support.runs import tiny_config

STEPS, EVERY = 160, 8
LENGTH = (f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={EVERY}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(workdir, compilation cache) of a run that nothing disturbed, as every other must end."""
    folder, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache")
    out = programs.run(folder, cache, *LENGTH)
    assert f"Finished: {folder}/model" in out
    assert [line["step"] for line in programs.curve(folder)] == list(range(1, STEPS + 1))
    return folder, cache


def require_equal(found, uninterrupted):
    assert programs.weights_bytes(found) == programs.weights_bytes(uninterrupted[0])
    assert programs.curve(found) == programs.curve(uninterrupted[0])


def killed(kind, workdir, cache, rng):
    """Starts the run, kills it while it starts, at a step, or in a save that has begun; whether it was still running."""
    known, before = programs.unfinished_saves(workdir), programs.last_step(workdir)
    process = programs.start(workdir, cache, *LENGTH)
    if kind == "start":
        time.sleep(rng.uniform(0.2, 4.0))
    elif kind == "step":
        programs.wait_for(lambda: programs.last_step(workdir) not in (0, before), process)
        time.sleep(rng.uniform(0, 0.5))
    else:
        seen, wanted = set(), rng.randint(1, 3)
        programs.wait_for(lambda: seen.update(programs.unfinished_saves(workdir) - known) or len(seen) >= wanted, process)
        time.sleep(rng.uniform(0, 0.03))
    process.kill()
    code, _, err = programs.finish(process)
    assert code in (0, -signal.SIGKILL), err[-3000:]
    return code != 0


@pytest.mark.check
def test_twenty_kills_at_random_moments_change_nothing(uninterrupted, tmp_path):
    rng = random.Random(20)
    kinds = ["save"] * 10 + ["step"] * 6 + ["start"] * 4
    rng.shuffle(kinds)
    attempts, in_a_save, resumed_from = [tmp_path / "0"], 0, set()
    while kinds:
        workdir = attempts[-1]
        if killed(kinds[-1], workdir, uninterrupted[1], rng):
            kinds.pop()
            in_a_save += bool(programs.unfinished_saves(workdir))
            resumed_from |= set(programs.saved_steps(workdir)[-1:])
        else:  # complete before the kill came: the rest of them go to another run
            attempts.append(tmp_path / str(len(attempts)))
    programs.run(attempts[-1], uninterrupted[1], *LENGTH)
    for workdir in attempts:
        require_equal(workdir, uninterrupted)
        assert not programs.unfinished_saves(workdir) and len(programs.saved_steps(workdir)) == 2
    assert in_a_save >= 5 and len(resumed_from) >= 3


@pytest.mark.check
@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_saves_before_the_program_ends(name, code, uninterrupted, tmp_path):
    long = ("--config.train.checkpoint_every=1000", LENGTH[0])
    process = programs.start(tmp_path, uninterrupted[1], *long)
    assert programs.wait_for(lambda: programs.last_step(tmp_path) >= 5, process)
    process.send_signal(signal.Signals[name])
    found, out, err = programs.finish(process)
    assert found == code, err[-3000:]
    (step,) = programs.saved_steps(tmp_path)
    assert step == programs.last_step(tmp_path) and 5 <= step < STEPS
    assert f"Stopped by {name} after step {step} of {STEPS}; run the same command to resume." in out
    assert f"Resuming {tmp_path} after step {step} of {STEPS}." in programs.run(tmp_path, uninterrupted[1], *long)
    require_equal(tmp_path, uninterrupted)


@pytest.mark.check
def test_a_disk_that_fills_up_ends_the_run_with_the_last_checkpoint_intact(uninterrupted, tmp_path):
    process = programs.start(tmp_path, uninterrupted[1], *LENGTH)
    assert programs.wait_for(lambda: programs.saved_steps(tmp_path), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # no file of a state is as small as that
    code, out, err = programs.finish(process)
    assert code == 2, err[-3000:]
    kept = programs.saved_steps(tmp_path)[-1]
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and f"could not be written into {tmp_path}/checkpoints" in message[0]
    assert f"the checkpoint of step {kept} is intact" in message[0] and "run the same command again" in message[0]
    assert f"after step {kept} of {STEPS}" in programs.run(tmp_path, uninterrupted[1], *LENGTH)
    require_equal(tmp_path, uninterrupted)


def test_too_small_a_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(1 << 40, 0, 10 << 20)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"needs \d+\.\d MiB \(2 \+ 1 checkpoints of .*but 10.0 MiB are free"):
        train(tiny_config(), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_signal_is_noted_and_the_handlers_come_back(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert request.name is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # forwarded by a launcher at the same moment: one request
        assert request.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr().err.count("SIGTERM: stopping after this step") == 1


@pytest.mark.check
def test_a_second_signal_ends_the_program_at_once():
    script = (
        "import os, signal, time\n"
        "from icar_jax.training.preemption import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1.2)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=programs.ROOT, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGTERM, done.stderr


def test_signals_are_left_alone_outside_the_main_thread():
    handlers = []

    def inside():
        with StopRequest():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


HOLDER = """
import sys, time
from pathlib import Path
from icar_jax import workdir as files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_trainings_do_not_share_a_workdir(tmp_path):
    workdir = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, workdir], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        kept = sorted(workdir.iterdir())
        with pytest.raises(ConfigError, match=f"{workdir} is in use: another training writes to it .process {holder.pid} on "):
            train(tiny_config(), workdir)
        assert sorted(workdir.iterdir()) == kept
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):  # the lock ended with its process, and ends with its block however that ends
        with pytest.raises(ZeroDivisionError), files.locked(workdir):
            with pytest.raises(ConfigError, match=f"in use: .*process {os.getpid()} on "), files.locked(workdir):
                raise AssertionError("held twice")
            raise ZeroDivisionError


def test_a_workdir_that_another_training_wrote_to_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """It was empty when this run looked, and holds a state when the lock is had."""
    real = files.locked

    @contextlib.contextmanager
    def late(workdir):
        with real(workdir):
            (workdir / files.CHECKPOINTS / "2").mkdir(parents=True)
            yield

    monkeypatch.setattr(files, "locked", late)
    with pytest.raises(ConfigError, match=f"{tmp_path / 'run'}: another run wrote to it while this one was starting"):
        train(tiny_config(), tmp_path / "run")
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {files.LOCK, files.CHECKPOINTS}


def test_a_file_system_without_locks_is_trained_on_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert f"{tmp_path / 'run'} cannot be locked" in caplog.text


def test_what_a_killed_writer_left_is_cleared_and_the_old_folder_put_back(tmp_path):
    for name in (".model.abc", ".best.abc", ".best.abc.old", ".other.abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / "model").mkdir()
    files.recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.abc", "best", "model"]
    assert (tmp_path / "best" / "x").read_text() == ".best.abc.old"


def test_metrics_lines_beyond_the_start_and_cut_off_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/full_r5": 1.0}\n{"step": 3}\n{"step": 4, "lo')
    log = RunLog(tmp_path, 5, 2, False, "test")
    log.metrics(3, {"loss": 1.0})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval/full_r5": 1.0}\n{"step": 3, "loss": 1.0}\n'


def test_metrics_that_cannot_be_written_name_the_file(tmp_path):
    log = RunLog(tmp_path, 5, 0, False, "test")
    log._lines.close()
    log._lines = open("/dev/full", "w")
    with pytest.raises(OSError, match=r"metrics.jsonl cannot be written at step 3: .*No space left.*free disk space"):
        log.metrics(3, {"loss": 1.0})
    log.close()
