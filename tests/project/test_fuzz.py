"""A short run of `make fuzz`, and that it counts each kind of fault."""

import functools
import math
import os
import time

import numpy as np
import pytest

from tests.support.fuzz.__main__ import main
from tests.support.fuzz.mutations import change_bytes
from tests.support.fuzz.reader import Reader
from tests.support.fuzz.run import clean, fuzz, table


@pytest.mark.check
def test_no_reader_has_a_fault(tmp_path, capsys):
    assert main(["--count", "1000", "--keep", str(tmp_path), "--seed", "7"]) == 0, capsys.readouterr().out


def _seeds(folder):
    return [b"good"]


def _read(fault, folder, data):
    if data == b"good":
        return "good"
    if fault == "crash":
        raise KeyError("x")
    if fault == "died":
        os._exit(3)
    if fault == "hang":
        time.sleep(math.inf if data else 0)
    if fault == "memory":
        return np.ones(80_000_000, np.uint8).sum()
    if fault == "event":
        os.system("true")
    if fault == "writes":
        (folder.parent / "elsewhere-of-fuzz").write_bytes(b"")
    if fault == "refused":
        raise OSError("no")
    return "bad"


@pytest.mark.check
@pytest.mark.parametrize(
    "fault, counted", [("crash", "crash"), ("died", "crash"), ("hang", "hang"), ("memory", "memory"), ("silence", "silence"),
                       ("event", "event"), ("writes", "event"), ("refused", None)],
)  # fmt: skip
def test_faults_are_counted(fault, counted, tmp_path):
    reader = Reader("x/y", _seeds, functools.partial(_read, fault), change_bytes, 32, refuses_changes=fault == "silence",
                    make_handmade=functools.partial(dict, bad=(b"bad", "bad" if fault != "refused" else None)))  # fmt: skip
    tally = fuzz(reader, 0, 1, math.inf, 5 if fault == "hang" else 60, tmp_path / "kept", lambda: None)
    if fault == "silence":
        assert not tally.faults  # the handmade one is read as expected
        tally = fuzz(reader, 0, 3, math.inf, 60, tmp_path / "kept", lambda: None)
        counted = "silence" if sum(tally.faults.values()) else None
        assert tally.faults["silence"] >= 1
    assert set(tally.faults) == ({counted} if counted else set()) and clean([tally]) == (counted is None)
    assert bool(list((tmp_path / "kept").glob("*"))) == (counted is not None)
    assert "x/y" in table({"x/y": tally})
    (tmp_path.parent / "elsewhere-of-fuzz").unlink(missing_ok=True)
