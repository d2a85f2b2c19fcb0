"""Evaluates a trained model on its held-out split. A CLIP is evaluated at full depth, at each exit and routed, with the cost
of each; a complexity model by its agreement with the ground-truth complexity, next to classical baselines.

    icar evaluate --config=configs/demo.py:clip --workdir=workdir/demo [--config.eval.split=test ...]

`python evaluate.py` is equivalent. Takes the training configuration and writes metrics.json and figures into the workdir:
retention.png, complexity.png and report/index.html for a CLIP; scores.png and, for scenes, nuisance.png for a complexity model.
--save-embeddings also writes the embeddings of a CLIP to WORKDIR/embeddings/, which `icar evaluate-embeddings` reads.
With config.complexity.fit=ridge it cross-validates on all rated images and writes ratings.json and ratings.png.
"""

from absl import app, flags
from ml_collections import config_flags

from icar_jax.cli.errors import user_errors
from icar_jax.errors import ConfigError

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration: file or name, with an argument, such as demo:clip.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of training, with model/ and optionally bundle/.")
SAVE = flags.DEFINE_bool(
    "save-embeddings", False, "Also write the embeddings to WORKDIR/embeddings, for `icar evaluate-embeddings`."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    """Runs the command; absl passes the arguments that are not flags."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides look like --config.eval.split=test")
    from icar_jax.evaluation.complexity.cross_validation import cross_validate
    from icar_jax.evaluation.complexity.evaluate import evaluate_complexity
    from icar_jax.evaluation.evaluate import evaluate
    from icar_jax.parallel import distributed

    with user_errors():
        distributed.require_single("icar evaluate")
        if CONFIG.value.task == "clip":
            evaluate(CONFIG.value, WORKDIR.value, save_embeddings=SAVE.value)
            return
        if SAVE.value:
            raise ConfigError("--save-embeddings is for task 'clip' only: a complexity model has no embeddings")
        of_scores = cross_validate if CONFIG.value.complexity.fit == "ridge" else evaluate_complexity
        of_scores(CONFIG.value, WORKDIR.value)
