"""What a user can cause derives from IcarError and ends in one line; anything else is a bug and shows where it came from."""

import ast
import subprocess
import sys

import pytest

import icar_jax
from icar_jax import cli
from icar_jax.errors import IcarError
from tests.support.places import ROOT

FILES = sorted((ROOT / "icar_jax").rglob("*.py"))


def bases():
    """{name of an exception class of the package: names of its bases}"""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = [base.id for base in node.bases if isinstance(base, ast.Name)]
                if any(name.endswith(("Error", "Exception")) for name in names):
                    yield node.name, names


def test_every_exception_of_the_package_derives_from_icar_error():
    found = dict(bases())
    known = {"IcarError"}
    while grown := {name for name, names in found.items() if known & set(names)} - known:
        known |= grown
    # A request that is refused is an answer of the server, not an end of the program; the other one never leaves its file.
    assert set(found) - known == {"RequestError", "_Malformed"} and len(known) > 20


def run(*words):
    return subprocess.run([sys.executable, "-m", "icar_jax.cli", *words], cwd=ROOT, capture_output=True, text=True)


def test_an_error_of_the_user_is_one_line_and_debug_shows_where_it_came_from():
    plain, debug = run("describe", "nowhere"), run("describe", "nowhere", "--debug")
    assert plain.returncode == debug.returncode == 2
    assert plain.stderr.startswith("error: ") and plain.stderr.count("\n") == 1
    assert "Traceback" in debug.stderr and debug.stderr.endswith(plain.stderr)
    train = run("train", "--debug", "--config=nowhere")
    assert train.returncode == 2 and "Traceback" in train.stderr and "error: --config=nowhere" in train.stderr


@pytest.mark.parametrize("fault", [ValueError, TypeError, RuntimeError, KeyError])
def test_a_bug_inside_the_package_keeps_its_traceback(fault, monkeypatch, capsys):
    def broken(*_):
        raise fault("shapes [3, 4] and [4, 3] do not fit")

    monkeypatch.setattr("icar_jax.checkpoint.find", broken)
    with pytest.raises(fault, match="do not fit"):
        cli.main(["describe", "model"])
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize("mistake", [IcarError("mend this"), PermissionError(13, "Permission denied", "model")])
def test_an_error_of_the_user_ends_in_status_2(mistake, monkeypatch, capsys):
    def refused(*_):
        raise mistake

    monkeypatch.setattr("icar_jax.checkpoint.find", refused)
    with pytest.raises(SystemExit) as end:
        cli.main(["describe", "model"])
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {mistake}\n"


def test_the_base_is_public():
    assert icar_jax.IcarError is IcarError
