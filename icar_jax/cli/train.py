"""Trains CLIP with early exits, or the complexity model that routes it.

    icar train --config=configs/demo.py:clip --workdir=workdir/demo [--config.train.steps=100 ...]

The same command continues a run that was cut off; `python train.py` is the same. Configurations that come with the package go
by name: --config=demo:clip. TPU pods, srun and mpirun are detected automatically; elsewhere each of N processes gets
--coordinator=HOST:PORT --processes=N --process=I, and a workdir that all of them see.
"""

from absl import app, flags
from ml_collections import config_flags

from icar_jax.cli.errors import user_errors

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: a file or a name, with an argument: demo:clip.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: configuration, metrics, checkpoints, model.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "Several processes: host:port of process 0.")
PROCESSES = flags.DEFINE_integer("processes", 0, "Several processes: how many there are.")
PROCESS = flags.DEFINE_integer("process", -1, "Several processes: which one this is, from 0.")
START_TIMEOUT = flags.DEFINE_integer("start_timeout_s", 300, "Several processes: seconds to wait for all of them.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides look like --config.train.steps=100")
    from pathlib import Path

    from icar_jax.evaluation import during_training
    from icar_jax.parallel import distributed
    from icar_jax.training.loop import train

    with distributed.exit_on_error(), user_errors():
        distributed.start(COORDINATOR.value, PROCESSES.value, PROCESS.value, timeout_s=START_TIMEOUT.value)
        folder = train(CONFIG.value, WORKDIR.value, evaluators=(during_training.evaluator(CONFIG.value),))
        if folder != Path(WORKDIR.value) and distributed.is_main():
            print(f"Finished: {folder}")
