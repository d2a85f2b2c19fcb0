"""experiments/retention/jobs.py: sequential and parallel trainings."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.retention import jobs
from tests.support.runs import tiny_config

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def job(folder: Path, name: str, start: str = "", *judged_by: str) -> jobs.Job:
    config = tiny_config()
    config.train.init = str(folder / start) if start else ""
    return jobs.Job(jobs.TrainingRun(name, folder / name, config), judged_by=tuple(folder / each for each in judged_by))


def finish(each: jobs.Job) -> None:
    (each.run.workdir / "model").mkdir(parents=True)
    (each.run.workdir / "model" / "icar.json").touch()


@pytest.mark.parametrize("side_by_side", [1, 2, 5])
def test_a_job_starts_when_its_dependencies_are_finished(tmp_path, side_by_side):
    todo = [job(tmp_path, "a"), job(tmp_path, "b", "a"), job(tmp_path, "c"), job(tmp_path, "d", "b", "c")]
    begun, at_once, most, lock = [], 0, 0, threading.Lock()

    def do(each):
        nonlocal at_once, most
        assert each.ready
        with lock:
            begun.append(each.run.name)
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        finish(each)
        with lock:
            at_once -= 1

    jobs.run_jobs(todo, do, side_by_side, jobs.ChildProcesses())
    assert sorted(begun) == ["a", "b", "c", "d"] and begun[-1] == "d" and most == min(side_by_side, 2)
    assert begun.index("a") < begun.index("b")
    if side_by_side > 1:
        assert set(begun[:2]) == {"a", "c"}  # b waits for a, so c starts first


def test_a_job_that_fails_stops_the_others(tmp_path):
    todo, children, asked = [job(tmp_path, name) for name in "abc"], jobs.ChildProcesses(), []

    def do(each):
        asked.append(each.run.name)
        if each.run.name == "a":
            time.sleep(0.3)
            raise ValueError("a has failed")
        children.call(SLEEP, tmp_path / f"{each.run.name}.log")

    begin = time.perf_counter()
    with pytest.raises(ValueError, match="a has failed"):
        jobs.run_jobs(todo, do, 2, children)
    assert time.perf_counter() - begin < 30 and sorted(asked) == ["a", "b"]


def test_a_failing_program_is_reported_and_its_output_is_kept(tmp_path, capfd):
    children, log = jobs.ChildProcesses(), tmp_path / "x.log"
    children.call([sys.executable, "-c", "print('one')"], log)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        children.call([sys.executable, "-c", "print('two'); raise SystemExit(3)"], log)
    assert failed.value.returncode == 3 and log.read_text().split() == ["one", "two"]
    assert f"failed, see {log}" in capfd.readouterr().err
    killed = tmp_path / "killed.py"
    killed.write_text("import os; os.kill(os.getpid(), 9)\n")
    for into, where in ((None, "signal 9\n"), (log, f"signal 9, see {log}\n")):
        with pytest.raises(subprocess.CalledProcessError):
            children.call([sys.executable, killed], into)
        assert capfd.readouterr().err == f"killed.py was killed by {where}"
    children.stop()
    with pytest.raises(subprocess.CalledProcessError):
        children.call([sys.executable, "-c", "print('three')"], log)
    assert "three" not in log.read_text()


def test_the_remaining_time(tmp_path, capsys):
    first, second = job(tmp_path, "a").run, job(tmp_path, "b").run
    progress = jobs.Progress([first, second])
    progress.begin(first, None)
    progress.end(first)
    progress.begin(second, tmp_path / "b.log")
    said = capsys.readouterr().out
    assert "run 1 of 2: a\n" in said and f"run 2 of 2: b ({tmp_path / 'b.log'}); about 0 min left" in said
