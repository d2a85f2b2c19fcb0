"""benchmarks/accelerator.py: what it records, leaves out and continues, and a dry run of every part on the CPU."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import accelerator
import accelerator_ops
import accelerator_sizes
import accelerator_towers
import numpy as np
import pytest
from accelerator import Clock, Part, Record, run_parts
from accelerator_sizes import SIZES

from tests.support.places import ROOT
from tests.support.programs import environment

ABOUT = {"size": "tiny", "device_kind": "cpu", "jax": "0"}
SCRIPT = ROOT / "benchmarks" / "accelerator.py"
# Runs the script where only its own packages can be imported.
ALONE = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

absent, script, sys.argv = sys.argv[1].split(","), sys.argv[2], sys.argv[2:]
sys.meta_path.insert(0, Absent())
runpy.run_path(script, run_name="__main__")
"""
OTHERS = "tqdm,PIL,tokenizers,ftfy,ml_collections,safetensors,grain,array_record,pyarrow,flatbuffers,matplotlib,torch"


def script(*arguments, absent=OTHERS, cwd):
    command = [sys.executable, "-c", ALONE, absent, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(cwd / "cache"), capture_output=True, text=True, timeout=580)


def part_of(name, cases, share=0.5):
    return Part(name, share, "", lambda size, done: iter([(case, run) for case, run in cases.items()]))


def names(record, part):
    return list(record.values["parts"][part]["cases"])


# --- recording and continuing ---


def test_every_result_is_written_at_once_and_not_measured_again(tmp_path):
    path, calls = tmp_path / "out.json", []

    def case(name):
        def run():
            calls.append(name)
            written = json.loads(path.read_text())["parts"]
            assert list(written["a"]["cases"])[-1] == name or name == "z"  # it is known that this case runs
            return {"value": len(calls)}

        return run

    parts = (part_of("a", {"x": case("x"), "y": case("y")}), part_of("b", {"z": case("z")}))
    run_parts(parts, None, Record(path, ABOUT), Clock(60, time.monotonic()))
    first = json.loads(path.read_text())
    assert first["parts"]["a"]["cases"]["y"]["value"] == 2 and first["parts"]["b"]["left_out"] == []
    run_parts(parts, None, Record(path, ABOUT), Clock(60, time.monotonic()))
    assert calls == ["x", "y", "z"] and json.loads(path.read_text()) == first


def test_what_the_time_does_not_allow_is_named_and_done_by_the_next_run(tmp_path, capsys, monkeypatch):
    path, now = tmp_path / "out.json", [0.0]
    monkeypatch.setattr(accelerator, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow():
        now[0] += 20
        return {"value": 1}

    parts = part_of("a", {"1": slow, "2": slow, "3": slow}), part_of("b", {"4": slow, "5": slow, "6": slow})
    record = Record(path, ABOUT)
    run_parts(parts, None, record, Clock(70, now[0]))
    # Half of the time is b's; its third case would take as long as the others, which is more than the 10 seconds left.
    assert names(record, "a") == ["1", "2"] and names(record, "b") == ["4"]
    assert record.values["parts"]["a"]["left_out"] == ["3"] and record.values["parts"]["b"]["left_out"] == ["5", "6"]
    assert "left out for lack of time: 2 cases, from '5'" in capsys.readouterr().out
    assert "left out of b: 5, 6" in accelerator.format_table(record)
    record = Record(path, ABOUT)
    run_parts(parts, None, record, Clock(600, now[0]))
    assert names(record, "a") == ["1", "2", "3"] and names(record, "b") == ["4", "5", "6"]
    now[0] += 1000
    run_parts(parts, None, record, Clock(0, now[0]))  # nothing is left to do, so nothing is left out
    assert [record.values["parts"][part]["left_out"] for part in "ab"] == [[], []]


def test_errors_and_figures_that_are_not_finite_are_results(tmp_path):
    def fails(text):
        def run():
            raise RuntimeError(text)

        return run

    cases = {
        "memory": fails("RESOURCE_EXHAUSTED: out of memory\nmore"),
        "other": fails("broken"),
        "nan": lambda: {"a": math.nan},
    }
    record = Record(tmp_path / "out.json", ABOUT)
    run_parts((part_of("a", cases),), None, record, Clock(60, time.monotonic()))
    found = record.done("a")
    assert found["memory"]["out_of_memory"] and found["memory"]["error"].endswith("out of memory")
    assert not found["other"]["out_of_memory"] and found["other"]["error"] == "RuntimeError: broken"
    assert "not JSON compliant" in found["nan"]["error"]
    assert "out of memory" in accelerator.format_table(record) and "error: RuntimeError: broken" in accelerator.format_table(
        record
    )


def test_a_case_that_ends_the_process_is_tried_once_more(tmp_path):
    path, runs = tmp_path / "out.json", []

    def dies():
        runs.append(1)
        raise KeyboardInterrupt  # stands for a process that is killed: nothing more is written

    parts = (part_of("a", {"dies": dies, "lives": lambda: {"value": 1}}),)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_parts(parts, None, Record(path, ABOUT), Clock(60, time.monotonic()))
    record = Record(path, ABOUT)
    run_parts(parts, None, record, Clock(60, time.monotonic()))
    assert len(runs) == 2 and "value" in record.done("a")["lives"]
    assert record.done("a")["dies"]["error"] == "this case ended the process"


def test_a_file_of_another_device_is_not_continued(tmp_path):
    Record(tmp_path / "out.json", ABOUT).write()
    with pytest.raises(SystemExit, match="device_kind 'cpu', now 'NVIDIA H200'. Choose another file"):
        Record(tmp_path / "out.json", {**ABOUT, "device_kind": "NVIDIA H200"})


# --- parts ---


def test_batches_double_until_memory_does_not_suffice():
    done, order = {}, []
    for name, _ in accelerator_towers.training(SIZES["full"], done):
        order.append(name)
        batch = int(name.rpartition(" ")[2])
        memory = {"error": "RuntimeError", "out_of_memory": True} if batch > 1024 else {"pairs_per_s": 1.0}
        done[name] = {"skipped": "no GPU"} if "cudnn" in name else memory
    assert order[:2] == ["cudnn remat full batch 512", "xla remat full batch 512"]
    batches = lambda start: [int(name.rpartition(" ")[2]) for name in order if name.startswith(start)]
    assert batches("xla remat full") == [512, 1024, 2048] and batches("xla remat none") == [256, 512, 1024, 2048]
    assert batches("cudnn remat full") == [512]


@pytest.mark.parametrize(
    "kind, tflops",
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459),
     ("TPU v4", 275), ("TPU v6 lite", 918), ("cpu", None), ("NVIDIA A10G", None)],
)  # fmt: skip
def test_peak_of_a_device(kind, tflops):
    assert accelerator_sizes.peak_flops(kind) == (None if tflops is None else tflops * 1e12)


def test_errors_of_operations():
    expected = np.array([1.0, -4.0])
    assert accelerator_ops.error_of(np.array([1.0, -3.0]), expected) == 0.25
    assert accelerator_ops.error_of(np.array([np.nan, -4.0]), expected) == math.inf
    assert accelerator_ops.error_of(np.array([0.5]), np.array([0.0])) == 0.5


@pytest.mark.parametrize("wrong, error", [(lambda x: 1.1 * x, "1.0e-01"), (lambda x: x / 0, "not finite")])
def test_an_operation_that_is_wrong_fails(monkeypatch, wrong, error):
    monkeypatch.setattr(accelerator_ops.ops, "quick_gelu", lambda x: wrong(x) if x.dtype == accelerator_ops.BF16 else x)
    found = accelerator_ops.check_operation(SIZES["tiny"], "quick_gelu", accelerator_ops.BF16)
    assert accelerator.summary("kernels", found).startswith(f"FAILED, error {error}")


def test_longest_operations_of_a_trace():
    name = lambda kind, pid, tid, text: {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": text}}
    op = lambda pid, tid, text, us: {"ph": "X", "pid": pid, "tid": tid, "name": text, "dur": us, "ts": 0}
    host = [name("process_name", 1, 0, "/host:CPU"), name("thread_name", 1, 5, "tf_XLAEigen/5"), op(1, 5, "dot.7", 3000.0),
            op(1, 5, "while.1", 9000.0), op(1, 5, "Thunk::Run", 9000.0), op(1, 5, "dot.12", 1000.0)]  # fmt: skip
    found = accelerator_towers.longest_operations(host)
    assert found == {"traced_ms": 4.0, "longest": [{"name": "dot", "ms": 4.0, "count": 2, "share": 1.0}]}
    device = [name("process_name", 2, 0, "/device:GPU:0"), name("thread_name", 2, 14, "Stream #14(Compute)"),
              name("thread_name", 2, 15, "XLA Modules"), op(2, 15, "jit_step", 9e3)]  # fmt: skip
    device += [op(2, 14, f"kernel_{chr(97 + i)}", 1000.0 * (i + 1)) for i in range(12)]
    found = accelerator_towers.longest_operations(host + device)
    assert len(found["longest"]) == 10 and found["longest"][0] == {
        "name": "kernel_l", "ms": 12.0, "count": 1, "share": 12 / 78,
    }  # fmt: skip


# --- the command ---


def test_a_missing_package_is_named_in_one_line(tmp_path):
    found = script("--list", absent="optax", cwd=tmp_path)
    assert found.returncode == 1 and "optax" in found.stderr and len(found.stderr.strip().splitlines()) == 1


@pytest.mark.check
def test_a_dry_run_measures_every_part_with_four_packages_and_is_continued(tmp_path):
    found = script("--json", "out.json", "--minutes", 9, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    record = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)  # NaN and Infinity
    parts = record["parts"]
    assert list(parts) == ["environment", "kernels", "training", "encoding", "attention", "trace"]
    results = {(part, case): result for part, values in parts.items() for case, result in values["cases"].items()}
    assert not [case for case, result in results.items() if "error" in result], results
    assert not [part for part, values in parts.items() if values["left_out"]]
    assert record["size"] == "tiny" and results["environment", "machine"]["platform"] == "cpu"
    without = [case for (part, case), result in results.items() if "skipped" in result]
    assert without and all("cudnn" in case for case in without)
    checked = {case for (part, case), result in results.items() if part == "kernels" and result.get("passed")}
    assert checked == {case for case in parts["kernels"]["cases"] if "cudnn" not in case} and len(checked) == 29
    for (part, case), result in results.items():
        if part in ("training", "encoding", "attention") and "skipped" not in result:
            assert result["median_s"] > 0 and result["steps"] >= 2 and result["tflops"] > 0 and result["of_peak"] is None, case
    trained = results["training", "xla remat full batch 4"]
    assert trained["pairs_per_s"] == pytest.approx(4 / trained["median_s"]) and trained["recomputed_tflops"] > 0
    assert results["encoding", "routed, equal shares"]["of_parts"] > 0
    assert results["trace", "step xla remat full batch 2"]["longest"][0]["ms"] > 0
    for case in ("xla remat full batch 4", "routed, equal shares", "linear bfloat16"):
        assert case in found.stdout.rpartition("\npart ")[2]

    again = script("--json", "out.json", "--only", "kernels", "--only", "environment", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.startswith("\npart ")  # nothing was measured
    assert json.loads((tmp_path / "out.json").read_text()) == record
    redone = script("--json", "out.json", "--only", "environment", "--redo", cwd=tmp_path)
    assert redone.returncode == 0 and "environment machine" in redone.stdout
    changed = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert changed["environment"] != parts["environment"] and changed["kernels"] == parts["kernels"]
