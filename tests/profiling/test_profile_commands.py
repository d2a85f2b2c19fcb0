"""`--profile` of train, embed and index on small runs."""

import json
import re

import numpy as np
import pytest
from absl import flags

import icar_jax
from icar_jax import cli, profiling
from icar_jax.evaluation import during_training
from icar_jax.profiling.summary import ROWS
from icar_jax.training.loop import train
from tests.support import programs
from tests.support.collected import draw
from tests.support.places import ROOT
from tests.support.runs import metric_lines, tiny_config

BUNDLE = ROOT / "tests" / "fixtures" / "format_1" / "bundle_complexity"


def checked(folder, command):
    """The summary in `folder`, which must account for the whole run and lie beside a trace."""
    found = json.loads((folder / "summary.json").read_text())
    assert found["command"] == command and list(found["seconds"])[: len(ROWS[command])] == list(ROWS[command])
    assert sum(found["seconds"].values()) == pytest.approx(found["total_s"])
    assert all(seconds >= 0 for seconds in found["seconds"].values()) and set(found["seconds"]) == set(ROWS[command])
    assert len(list((folder / "trace").rglob("*.xplane.pb"))) == 1 and found["trace"]["error"] is None
    return found


def losses(workdir):
    return [{name: value for name, value in line.items() if not name.endswith("_per_s")} for line in metric_lines(workdir)]


def test_train_accounts_for_its_time_and_trains_alike(tmp_path, capsys):
    config = tiny_config(eval_every=4)
    make = (during_training.evaluator(config),)
    with profiling.profile(tmp_path / "run" / "profile", "train"):
        train(config, tmp_path / "run", evaluators=make)
    found = checked(tmp_path / "run" / "profile", "train")
    assert (found["steps"], found["count"], found["unit"], found["trace"]["steps"]) == (4, 32, "pairs", [4, 4])
    for row in ("starting", "input wait", "transfer", "step", "saving", "evaluating", "other"):
        assert found["seconds"][row] > 0, row
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {row} +\d+\.\d\d s +\d+\.\d%", printed, re.MULTILINE) for row in ROWS["train"])
    train(config, tmp_path / "plain", evaluators=make)
    assert losses(tmp_path / "plain") == losses(tmp_path / "run") and "Profile" not in capsys.readouterr().out


@pytest.fixture
def pictures(tmp_path):
    return draw(tmp_path / "pictures", 23)


def test_embed_profiles_into_the_corpus(pictures, tmp_path, capsys):
    command = ["embed", str(pictures), "--checkpoint", str(BUNDLE), "--out", str(tmp_path / "out"), "--batch-size", "8"]
    command += ["--shard-rows", "10"]
    cli.main([*command, "--profile"])
    found = checked(tmp_path / "out" / "profile", "embed")
    assert (found["steps"], found["count"], found["trace"]["steps"]) == (5, 23, [1, 5])
    assert found["seconds"]["towers"] + found["seconds"]["router"] > 0 and found["seconds"]["saving"] > 0
    assert found["compile"]["programs"] > 0 and "images/s in 5 batches" in capsys.readouterr().out
    draw(pictures, 2, seed=1)
    cli.main(command)  # the corpus goes on beside the profile
    assert "Corpus: " in capsys.readouterr().out


def test_index_profiles_into_a_folder_of_its_own(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["index", str(pictures), "--checkpoint", str(BUNDLE), "--store", "store", "--batch-size", "8"]
    cli.main([*command, "--profile"])
    found = checked(tmp_path / "icar_profile", "index")
    assert (found["steps"], found["count"]) == (3, 23) and found["seconds"]["saving"] > 0
    cli.main([*command, "--profile=again"])
    assert "No batch was run" in capsys.readouterr().out and not (tmp_path / "again").exists()


def test_an_interrupted_embed_shows_what_it_knows(pictures, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("icar_jax.inference.files.embedding._add_shard", interrupted)
    command = ["embed", str(pictures), "--checkpoint", str(BUNDLE), "--out", str(tmp_path / "out"), "--batch-size", "8"]
    with pytest.raises(SystemExit) as end:
        cli.main([*command, f"--profile={tmp_path / 'p'}"])
    found = checked(tmp_path / "p", "embed")
    assert end.value.code == 130 and (found["error"], found["count"]) == ("KeyboardInterrupt", 23)
    assert "ended by KeyboardInterrupt" in capsys.readouterr().out


def test_files_that_cannot_be_read_do_not_count_as_an_interruption(pictures, tmp_path):
    (pictures / "0_bad.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as end:
        cli.main(
            [
                "embed",
                str(pictures),
                "--checkpoint",
                str(BUNDLE),
                "--out",
                str(tmp_path / "out"),
                "--batch-size",
                "8",
                "--profile",
            ]
        )
    assert end.value.code == 1 and checked(tmp_path / "out" / "profile", "embed")["finished"]


def test_a_batch_that_cannot_be_read_leaves_the_waits_of_those_before_it(tmp_path):
    model = icar_jax.load(BUNDLE, batch_size=8)
    size = {name: p.image_size for name, p in model.preprocesses.items()}

    def batches():
        for _ in range(8):
            yield {name: np.zeros((8, side, side, 3), np.uint8) for name, side in size.items()}
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"), profiling.profile(tmp_path / "p", "embed"):
        with profiling.section("transfer"):
            model.embed(profiling.batches(batches()))
    found = checked(tmp_path / "p", "embed")
    assert found["seconds"]["towers"] > 0 and found["seconds"]["router"] > 0 and found["error"] == "OSError"


@pytest.mark.parametrize("command", ["embed", "index"])
def test_a_folder_that_cannot_be_used_is_refused_before_the_work(command, pictures, tmp_path, capsys):
    goes_to = "--out" if command == "embed" else "--store"
    words = [command, str(pictures), "--checkpoint", str(BUNDLE), goes_to, str(tmp_path / "out"), "--profile"]
    for folder, why in ((str(pictures), "is not empty"), ("s3://bucket/p", "is an address")):
        with pytest.raises(SystemExit) as end:
            cli.main([*words, folder])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: --profile") and why in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "value"),
    [([], None), (["--profile"], ""), (["--profile=there"], "there"), (["--noprofile"], None), (["--profile", "there"], "")],
)
def test_the_flag_of_train_takes_a_folder_or_none(words, value):
    from icar_jax.cli.train import PROFILE

    values = flags.FlagValues()
    flags.DEFINE_flag(flags.FLAGS[PROFILE.name], values, "tests")
    try:
        rest = values(["icar", *words])
        assert values["profile"].value == value and rest[1:] == (["there"] if len(words) > 1 else [])
    finally:
        values["profile"].unparse()


@pytest.mark.check
def test_the_command_train_profiles_each_process_and_prints_once(tmp_path):
    command = (tmp_path / "cache", "--config.train.steps=5", "--profile")
    printed = programs.run(tmp_path / "one", *command)
    found = checked(tmp_path / "one" / "profile", "train")
    assert found["trace"]["steps"] == [4, 5] and "Trace of steps 4 to 5" in printed and "Finished: " in printed
    ended = [programs.finish(process) for process in programs.start_several([tmp_path / "two"] * 2, *command)]
    assert [code for code, *_ in ended] == [0, 0], ended[0][2][-2000:]
    assert ["Profile of icar train" in out for _, out, _ in ended] == [True, False]
    assert checked(tmp_path / "two" / "profile", "train")["processes"] == 2
    assert len(list((tmp_path / "two" / "profile" / "process_1" / "trace").rglob("*.xplane.pb"))) == 1
    (tmp_path / "mine").write_text("a file")
    code, _, error = programs.finish(programs.start(tmp_path / "three", *command[:-1], f"--profile={tmp_path / 'mine'}"))
    assert code == 2 and error.splitlines()[-1].startswith("error: --profile=") and not (tmp_path / "three").exists()
