"""Where the time of a run goes, for `--profile` of the commands train, embed and index.

    with profiling.profile("workdir/mine/profile", "train"):
        train(config, "workdir/mine")

The loops name what they do with `profiling.section("saving")` and the like. Without a profile these calls do nothing. Like the
profiler of JAX, a profile is of the whole program, and there is one at a time; only the thread that opened it is timed.
"""

from icar_jax.profiling.profiler import (
    batches,
    device_wait,
    profile,
    ready,
    section,
    steps,
)

__all__ = ["batches", "device_wait", "profile", "ready", "section", "steps"]
