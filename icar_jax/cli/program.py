"""The root scripts: their flags, and configurations with overrides."""

from __future__ import annotations

import argparse
import inspect
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from icar_jax import config as cfg
from icar_jax.cli.errors import user_errors


def run_program(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a root script: overrides of unknown fields are reported by name, and libraries log warnings only."""

    def parse(args: Sequence[str]) -> Sequence[str]:
        with user_errors():
            for arg in args[1:]:
                name = arg.lstrip("-").partition("=")[0]
                if arg.startswith("-") and name.startswith("config."):
                    cfg.check_override(name)
                elif name == "config" and "=" in arg:
                    check_config_file(arg.partition("=")[2])
            rest = app.parse_flags_with_usage(args)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        return rest

    app.run(main, flags_parser=parse)


def check_config_file(value: str) -> None:
    """Raises ConfigError where --config names no file, or an argument its get_config does not take."""
    path, _, argument = value.partition(":")
    if not Path(path).is_file():
        raise cfg.ConfigError(f"--config={value}: {path} is no file; configs/demo.py:clip is an example")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise cfg.ConfigError(f"--config={value}: {path} defines no get_config()")
    if argument and not inspect.signature(get_config).parameters:
        raise cfg.ConfigError(f"--config={value}: {path} takes no argument; write --config={path}")
    get_config(*([argument] if argument else []))


def config_of(args: argparse.Namespace) -> cfg.ExperimentConfig:
    """The configuration of --config with the overrides --config.a.b=value that the root scripts take."""
    check_config_file(args.config)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    for word in args.overrides:
        cfg.check_override(word.lstrip("-").partition("=")[0])
    try:
        values(["icar", f"--config={args.config}", *args.overrides])
    except flags.Error as error:
        raise cfg.ConfigError(str(error)) from error
    return values.config
