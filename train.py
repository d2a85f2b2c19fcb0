"""Trains CLIP with early exits, or the complexity model that routes it.

    python train.py --config=configs/demo.py:clip --workdir=workdir/demo [--config.train.steps=100 ...]

The same command continues a run that was cut off.
"""

from absl import app, flags
from ml_collections import config_flags

from icar_jax.cli import run_program, user_errors

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: configs/x.py or configs/x.py:argument.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: configuration, metrics, checkpoints, model.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides look like --config.train.steps=100")
    from icar_jax.training.loop import train

    with user_errors():
        print(f"Finished: {train(CONFIG.value, WORKDIR.value)}")


if __name__ == "__main__":
    run_program(main)
