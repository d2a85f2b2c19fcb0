"""Real processes on one machine: how they start, agree, train as one, and end together."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from icar_jax import checkpoint, pytree
from icar_jax import workdir as files
from icar_jax.config import ConfigError, MeshConfig
from icar_jax.parallel import distributed
from icar_jax.parallel.mesh import batch_sharding, make_mesh
from icar_jax.training.preemption import Agreement, StopRequest
from tests.support import programs

STEPS = ("--config.train.steps=4", "--config.train.checkpoint_every=2")
EVALUATED = ("--config.train.eval_every=2", "--config.train.keep_best")
LONG = ("--config.train.steps=400", "--config.train.checkpoint_every=1000", "--config.data.scenes_size=2000")
SLURM = dict.fromkeys(distributed._SLURM, "0") | {"SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"coordinator": "h:1"}, "--processes, --process missing"),
        ({"processes": 2}, "--coordinator, --process missing"),
        ({"processes": 2, "process": 0}, "--coordinator missing"),
        ({"coordinator": "h", "processes": 2, "process": 0}, "--coordinator=h must be host:port"),
        ({"coordinator": "h:x", "processes": 2, "process": 0}, "--coordinator=h:x must be host:port"),
        ({"coordinator": "h:1", "processes": -2, "process": 0}, "--processes=-2 must be at least 1"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "--process=2 must be between 0 and 1"),
        ({"coordinator": "h:1", "processes": 2, "process": -3}, "--process=-3 must be between 0 and 1"),
        ({"coordinator": "h:1", "processes": 2, "process": 0, "timeout_s": 0}, "--start_timeout_s=0 must be at least 1"),
    ],
)
def test_incomplete_or_contradictory_flags(flags, message, monkeypatch):
    monkeypatch.setattr(distributed, "cluster", lambda environ: None)
    with pytest.raises(ConfigError, match=message):
        distributed.start(**flags)


@pytest.mark.parametrize(
    "environ, found",
    [
        ({}, None),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # an allocation, but no srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_SKIP_MDS_QUERY": "1"}, None),
    ],
)
def test_launchers_are_found_by_what_they_set(environ, found):
    assert distributed.cluster(environ | {"TPU_SKIP_MDS_QUERY": "1"}) == found


@pytest.mark.parametrize(
    "environ, flags, arguments",
    [
        (SLURM, {}, {}),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            {"coordinator": "h:1"},
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1},
        ),
        (
            {},
            {"coordinator": "[::1]:8", "processes": 3, "process": 0},
            {"coordinator_address": "[::1]:8", "num_processes": 3, "process_id": 0},
        ),
        ({}, {"coordinator": "h:1", "processes": 1, "process": 0}, None),
        ({}, {}, None),
    ],
)
def test_what_jax_is_told(environ, flags, arguments, monkeypatch):
    calls = []
    monkeypatch.setattr(distributed.os, "environ", environ | {"TPU_SKIP_MDS_QUERY": "1"})
    monkeypatch.setattr(jax.distributed, "initialize", lambda initialization_timeout, **kwargs: calls.append(kwargs))
    distributed.start(**flags)
    assert calls == ([] if arguments is None else [arguments])


def test_a_launcher_without_an_address_asks_for_one(monkeypatch):
    monkeypatch.setattr(distributed.os, "environ", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})
    with pytest.raises(ConfigError, match="process 1 of 2.*pass --coordinator=HOST:PORT"):
        distributed.start()
    with pytest.raises(ConfigError, match="evaluate.py runs in one process, but Open MPI started several"):
        distributed.require_single("evaluate.py")


def test_a_workdir_that_is_not_shared_is_noticed(tmp_path):
    files.write_token(tmp_path, 17)
    files.require_token(tmp_path, 17)
    for other in (18, tmp_path):
        folder = tmp_path / "elsewhere" if other is tmp_path else tmp_path
        with pytest.raises(ConfigError, match="not the same folder in all processes"):
            files.require_token(folder, 18, wait_s=0.3)


def test_one_process_agrees_with_itself():
    mesh = make_mesh(MeshConfig())
    assert distributed.batch_part(batch_sharding(mesh), 8) == (0, 1)
    np.testing.assert_array_equal(distributed.greatest(np.array([3, 1])), [3, 1])
    assert distributed.from_main(5) == 5 and distributed.is_main()
    distributed.require_same("thing", "a")
    with pytest.raises(KeyError), distributed.together("working"):
        raise KeyError
    array = jax.device_put(np.arange(6.0), NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(distributed.to_main(array), np.arange(6.0))
    request = StopRequest()
    stop = Agreement(request)
    assert stop(array) is None
    request.name = "SIGINT"
    assert stop(array) == "SIGINT"


SCRIPT = """
import os, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from icar_jax.config import ConfigError, MeshConfig
from icar_jax.parallel import distributed
from icar_jax.parallel.mesh import batch_sharding, make_mesh
from icar_jax.training.preemption import Agreement, StopRequest

me = int(sys.argv[2])
distributed.start(sys.argv[1], 2, me, timeout_s=60)
assert jax.process_count() == 2 and jax.device_count() == 4 and distributed.is_main() == (me == 0)
assert distributed.from_main(7 + me) == 7
np.testing.assert_array_equal(distributed.greatest(np.array([me, 1 - me])), [1, 1])
distributed.require_same("thing", "a")
try:
    distributed.require_same("thing", f"a{me}")
    raise SystemExit("not noticed")
except distributed.PeerError as error:
    assert str(error).startswith("process 1 has a different thing than process 0"), error
with distributed.together("resting"):
    pass
try:
    with distributed.together("reading"):
        if me == 1:
            raise OSError("broken disk")
    raise SystemExit("not noticed")
except OSError as error:
    assert me == 1 and str(error) == "broken disk"
except distributed.PeerError as error:
    assert me == 0 and str(error).startswith("process 1 of 2 failed while reading"), error
if me == 0:
    time.sleep(1.0)
begun = distributed.main_first("indexing", lambda: (time.sleep(0.5 * (1 - me)), time.time())[1])
times = multihost_utils.process_allgather(np.float32(begun % 1e4))
assert times[0] < times[1], times  # process 1 began when process 0 had ended

# data x fsdp over the processes: each has its half. A tensor axis across them: both read everything.
assert distributed.batch_part(batch_sharding(make_mesh(MeshConfig(4, 1, 1))), 8) == (me, 2)
assert distributed.batch_part(batch_sharding(make_mesh(MeshConfig(1, 4, 1))), 8) == (me, 2)
assert distributed.batch_part(batch_sharding(make_mesh(MeshConfig(1, 1, 4))), 8) == (0, 1)
devices = jax.devices()
across = make_mesh(MeshConfig(2, 1, 2), [devices[0], devices[2], devices[1], devices[3]])
assert distributed.batch_part(batch_sharding(across), 8) == (0, 1)
uneven = make_mesh(MeshConfig(3, 1, 1), devices[:3])
try:
    distributed.batch_part(batch_sharding(uneven), 6)
    raise SystemExit("not noticed")
except ConfigError as error:
    assert "partially overlap" in str(error)

mesh = make_mesh(MeshConfig(2, 2, 1))
whole = np.arange(24.0).reshape(4, 6)
leaf = jax.make_array_from_callback((4, 6), NamedSharding(mesh, P("data", "fsdp")), lambda i: whole[i])
found = distributed.to_main(leaf)
assert found is None if me else np.array_equal(found, whole)

# A signal that one process gets stops both before the same step.
request, answers = StopRequest(), []
stop = Agreement(request)
for step in range(6):
    if step == 2 and me == 1:
        request.name = "SIGTERM"
    answers.append(stop(leaf))
assert answers == [None, None, None, "SIGTERM", "SIGTERM", "SIGTERM"], answers
print("agreed", flush=True)

# A fault of one process alone: it does not wait for its peer, which may be waiting for it.
distributed._ending_together = False
if me == 1:
    with distributed.exit_on_error():
        raise ValueError("alone")
time.sleep(3)
os._exit(0)
"""


@pytest.mark.check
def test_two_processes_agree(tmp_path):
    """The small collectives that the loop is made of; at the end one process fails alone."""
    environ = programs.environment(tmp_path, devices=2)
    address = programs.free_address()
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, address, str(i)],
            cwd=programs.ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    (code, out, err), (alone, other, traceback) = [programs.finish(p, timeout=120) for p in pair]
    assert code == 0 and "agreed" in out, err[-3000:]
    assert alone == 1 and "agreed" in other and "ValueError: alone" in traceback, traceback[-3000:]


SLOW = """
import os, sys, time
from icar_jax.parallel import distributed

me = int(sys.argv[2])
distributed.start(sys.argv[1], 2, me, timeout_s=60)
with distributed.together("opening the data"):
    time.sleep(0 if me else 33)
print("agreed", flush=True)
os._exit(0)
"""


@pytest.mark.check
def test_a_process_may_keep_the_others_waiting_at_the_start(tmp_path):
    """CPUs wait 30 s for each other's first collective, which indexing shards or training a tokenizer may take longer than."""
    address, environ = programs.free_address(), programs.environment(tmp_path)
    command = [sys.executable, "-c", SLOW, address]
    pipes = {"cwd": programs.ROOT, "env": environ, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    for code, out, err in [programs.finish(p, timeout=120) for p in pair]:
        assert code == 0 and "agreed" in out, err[-3000:]


@pytest.mark.check
def test_a_missing_process_is_named_in_time():
    begun = time.monotonic()
    flags = ("--coordinator=localhost:1", "--processes=2", "--process=1", "--start_timeout_s=4")
    code, _, err = programs.finish(programs.start("unused", "unused", *flags), timeout=60)
    assert code == 2 and "error: not all of 2 processes at localhost:1 connected within 4 s" in err, err[-2000:]
    assert time.monotonic() - begun < 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def require_near(found, expected, rel=1e-5):
    """The same lines, with the same losses and evaluations to `rel`."""
    assert [sorted(line) for line in found] == [sorted(line) for line in expected]
    for a, b in zip(found, expected, strict=True):
        compared = [k for k in a if k.startswith(("loss", "eval", "step", "lr"))]
        assert {k: a[k] for k in compared} == pytest.approx({k: b[k] for k in compared}, rel=rel)


@pytest.mark.check
def test_two_processes_train_as_one(cache, tmp_path):
    """Four steps with evaluations: losses to 1e-5, the same recalls, and one process alone has written."""
    one, two = tmp_path / "one", tmp_path / "two"
    programs.run(one, cache, *STEPS, *EVALUATED)
    pair = programs.start_several([two, two], cache, *STEPS, *EVALUATED)
    results = [programs.finish(process) for process in pair]
    assert [code for code, _, _ in results] == [0, 0], results
    assert f"Finished: {two}/model" in results[0][1]
    assert "Finished" not in results[1][1] and "train clip" not in results[1][2]
    require_near(programs.curve(two), programs.curve(one))
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    for folder in ("model", "best"):
        a, b = (checkpoint.read(w / folder, "clip") for w in (two, one))
        assert a.description["arch"] == b.description["arch"] and a.tokenizer == b.tokenizer
        x, y = (np.concatenate([np.ravel(leaf) for leaf in pytree.flatten(c.params).values()]) for c in (a, b))
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), folder


@pytest.mark.check
def test_two_processes_with_workers_are_stopped_and_one_without_continues(cache, tmp_path):
    """SIGTERM to one of them saves in both; 1 process with no data worker continues what 2 x 2 began."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pair = programs.start_several([parts, parts], cache, *LONG, "--config.data.workers=2")
    assert programs.wait_for(lambda: programs.last_step(parts) >= 2, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    results = [programs.finish(process) for process in pair]
    assert [code for code, _, _ in results] == [0, 0], results
    (step,) = programs.saved_steps(parts)
    assert f"Stopped by SIGTERM after step {step} of 400" in results[0][1]
    for workdir in (parts, whole):
        alone = programs.start(workdir, cache, *LONG)
        assert programs.wait_for(lambda: programs.last_step(workdir) >= step + 4, alone)
        alone.kill()
        programs.finish(alone)
    require_near(*(programs.curve(workdir)[: step + 4] for workdir in (parts, whole)))


@pytest.mark.check
def test_a_process_that_is_lost_ends_the_other_with_a_message(cache, tmp_path):
    pair = programs.start_several([tmp_path, tmp_path], cache, *LONG)
    assert programs.wait_for(lambda: programs.last_step(tmp_path) >= 2, pair[0])
    pair[1].kill()
    begun = time.monotonic()
    code, _, err = programs.finish(pair[0], timeout=150)
    programs.finish(pair[1])
    assert code == 2 and "error: another process of this run ended or cannot be reached" in err, err[-3000:]
    assert time.monotonic() - begun < 60


@pytest.mark.check
def test_processes_with_two_folders_say_so(cache, tmp_path):
    """Two folders instead of one. Neither gets a checkpoint."""
    both = [tmp_path / "a", tmp_path / "b"]
    pair = programs.start_several(both, cache, *LONG)
    (code, _, err), (other, _, reason) = [programs.finish(process) for process in pair]
    assert (code, other) == (2, 2), (err, reason)
    assert "process 1 of 2 failed while reading the workdir" in err
    assert f"--workdir={both[1]} is not the same folder in all processes" in reason
    assert not any(programs.saved_steps(w) for w in both)
