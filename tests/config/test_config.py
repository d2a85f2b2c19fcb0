"""Every fault a user can type, passed as a flag to the real program: the error names the field, the value and the fix."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from icar_jax import architectures
from icar_jax import config as cfg
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.models.variants import CLIP
from icar_jax.parallel.mesh import make_mesh
from tests.support.places import ROOT

# flag -> what the message must hold: the field, the value, and a way out
FAULTS = {
    "--config.train.stepz=3": ("config.train.stepz", "did you mean config.train.steps"),
    "--config.train.steps=many": ("config.train.steps", "many", "int"),
    "--config.train=3": ("config.train", "override one of steps"),
    "--config.train.steps=0": ("config.train.steps=0", "at least 1"),
    "--config.train.batch_size=1": ("config.train.batch_size=1", "at least 2"),
    "--config.train.dtype=float16": ("config.train.dtype='float16'", "bfloat16", "float32"),
    "--config.clip.variant=vit_b33": ("config.clip.variant='vit_b33'", "did you mean 'vit_b32'"),
    "--config.clip.exits=(4,3)": ("config.clip.exits=(4, 3)", "write (3, 4)"),
    "--config.clip.exits=(3,3)": ("config.clip.exits=(3, 3)", "write (3,)"),
    "--config.clip.exits=(0,3)": ("config.clip.exits=(0, 3)", "write (3,)"),
    "--config.clip.exits=(3,99)": ("config.clip.exits=(3, 99)", "[99]", "depth", "use exits from 1 to"),
    "--config.clip.exits=a": ("config.clip.exits=('a',)", "tuple of int"),
    "--config.clip.pool=max": ("config.clip.pool='max'", "cls", "first_patch"),
    "--config.clip.image_size=65": ("config.clip.image_size=65", "patch size 8", "use 64"),
    "--config.clip.context_length=1": ("config.clip.context_length=1", "at least 2"),
    "--config.data.source=scene": ("config.data.source='scene'", "did you mean 'scenes'"),
    "--config.data.source=folder": ("config.data.root=''", "--config.data.root=PATH"),
    "--config.data.crop_scale=0.0": ("config.data.crop_scale=0.0", "(0, 1]"),
    "--config.data.vocabulary=10": ("config.data.vocabulary=10", "at least 259"),
    "--config.data.tokenizer=nowhere.json": ("nowhere.json", "not found"),
    "--config.data.scenes_pixels=8": ("config.data.scenes_pixels=8", "[32, 512]"),
    "--config.clip.patch_size=-8": ("config.clip.patch_size=-8", "at least 0"),
    "--config.train.freeze=('vision[',)": ("config.train.freeze='vision['", "a group (", "regular expression"),
    "--config.optim.rates=('vision',)": ("config.optim.rates='vision'", "REGEX=SHARE"),
    "--config.optim.rates=('vision=-1',)": ("config.optim.rates='vision=-1'", "at least 0"),
    "--config.train.freeze=('image','text','exits','temperature')": ("config.train.freeze", "nothing to train"),
    "--config.data.stall_timeout_s=inf": ("config.data.stall_timeout_s=inf", "(0, 1000000000]", "86400 waits for a day"),
    "--config.train.seed=-1": ("config.train.seed=-1", "at least 0"),
    "--config.optim.b1=2.0": ("config.optim.b1=2.0", "[0, 1)"),
    "--config.optim.lr=-1.0": ("config.optim.lr=-1.0", "at least 0"),
    "--config.loss.exit_weights=(1.0,)": ("config.loss.exit_weights=(1.0,)", "need 2"),
    "--config.mesh.data=3": ("config.mesh", "3 devices, found 1", "-1"),
    "--config.mesh.fsdp=-1": ("config.mesh.fsdp=-1", "only one axis"),
    "--config.mesh.data=0": ("config.mesh.data=0", "positive"),
    "--config.eval.distractors.source=folders": ("config.eval.distractors.source='folders'", "did you mean 'folder'"),
    "--config.eval.distractors.source=folder": ("config.eval.distractors.root=''", "--config.eval.distractors.root=PATH"),
    "--config.eval.distractors.source=scenes": ("config.eval.distractors.split=''", "size=5000"),
    "--config.eval.distractors.size=5": ("config.eval.distractors.size=5", "name the source"),
    "--config.eval.distractors=scenes": ("config.eval.distractors", "override one of source"),
    "--config.eval.budgets=(0.6,1.2)": ("config.eval.budgets=(0.6, 1.2)", "such as (0.6, 0.8)"),
    "--config.eval.early_share=(0.5,0.2)": ("config.eval.early_share=(0.5, 0.2)", "one share for each"),
    "--config.data.source=ratings": ("config.data.source='ratings'", "task 'complexity' only"),
    "--config.data.ratings=r.csv": ("config.data.ratings='r.csv'", "task 'complexity' only"),
    "--config.data.bad_share=1.5": ("config.data.bad_share=1.5", "[0, 1]"),
    "--config.data.rotate=-1.0": ("config.data.rotate=-1.0", "[0, 180]", "0 switches it off"),
    "--config.data.translate=2.0": ("config.data.translate=2.0", "[0, 1]"),
    "--config.data.brightness=-0.1": ("config.data.brightness=-0.1", "[0, 1]"),
    "--config.data.contrast=3.0": ("config.data.contrast=3.0", "[0, 1]"),
    "--config.data.saturation=3.0": ("config.data.saturation=3.0", "[0, 1]"),
    "--config.train.epochs=-1.0": ("config.train.epochs=-1.0", "config.train.steps"),
    "--config.train.patience=-1": ("config.train.patience=-1", "0 runs all steps"),
    "--config.train.patience=3": ("config.train.patience=3", "set config.train.eval_every"),
    "--config.train.eval_every=-2": ("config.train.eval_every=-2", "-1 once an epoch"),
    "--config.complexity.class_weights=even": ("config.complexity.class_weights='even'", "none", "balanced"),
    "--config.task=clap": ("config.task='clap'", "did you mean 'clip'"),
}


# The same of a run of the complexity model.
COMPLEXITY_FAULTS = {
    "--config.data.source=tfds": ("config.data.source='tfds'", "no complexity ratings", "'ratings'"),
    "--config.data.source=ratings": ("config.data.root=''", "--config.data.root=PATH"),
    "--config.data.ratings=r.csv": ("config.data.ratings='r.csv'", "scenes know theirs", "source=ratings"),
    "--config.data.resize=crop": ("config.data.resize='crop'", "use 'squash'"),
    "--config.complexity.class_weights=balanced": ("class_weights='balanced'", "'regression'", "'classification'"),
    "--config.complexity.threshold=high": ("config.complexity.threshold", "float"),
    "--config.complexity.threshold=1.0": ("config.complexity.threshold=1.0", "[0, 1)"),
    "--config.train.accumulate=2": ("config.train.accumulate=2", "task 'clip' only"),
    "--config.train.eval_split=train": ("config.train.eval_split='train'", "not held out"),
}


def run_train(*flags, workdir, config="configs/demo.py:clip"):
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--workdir={workdir}", *flags]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize(
    "flag",
    [
        "--config.train.stepz=3",
        pytest.param("--config.train.steps=many", marks=pytest.mark.check),
        pytest.param("--config.clip.exits=(3,99)", marks=pytest.mark.check),
    ],
)
def test_the_program_ends_with_a_message_and_no_traceback(flag, tmp_path):
    result = run_train(flag, workdir=tmp_path / "w")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert all(part in result.stderr for part in FAULTS[flag]), result.stderr
    assert not (tmp_path / "w" / "checkpoints").exists()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """flag -> message; all in one child process, since starting one for each would take minutes."""
    script = tmp_path_factory.mktemp("faults") / "faults.py"
    script.write_text(
        "import io, json, os, sys, contextlib, tempfile\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from absl import flags, app, logging\n"
        "from ml_collections import config_flags\n"
        "from icar_jax import cli, config as cfg\n"
        "from icar_jax.evaluation import during_training\n"
        "from icar_jax.training.loop import train\n"
        "results = {}\n"
        f"tasks = {{'clip': {list(FAULTS)!r}, 'complexity': {list(COMPLEXITY_FAULTS)!r}}}\n"
        "for task, flag in [(task, flag) for task in tasks for flag in tasks[task]]:\n"
        "    values = flags.FlagValues()\n"
        "    holder = config_flags.DEFINE_config_file('config', None, '', flag_values=values)\n"
        f"    argv = ['train.py', '--config={ROOT}/configs/demo.py:' + task, flag]\n"
        "    sys.argv = argv\n"
        "    try:\n"
        "        cfg.check_override(flag[2:].partition('=')[0])\n"
        "        values(argv)\n"
        "        values.config.train.eval_every += 5 * ('eval_split' in flag)\n"
        "        run = os.path.join(tempfile.mkdtemp(), 'w')\n"
        "        train(values.config, run, stop_after=1, evaluators=(during_training.evaluator(values.config),))\n"
        "        results[task + flag] = 'no error'\n"
        "    except (ValueError, OSError, flags.Error) as error:\n"
        "        results[task + flag] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(results))\n"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("flag", list(FAULTS))
def test_every_fault_names_field_value_and_fix(flag, outcomes):
    missing = [part for part in FAULTS[flag] if part not in outcomes["clip" + flag]]
    assert not missing, outcomes["clip" + flag]


@pytest.mark.parametrize("flag", list(COMPLEXITY_FAULTS))
def test_every_fault_of_a_complexity_run_does_too(flag, outcomes):
    missing = [part for part in COMPLEXITY_FAULTS[flag] if part not in outcomes["complexity" + flag]]
    assert not missing, outcomes["complexity" + flag]


@pytest.mark.check
def test_batch_that_does_not_divide_over_the_mesh_as_a_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    result = run_train("--config.train.batch_size=9", workdir=tmp_path / "w")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "config.train.batch_size=9" in result.stderr and "use 8 or 10" in result.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.check
@pytest.mark.parametrize(
    "config, message",
    [
        ("configs/nothing.py", "no such file or packaged configuration (complexity, demo,"),
        ("nothing:clip", "--config=nothing:clip: no such file"),
        ("configs/vit_b16_siglip.py:large", "takes no argument"),
        ("configs/photos.py:large", "use configs/photos.py:clip, :cheaper, :router"),
        ("configs/demo.py:clop", "use configs/demo.py:clip, :complexity, :long, :cheaper, :router"),
    ],
)
def test_mistakes_in_the_name_of_the_config(config, message, tmp_path):
    result = run_train(workdir=tmp_path / "w", config=config)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_batch_that_does_not_divide_over_the_mesh():
    with pytest.raises(ConfigError, match=r"batch_size=10 .* 8 devices.*use 8 or 16"):
        cfg.validate_batch(10, 8)
    cfg.validate_batch(16, 8)


def test_mesh_takes_the_rest():
    mesh = make_mesh(cfg.MeshConfig())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_lists_become_tuples_and_integers_are_accepted_as_floats():
    config = ExperimentConfig()
    config.clip.exits = [3, 6]
    config.optim.lr = 1
    assert cfg.validate(config).clip.exits == (3, 6)


def test_a_boolean_is_no_number():
    config = ExperimentConfig()
    config.train.steps = True
    with pytest.raises(ConfigError, match="config.train.steps=True must be of type int"):
        cfg.validate(config)


def test_json_round_trip_and_unknown_fields():
    config = ExperimentConfig()
    config.clip.exits = (3, 6)
    back = cfg.from_dict(dataclasses.asdict(config))
    assert back == config
    broken = dataclasses.asdict(config)
    broken["train"]["stepz"] = 1
    with pytest.raises(ConfigError, match=r"config.train.stepz.*did you mean config.train.steps"):
        cfg.from_dict(broken)


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/[!_]*.py")), ids=lambda f: f.stem)
def test_every_config_is_valid(file):
    scope: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    for argument in scope.get("ARGUMENTS", ("",)):
        config = scope["get_config"](argument) if argument else scope["get_config"]()
        config.data.root = config.data.root or "somewhere"
        cfg.validate(config)
        if config.task == "clip":
            start = CLIP["vit_demo"] if config.clip.variant == "init" else None  # else that of weights, not there
            plain = dataclasses.replace(config.clip, exits=()) if start else config.clip
            architectures.clip_arch(plain, start=start)
        elif not config.complexity.clip:  # else it is read from the CLIP that it routes, which is not there
            architectures.complexity_arch(config.complexity)


def test_no_field_that_nothing_reads():
    """Every field of the configuration occurs in the code beyond config.py and configs/."""
    code = "\n".join(f.read_text() for f in [*(ROOT / "icar_jax").rglob("*.py")] if f.parent.name != "config")
    # How a group is spelled where its fields are read: c.clip.exits, config.exits in a function of that group, ...
    spelled = {"train": "train|t", "eval": r"eval|eval_config", "optim": "optim|config", "loss": "loss"}
    for group in dataclasses.fields(ExperimentConfig):
        if not dataclasses.is_dataclass(group.type) or group.name == "mesh":  # the mesh is read by axis name
            continue
        owner = spelled.get(group.name, f"{group.name}|config")
        for field in dataclasses.fields(group.type):
            assert re.search(rf"\b({owner})\.{field.name}\b", code), f"config.{group.name}.{field.name} is read nowhere"


HOSTILE = [float("inf"), float("-inf"), float("nan"), 1e300, -1e300, 10**24, -(10**24), 2**64]


def numeric_fields(node, prefix="config"):
    for f in dataclasses.fields(node):
        value, name = getattr(node, f.name), f"{prefix}.{f.name}"
        if dataclasses.is_dataclass(value):
            yield from numeric_fields(value, name)
        elif str(f.type).replace("typing.", "").startswith(("tuple[int", "tuple[float")) or f.type in (int, float):
            yield name, not isinstance(value, tuple)


def with_value(name, value):
    config = node = ExperimentConfig(task="complexity" if "config.complexity" in name else "clip")
    *groups, field = name.split(".")[1:]
    for group in groups:
        node = getattr(node, group)
    setattr(node, field, value)
    return config


@pytest.mark.parametrize("name, single", numeric_fields(ExperimentConfig()), ids=lambda each: str(each))
def test_absurd_numbers_are_refused_by_field(name, single):
    for value in HOSTILE:
        with pytest.raises(ConfigError, match=rf"^{re.escape(name)}=.{{0,200}}must") as error:
            cfg.validate(with_value(name, value if single else (value,)))
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "name",
    ["data.workers", "data.threads", "train.epochs", "optim.eps", "optim.lr", "clip.depth", "train.keep", "clip.embed_dim"],
)
def test_negative_numbers_are_refused_by_field(name):
    with pytest.raises(ConfigError, match=rf"^config\.{name}=-7 must"):
        cfg.validate(with_value(f"config.{name}", -7))


@pytest.mark.parametrize("name", ["workers", "threads"])
def test_processes_and_threads_have_a_bound(name):
    cfg.validate(with_value(f"config.data.{name}", 256))
    for value in (257, 99_999):
        with pytest.raises(ConfigError, match=rf"^config\.data\.{name}={value} must be at most 256"):
            cfg.validate(with_value(f"config.data.{name}", value))
