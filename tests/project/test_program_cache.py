"""What is kept between runs in the user's folder."""

import json
import os
import subprocess
import sys
import time

import pytest

from icar_jax import program_cache
from tests.support.places import ROOT
from tests.support.programs import FLAGS
from tests.support.serverkit import draw

PROGRAM = """
import sys
from icar_jax import program_cache
late = "late" in sys.argv
if late:
    import jax
    jax.jit(lambda x: x - 1)(2.0)  # JAX has decided by now that there is no cache
folder = program_cache.enable()
import jax
counts = {"cache_hits": 0, "cache_misses": 0}
def count(event, **_):
    name = event.rpartition("/")[2]
    counts[name] = counts.get(name, 0) + 1
jax.monitoring.register_event_listener(count)
jax.jit(lambda x: x * 3 + 1)(2.0)
print(folder is not None, counts["cache_hits"], counts["cache_misses"])
"""


def run(cache, *words, **more):
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"ICAR_JAX_CACHE": str(cache), **more}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=env, capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICAR_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_second_start_compiles_nothing(cache):
    kept, hits, misses = run(cache)
    assert kept == "True" and hits == "0" and int(misses) > 0
    assert run(cache) == ["True", misses, "0"]
    assert run(cache, "late") == ["True", misses, "0"], "also where JAX has compiled before"
    (folder,) = (cache / "programs").iterdir()
    assert folder.stat().st_mode & 0o77 == 0 and list(folder.iterdir())


@pytest.mark.parametrize("more", [
    {"ICAR_JAX_CACHE": "off"}, {"JAX_COMPILATION_CACHE_DIR": "/tmp"}, {"JAX_NUM_CPU_DEVICES": "2"},
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
], ids=["switched off", "the user's own", "two devices", "eight devices"])  # fmt: skip
def test_it_stays_off(cache, monkeypatch, more):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    assert program_cache.enable() is None and not cache.exists()


def test_a_folder_that_others_can_write_is_not_used(cache):
    folder = cache / "programs" / "x"
    folder.mkdir(parents=True)
    assert program_cache.is_private(folder)
    folder.chmod(0o770)
    assert not program_cache.is_private(folder)
    folder.chmod(0o700)
    (cache / "programs").chmod(0o770)
    assert not program_cache.is_private(folder), "who can rename it can replace it"
    (cache / "programs").chmod(0o700)
    assert program_cache.is_private(folder)
    (cache / "file").write_text("")
    assert not program_cache.is_private(cache / "file" / "below")


def test_the_least_recently_used_programs_go_first(cache, monkeypatch):
    folder = cache / "programs" / "0-jaxlib1-x"
    folder.mkdir(parents=True)
    (cache / "programs" / "mine").mkdir()
    (cache / "programs" / "mine" / "empty-cache").touch()
    (folder / "mine.py").touch()
    for i, name in enumerate(["new-cache", "old-cache", "middle.stablehlo"]):
        (folder / name).write_bytes(b"x" * 100)
        at = time.time() - [0, 1000, 500][i]
        os.utime(folder / name, (at, at))
    (folder / "empty-cache").touch()
    monkeypatch.setattr(program_cache, "MOST_BYTES", 250)
    program_cache._prune(cache / "programs")
    assert sorted(file.name for file in folder.iterdir()) == ["middle.stablehlo", "mine.py", "new-cache"]
    assert (cache / "programs" / "mine" / "empty-cache").exists(), "a folder of somebody else"
    program_cache._prune(cache / "no such folder")


def test_another_processor_has_another_folder(monkeypatch):
    one = program_cache._processor()
    assert one == program_cache._processor() and len(one) == 10
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert program_cache._processor() != one


def test_a_file_is_checked_again_once_it_has_changed(cache, tmp_path, monkeypatch):
    file, calls = tmp_path / "weights", []

    def check(path):
        calls.append(path)
        return path.read_text()

    file.write_text("sum")
    assert program_cache.verified(file, "sum", check) and program_cache.verified(file, "sum", check)
    assert len(calls) == 2, "a file this new could change within the same tick"
    monkeypatch.setattr(program_cache, "_SETTLED_S", -1.0)
    for _ in range(3):
        assert program_cache.verified(file, "sum", check)
    assert len(calls) == 3
    assert not program_cache.verified(file, "another", check) and len(calls) == 4
    file.write_text("bad")
    assert not program_cache.verified(file, "sum", check) and len(calls) == 5
    monkeypatch.setenv("ICAR_JAX_CACHE", "off")
    file.write_text("sum")
    assert program_cache.verified(file, "sum", check) and program_cache.verified(file, "sum", check) and len(calls) == 7


def test_the_users_folder(monkeypatch):
    monkeypatch.setenv("ICAR_JAX_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(program_cache.user_folder()) == "/x/icar_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert str(program_cache.user_folder()) == "/h/.cache/icar_jax"
    monkeypatch.setenv("ICAR_JAX_CACHE", "~no-such-user/x")
    assert program_cache.user_folder().name == "x"
    monkeypatch.setenv("ICAR_JAX_CACHE", "OFF")
    assert program_cache.user_folder() is None


@pytest.mark.check
def test_the_second_start_of_a_command_compiles_nothing(tmp_path):
    gallery = draw(tmp_path / "pictures", 6)[0].parent
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["ICAR_JAX_CACHE"] = str(tmp_path / "cache")
    bundle = ROOT / "tests" / "fixtures" / "format_1" / "bundle_blocks"
    train = [*FLAGS, "--config.train.steps=2", "--config.train.eval_every=0"]
    for attempt in ("first", "second"):
        folder = tmp_path / attempt
        commands = {
            "index": ["index", str(gallery), "--store", str(folder / "store"), "--checkpoint", str(bundle)],
            "train": ["train", *train, f"--workdir={folder / 'run'}"],
        }
        for name, words in commands.items():
            profile = ["--profile", str(folder / name)] if name == "index" else [f"--profile={folder / name}"]
            subprocess.run([sys.executable, "-m", "icar_jax.cli", *words, *profile], env=env, check=True, timeout=600, cwd=ROOT)
            found = json.loads((folder / name / "summary.json").read_text())["compile"]
            assert found["programs"] >= 4 and found["from_cache"] == (found["programs"] if attempt == "second" else 0), name
