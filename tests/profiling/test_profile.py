"""A profile: every second is counted once, a few steps are traced, and without one nothing happens."""

import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from icar_jax import profiling
from icar_jax.config import ConfigError
from icar_jax.profiling import folder as folders
from icar_jax.profiling import profiler as module
from icar_jax.profiling.partition import Compilations, Partition
from icar_jax.profiling.profiler import Profile
from icar_jax.profiling.summary import ROWS


class Clock:
    """A clock that stands still unless it is moved."""

    now = 100.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def traces(folder):
    return sorted((folder / "trace").rglob("*.xplane.pb"))


def test_sections_inside_others_take_their_time_from_them(clock):
    made = Partition("starting", since=97.0, clock=clock)
    clock.pass_(1)
    with made.section("step"):
        clock.pass_(10)
        with made.section("transfer"):
            clock.pass_(2)
            with made.section("input wait"):
                clock.pass_(4)
        clock.pass_(20)
    made.outside("other")
    clock.pass_(5)
    assert made.seconds() == {"starting": 4, "step": 30, "transfer": 2, "input wait": 4, "other": 5}
    assert sum(made.seconds().values()) == clock.now - 97


def test_a_section_that_fails_is_counted_and_left(clock):
    made = Partition("other", clock=clock)
    with pytest.raises(ValueError), made.section("saving"):
        clock.pass_(3)
        raise ValueError
    clock.pass_(1)
    assert made.seconds() == {"other": 1, "saving": 3}


def test_seconds_move_from_the_open_section_but_not_more_than_it_has(clock):
    made = Partition("other", clock=clock)
    clock.pass_(1)
    with made.section("step"):
        clock.pass_(3)
        assert made.move("compile", 2) == 2 and made.move("compile", 5) == 1 and made.move("compile", -1) == 0
    assert made.seconds() == {"other": 1, "step": 0, "compile": 3}


def test_events_inside_an_event_are_counted_once():
    # Tracing from 0 to 10, with traces from 1 to 3 and from 4 to 8, and in the latter one from 5 to 6; then one from 11 to 12.
    ended, seen = [(3, 2), (6, 1), (8, 4), (10, 10), (12, 1)], Compilations()
    assert [seen.own_seconds(seconds, end) for end, seconds in ended] == [2, 1, 3, 4, 1]


def test_without_a_profile_nothing_is_done(monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", lambda _: pytest.fail("waited for the device"))
    numbers, batches, values = range(3), iter(()), object()
    assert profiling.steps(numbers, 8, "pairs") is numbers and profiling.batches(batches) is batches
    assert profiling.ready(values) is values and profiling.section("step") is profiling.section("saving")
    with profiling.section("step"), profiling.section("step"):
        profiling.device_wait(1.0, 1.0, 1.0)
    with profiling.profile(None, "train"):
        assert type(module._current) is module.NoProfile


def test_a_profile_partitions_a_run_and_traces_ten_steps(tmp_path, capsys):
    step = jax.jit(lambda x: jnp.sin(x) @ x + 0.123)
    with profiling.profile(tmp_path / "new" / "profile", "train"):
        x = jnp.ones((20, 20))
        for number in profiling.steps(range(101, 118), 8, "pairs"):
            with profiling.section("step"):
                profiling.ready(step(x))
            if number == 105:
                with profiling.section("saving"):
                    pass
    assert type(module._current) is module.NoProfile
    found, printed = summary_of(tmp_path / "new" / "profile"), capsys.readouterr().out
    assert set(found["seconds"]) == set(ROWS["train"])
    assert sum(found["seconds"].values()) == pytest.approx(found["total_s"]) and min(found["seconds"].values()) >= 0
    assert found["compile"]["programs"] >= 1 and found["compile"]["trace_s"] > 0 and found["seconds"]["compile"] > 0
    assert sum(found["compile"][stage] for stage in ("trace_s", "lower_s", "xla_s")) == pytest.approx(
        found["seconds"]["compile"]
    )
    assert (found["steps"], found["count"], found["unit"], found["finished"]) == (17, 136, "pairs", True)
    assert found["slowest_step"] in range(101, 118) and found["slowest_step_s"] >= found["median_step_s"] > 0
    assert found["trace"]["steps"] == [104, 113] and len(traces(tmp_path / "new" / "profile")) == 1
    lines = printed.splitlines()
    tabular = [line for line in lines if str(tmp_path) not in line]
    assert len(lines) <= 20 and max(map(len, tabular)) <= 80
    shares = [float(line.split("%")[0].split()[-1]) for line in lines if "%" in line]
    assert len(shares) == len(ROWS["train"]) and sum(shares) == pytest.approx(100, abs=0.5)
    assert "Trace of steps 104 to 113: " in printed and "xprof" in printed and "pairs/s in 17 steps" in printed


def test_the_next_profile_replaces_the_one_in_its_folder(tmp_path):
    for _ in range(2):
        with profiling.profile(tmp_path, "index"):
            for _ in profiling.batches([{"clip": [0] * 5}, {"clip": [0] * 3}]):
                pass
    found = summary_of(tmp_path)
    assert (found["steps"], found["count"], found["unit"]) == (2, 8, "images") and set(found["seconds"]) == set(ROWS["index"])
    assert len(traces(tmp_path)) == 1 and found["trace"]["steps"] == [1, 2]


def test_batches_of_several_shards_are_numbered_on_and_traced_once(tmp_path):
    with profiling.profile(tmp_path, "embed"):
        for _ in range(3):
            list(profiling.batches([{"clip": [0]}] * 4))
    assert summary_of(tmp_path)["steps"] == 12 and summary_of(tmp_path)["trace"]["steps"] == [1, 10]


def test_an_interrupted_run_is_summed_up_as_far_as_known(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), profiling.profile(tmp_path / "p", "train"):
        for number in profiling.steps(range(1, 10), 4, "images"):
            if number == 6:
                raise KeyboardInterrupt
    found = summary_of(tmp_path / "p")
    assert (found["steps"], found["finished"], found["error"]) == (5, False, "KeyboardInterrupt")
    assert "ended by KeyboardInterrupt" in capsys.readouterr().out and len(traces(tmp_path / "p")) == 1


def test_before_the_first_step_nothing_is_written(tmp_path, capsys):
    with pytest.raises(ConfigError), profiling.profile(tmp_path / "p", "train"):
        raise ConfigError("config.optim.lr")
    assert capsys.readouterr().out == ""
    with profiling.profile(tmp_path / "p", "index"):
        assert not list(profiling.batches([]))
    assert "No batch was run" in capsys.readouterr().out and not (tmp_path / "p").exists()


def test_other_threads_are_not_timed(tmp_path):
    def elsewhere():
        with profiling.section("saving"):
            profiling.device_wait(1.0, 1.0, 1.0)
            jax.jit(lambda x: x * 2.125)(jnp.ones(3))

    with profiling.profile(tmp_path, "embed"):
        for _ in profiling.batches([{"clip": [0]}]):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
    found = summary_of(tmp_path)
    assert found["seconds"]["saving"] == found["seconds"]["towers"] == 0 and found["compile"]["programs"] >= 1


def test_the_wait_for_the_device_is_shared_by_its_work(clock, tmp_path):
    made = Profile(tmp_path, "embed", clock=clock)
    with made.section("transfer"):
        clock.pass_(10)
        made.device_wait(8.0, towers=3.0, router=1.0)
        made.device_wait(1.0, towers=0.0, router=0.0)  # nothing is known of it
    found = made.summary().seconds
    assert (found["transfer"], found["towers"], found["router"]) == (2, 6, 2)


def test_an_evaluation_ends_the_trace(tmp_path):
    with profiling.profile(tmp_path, "train"):
        for number in profiling.steps(range(1, 12), 4, "images"):
            if number == 6:
                with profiling.section("evaluating"):
                    pass
    assert summary_of(tmp_path)["trace"]["steps"] == [4, 6]


@pytest.mark.parametrize("call", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_does_not_end_the_run(call, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("disk full")

    if call == "stop_trace":
        monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, call, full)
    with profiling.profile(tmp_path, "train"):
        assert list(profiling.steps(range(1, 3), 4, "images")) == [1, 2]
    assert "The trace failed: disk full" in capsys.readouterr().out
    assert summary_of(tmp_path)["trace"]["error"] == "disk full" and summary_of(tmp_path)["steps"] == 2


def test_a_summary_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with profiling.profile(tmp_path, "train"):
        for _ in profiling.steps(range(1, 2), 4, "images"):
            monkeypatch.setattr("icar_jax.workdir.write_text", full)
    captured = capsys.readouterr()
    assert "Profile of icar train" in captured.out and captured.err.startswith("warning: ") and captured.err.count("\n") == 1


def refusal(folder):
    with pytest.raises(ConfigError) as error, profiling.profile(folder, "train"):
        pytest.fail("the run began")
    assert "\n" not in str(error.value) and str(error.value).startswith("--profile")
    return str(error.value)


def test_a_folder_that_is_not_of_a_profile_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text('{"mine": 1}')
    assert "not empty" in refusal(tmp_path) and "not empty" in refusal(tmp_path / "other")
    assert "is a file" in refusal(tmp_path / "notes.txt") and "is a file" in refusal(tmp_path / "notes.txt" / "p")
    assert "is an address" in refusal("s3://bucket/p") and "is an address" in refusal(Path("gs://bucket/p"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "other"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.os, "access", lambda *_: False)  # root may write anywhere
    assert "cannot be written" in refusal(tmp_path / "p")
    monkeypatch.undo()
    monkeypatch.setattr(folders.Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match="--profile=.*Permission denied"), profiling.profile(tmp_path / "p", "train"):
        for _ in profiling.steps(range(1, 2), 4, "images"):
            pytest.fail("the run began")
