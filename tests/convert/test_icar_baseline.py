"""Checkpoints of the official code as its trainer saves them: whether the exit was trained, and what their config says."""

import dataclasses

import pytest

from icar_jax import checkpoint, pytree
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import read_weights
from tests.support import parity_cases

FULL = ("early_projection", "temperature", "backbone")


def saved(folder, groups=FULL, **config):
    """The parity case as a training checkpoint whose optimizer has these parameter groups."""
    case = parity_cases.load("icar")
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-6, "name": name, "params": [n]} for n, name in enumerate(groups)]}
    extra = {**case.extra, "config": {**case.extra["config"], **config}, "optimizer_state_dict": optimizer}
    return parity_cases.write_source(dataclasses.replace(case, extra=extra), folder)


def test_a_baseline_is_told_by_its_optimizer(tmp_path):
    file = saved(tmp_path / "baseline", FULL[1:])
    options = Options(**parity_cases.load("icar").options)
    report = convert(file, tmp_path / "out", options)
    assert any("the exit was not trained: this is a baseline" in note and "--exits none" in note for note in report.notes)
    for source in (saved(tmp_path / "full"), saved(tmp_path / "bare", ())):
        assert not any("not trained" in note for note in convert(source, tmp_path / "other", options).notes)


def test_the_exit_is_left_out_on_demand(tmp_path):
    file = saved(tmp_path / "baseline", FULL[1:])
    given = {name: value for name, value in parity_cases.load("icar").options.items() if name != "exits"}
    with_exit = convert(file, tmp_path / "with", Options(**given))
    report = convert(file, tmp_path / "without", Options(**given, no_exits=True))
    assert report.description["arch"]["vision"]["exits"] == [] and not any("trained" in note for note in report.notes)
    both = [pytree.flatten(checkpoint.read(tmp_path / name, "clip").params) for name in ("with", "without")]
    early = {name for name in both[0] if name.startswith(("vision/exits/", "exit_logit_scale/"))}
    assert early and both[0].keys() - both[1].keys() == early and with_exit.parameters > report.parameters
    assert all((both[0][name] == value).all() for name, value in both[1].items())
    with pytest.raises(ConvertError, match="--exits takes none or numbers of blocks, not both"):
        convert(file, tmp_path / "x", Options(**given, exits=(1,), no_exits=True))
    other = parity_cases.write_source(parity_cases.load("hf_gelu"), tmp_path / "hf")
    with pytest.raises(ConvertError, match=r"has no use for --exits none; leave it out"):
        convert(other, tmp_path / "x", Options(no_exits=True))


def test_a_model_without_pretrained_weights_stays_one(tmp_path):
    file = saved(tmp_path / "s", pretrained=None)
    report = convert(file, tmp_path / "out", Options(**parity_cases.load("icar").options))
    assert report.description["source"]["pretrained"] is None
    back = export(tmp_path / "out", tmp_path / "back", "icar").path / "ICAR.pt"
    assert read_weights(back).extra["config"]["pretrained"] is None


def test_the_command_takes_none(tmp_path, capsys):
    from icar_jax import cli

    file = saved(tmp_path / "s")
    options = parity_cases.load("icar").options
    words = [word for name in ("heads",) if name in options for word in ("--heads", *map(str, options[name]))]
    words += ["--activation", options["activation"]] if "activation" in options else []
    cli.main(["convert", str(file), str(tmp_path / "out"), "--exits", "none", *words])
    assert checkpoint.describe(tmp_path / "out")["arch"]["vision"]["exits"] == []
    with pytest.raises(SystemExit):
        cli.main(["convert", str(file), str(tmp_path / "out"), "--exits", "all"])
    assert "expected a number of blocks, or none, found 'all'" in capsys.readouterr().err
