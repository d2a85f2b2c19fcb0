"""Training monitor: checks that losses are finite, measures throughput, counts truncated captions."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from icar_jax import profiling
from icar_jax.errors import IcarError
from icar_jax.parallel import distributed
from icar_jax.training.logs import RunLog
from icar_jax.training.optimizer import schedule
from icar_jax.training.tasks.kind import RunKind

_NAMED = 64  # maximum number of files that an error message lists


class NonFiniteLoss(IcarError, RuntimeError):
    """A metric of a step is NaN or infinite; the last checkpoint on disk is from an earlier step."""


class Monitor:
    """Reads metrics one step late, so that the host prepares the next batch while the device computes."""

    def __init__(self, kind: RunKind, log: RunLog, saved: Callable[[], int | None]):
        """`saved()` returns the step of the newest checkpoint, None before the first one."""
        config = kind.config
        self._config, self._log, self._saved = config, log, saved
        self._pending: deque = deque()
        self._share = schedule(config.optim, config.train.steps)
        self._speed = f"{kind.unit}_per_s"
        self._since: tuple[int, float] | None = None  # None until the first step, which includes compilation, is done

    def push(self, step: int, metrics: dict[str, jax.Array], names: Any) -> None:
        """Queues the metrics of a step and the file names of its batch. Raises NonFiniteLoss for the previous step."""
        self._pending.append((step, metrics, names))
        if len(self._pending) > 1:
            self._take()

    def flush(self) -> None:
        """Reads all queued metrics. Raises NonFiniteLoss."""
        while self._pending:
            self._take()

    def exclude(self, seconds: float) -> None:
        """Excludes `seconds` spent on something else, such as an evaluation, from the throughput."""
        if self._since is not None:
            self._since = (self._since[0], self._since[1] + seconds)

    def _take(self) -> None:
        step, metrics, names = self._pending.popleft()
        with profiling.section("transfer"):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not all(math.isfinite(value) for value in values.values()):
            distributed.end_together()  # metrics are the same on every process
            raise NonFiniteLoss(
                f"step {step}: not finite: {', '.join(n for n, v in values.items() if not math.isfinite(v))}; "
                f"files of the batch: {_listed(names)}. {self._way_on()}"
            )
        now = time.perf_counter()
        if self._since is None:
            self._since = (step, now)
        if step % self._config.train.log_every == 0 or step == self._config.train.steps:
            before, then = self._since
            if step > before:
                values[self._speed] = (step - before) * self._config.train.batch_size / max(now - then, 1e-9)
                self._since = (step, now)
            with jax.transfer_guard("allow"):  # transfers the step number
                values["lr"] = self._config.optim.lr * float(self._share(step - 1))
            self._log.metrics(step, values)

    def _way_on(self) -> str:
        saved, optim = self._saved(), self._config.optim
        fields = "config.optim.lr, exit_lr, temperature_lr, warmup_steps, final_lr, weight_decay and clip_norm"
        if saved is None:
            return f"No checkpoint was saved before it: run again with lower learning rates ({fields}) or without broken files"
        return (
            f"The checkpoint of step {saved} is intact, but the same command repeats the same batches: resume with other "
            f"settings, such as --config.optim.lr={optim.lr / 2:g} (now {optim.lr:g}); {fields} may change. A broken file may "
            "be replaced under the same name; to train without it, start a new run in a new --workdir"
        )


def _listed(names: Any) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class CutCaptions:
    """Counts captions that were truncated to the context length."""

    def __init__(self, context_length: int):
        self._context_length, self._cut, self._seen = context_length, 0, 0

    def add(self, batch: dict[str, Any]) -> None:
        truncated = batch.get("truncated", ())
        self._cut += int(sum(truncated))
        self._seen += len(truncated)

    def report(self) -> None:
        """Logs a warning if captions were truncated; only process 0 does, for the captions it read."""
        if self._cut and distributed.is_main():
            logging.warning(
                "%d of %d captions (%.1f%%) were longer than the context of %s tokens and were truncated; "
                "set config.clip.context_length to change it.",
                self._cut, self._seen, 100 * self._cut / self._seen, self._context_length or "the variant's",
            )  # fmt: skip
