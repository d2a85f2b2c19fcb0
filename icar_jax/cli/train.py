"""Trains CLIP with early exits, or the complexity model that routes it.

    icar train --config=configs/demo.py:clip --workdir=workdir/demo [--config.train.steps=100 ...]

The same command resumes an interrupted run; `python train.py` is equivalent. Packaged configurations are selected by name:
--config=demo:clip. TPU pods, srun and mpirun are detected automatically; otherwise start each of N processes with
--coordinator=HOST:PORT --processes=N --process=I and a workdir on a shared file system.
"""

import time

from absl import app, flags
from ml_collections import config_flags

from icar_jax.cli.errors import user_errors


class _FolderOrDefault(flags.ArgumentParser):
    """Parses --profile=DIR; --profile alone, which absl reads as 'true', gives "" and --noprofile None."""

    def parse(self, argument: str) -> str | None:
        return {"true": "", "false": None}.get(argument, argument)


CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration: file or name, with an argument, such as demo:clip.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the configuration, metrics, checkpoints and model of the run.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "Multi-process runs: host:port of process 0.")
PROCESSES = flags.DEFINE_integer("processes", 0, "Multi-process runs: number of processes.")
PROCESS = flags.DEFINE_integer("process", -1, "Multi-process runs: index of this process, from 0.")
START_TIMEOUT = flags.DEFINE_integer("start_timeout_s", 300, "Multi-process runs: timeout in seconds to connect.")
PROFILE = flags.DEFINE_flag(
    flags.Flag(
        _FolderOrDefault(), flags.ArgumentSerializer(), "profile", None, boolean=True,
        help_string="Show where the time goes: prints a summary and writes it to DIR/summary.json, with a trace of ten steps "
        "in DIR/trace; --profile=DIR, or --profile for WORKDIR/profile. Waits for each step, which slows the run a little.",
    )
)  # fmt: skip
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    """Runs the command; absl passes the arguments that are not flags."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides look like --config.train.steps=100")
    since = time.perf_counter()
    from pathlib import Path

    from icar_jax import config as cfg
    from icar_jax import profiling
    from icar_jax.evaluation import during_training
    from icar_jax.evaluation.complexity.ridge_routers import fit_router
    from icar_jax.parallel import distributed
    from icar_jax.training.loop import train

    with distributed.exit_on_error(), user_errors():
        distributed.start(COORDINATOR.value, PROCESSES.value, PROCESS.value, timeout_s=START_TIMEOUT.value)
        cfg.require_local("--workdir", WORKDIR.value)
        if CONFIG.value.task == "complexity" and CONFIG.value.complexity.fit == "ridge":
            distributed.require_single("icar train with config.complexity.fit='ridge'")
            print(f"Finished: {fit_router(CONFIG.value, WORKDIR.value)}")
            return
        profile = Path(WORKDIR.value, "profile") if PROFILE.value == "" else PROFILE.value
        with profiling.profile(profile, "train", since):
            folder = train(CONFIG.value, WORKDIR.value, evaluators=(during_training.evaluator(CONFIG.value),))
        if folder != Path(WORKDIR.value) and distributed.is_main():
            print(f"Finished: {folder}")
