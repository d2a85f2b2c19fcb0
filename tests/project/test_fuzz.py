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
    assert main(["--count", "300", "--keep", str(tmp_path), "--seed", "7"]) == 0, capsys.readouterr().out


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
        time.sleep(3600)
    if fault == "memory":
        np.ones(80_000_000, np.uint8)
    if fault == "event":
        os.system("true")
    if fault == "writes":
        open("/dev/null", "wb").close()
    if fault == "refused":
        raise OSError("no")
    return "bad"


@pytest.mark.check
@pytest.mark.parametrize(
    "fault, counted", [("crash", "crash"), ("died", "crash"), ("hang", "hang"), ("memory", "memory"), ("silence", "silence"),
                       ("event", "event"), ("writes", "event"), ("refused", None)],
)  # fmt: skip
def test_faults_are_counted(fault, counted, tmp_path):
    expected = None if fault in ("silence", "refused") else "bad"
    make = functools.partial(dict, bad=(b"bad", expected))
    reader = Reader("x/y", _seeds, functools.partial(_read, fault), change_bytes, 32, make_handmade=make)
    tally = fuzz(reader, 0, 1, math.inf, 5 if fault == "hang" else 60, tmp_path / "kept", lambda: None)
    assert tally.inputs == 1
    assert set(tally.faults) == ({counted} if counted else set()) and clean([tally]) == (counted is None)
    assert [file.read_bytes() for file in (tmp_path / "kept").glob("x y-0-*")] == ([b"bad"] if counted else [])
    assert "x/y" in table({"x/y": tally})
