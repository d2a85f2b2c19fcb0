"""Evaluates a trained model on its held-out split: of CLIP full depth, each exit, routed, and what each costs; of a complexity
model its agreement with the known complexity, beside classical measures.

    icar evaluate --config=configs/demo.py:clip --workdir=workdir/demo [--config.eval.split=test ...]

`python evaluate.py` is the same. Takes the configuration of training; writes metrics.json and figures into the workdir:
retention.png, complexity.png and the page report/index.html, or scores.png and, on scenes, nuisance.png.
"""

from absl import app, flags
from ml_collections import config_flags

from icar_jax.cli.errors import user_errors

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: a file or a name, with an argument: demo:clip.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of training, with model/ and perhaps bundle/.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides look like --config.eval.split=test")
    from icar_jax.evaluation.complexity.evaluate import evaluate_complexity
    from icar_jax.evaluation.evaluate import evaluate
    from icar_jax.parallel import distributed

    with user_errors():
        distributed.require_single("icar evaluate")
        run = evaluate_complexity if CONFIG.value.task == "complexity" else evaluate
        run(CONFIG.value, WORKDIR.value)
