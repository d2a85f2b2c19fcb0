"""Runs `icar train` and `icar evaluate`: absl flags, and configurations with overrides."""

from __future__ import annotations

import argparse
import importlib
import inspect
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

import icar_jax
from icar_jax import config as cfg
from icar_jax import program_cache
from icar_jax.cli.errors import DEBUG, user_errors, without_debug


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """Runs 'train' or 'evaluate' with `argv` (default: sys.argv) and exits the process.

    Overrides of unknown fields raise ConfigError with the name of the field. Libraries log only warnings.
    """
    program = importlib.import_module(f"icar_jax.cli.{name}")
    if argv is not None:
        sys.argv = [f"icar {name}", *argv]
    sys.modules["__main__"].__doc__ = program.__doc__  # --help prints it, with the flags registered for this name
    for flag in flags.FLAGS.get_flags_for_module(program.__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def parse(args: Sequence[str]) -> Sequence[str]:
        with user_errors():
            args = [args[0], *_resolved(without_debug(args[1:]) if DEBUG in args else args[1:])]
            for arg in args[1:]:
                field = arg.lstrip("-").partition("=")[0]
                if arg.startswith("-") and field.startswith("config."):
                    cfg.check_override(field)
            rest = app.parse_flags_with_usage(args)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        return rest

    program_cache.enable()
    app.run(program.main, flags_parser=parse)


def _resolved(args: Sequence[str]) -> list[str]:
    """The arguments with the value of --config (either syntax) resolved by `config_file`."""
    found, after = [], ""
    for arg in args:
        flag, equals, value = arg.partition("=")
        if after:
            arg = config_file(arg)
        elif flag.lstrip("-") == "config" and arg.startswith("-") and equals:
            arg = f"{flag}={config_file(value)}"
        after = arg if arg in ("-config", "--config") else ""
        found.append(arg)
    return found


def packaged_configs() -> Path:
    """The folder of the packaged configurations: icar_jax/configs, or configs/ in a checkout."""
    package = Path(icar_jax.__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def config_file(value: str) -> str:
    """Resolves a value of --config, a path or a packaged name such as 'demo:clip', to 'FILE' or 'FILE:argument'.

    Raises ConfigError if there is no such configuration, or if its get_config does not accept the argument.
    """
    path, colon, argument = value.partition(":")
    if not Path(path).is_file():
        named = packaged_configs() / f"{path.removesuffix('.py').removeprefix('configs/')}.py"
        if not named.is_file():
            names = ", ".join(sorted(file.stem for file in packaged_configs().glob("*.py") if file.stem != "__init__"))
            raise cfg.ConfigError(
                f"--config={value}: no such file or packaged configuration ({names}); an example is demo:clip"
            )
        path = str(named)
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise cfg.ConfigError(f"--config={value}: {path} defines no get_config()")
    if argument and not inspect.signature(get_config).parameters:
        raise cfg.ConfigError(f"--config={value}: {path} takes no argument; write --config={path}")
    get_config(*([argument] if argument else []))
    return path + colon + argument


def config_of(args: argparse.Namespace) -> cfg.ExperimentConfig:
    """The configuration of --config with overrides --config.a.b=value, as in training."""
    path = config_file(args.config)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    for word in args.overrides:
        cfg.check_override(word.lstrip("-").partition("=")[0])
    try:
        values(["icar", f"--config={path}", *args.overrides])
    except flags.Error as error:
        raise cfg.ConfigError(str(error)) from error
    return values.config
