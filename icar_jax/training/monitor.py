"""What is watched while a run goes on: losses that stay finite, speed, captions that are cut."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from icar_jax.errors import IcarError
from icar_jax.parallel import distributed
from icar_jax.training.logs import RunLog
from icar_jax.training.optimizer import schedule
from icar_jax.training.tasks.kind import RunKind

_NAMED = 64  # files of a batch that a message lists


class NonFiniteLoss(IcarError, RuntimeError):
    """The loss of a step is not finite; the last checkpoint on disk is from before it."""


class Monitor:
    """Reads metrics one step late, so that the host prepares the next batch while the device works."""

    def __init__(self, kind: RunKind, log: RunLog, saved: Callable[[], int | None]):
        """`saved()` is the step of the newest checkpoint, None before there is one."""
        config = kind.config
        self._config, self._log, self._saved = config, log, saved
        self._pending: deque = deque()
        self._share = schedule(config.optim, config.train.steps)
        self._speed = f"{kind.unit}_per_s"
        self._since: tuple[int, float] | None = None  # the first step includes compilation and is not timed

    def push(self, step: int, metrics: dict[str, jax.Array], names: Any) -> None:
        """Takes the metrics of a step and the files of its batch; raises NonFiniteLoss for the step before."""
        self._pending.append((step, metrics, names))
        if len(self._pending) > 1:
            self._take()

    def flush(self) -> None:
        """Reads what is left; raises NonFiniteLoss."""
        while self._pending:
            self._take()

    def exclude(self, seconds: float) -> None:
        """Leaves time that was spent on something else (an evaluation) out of the speed."""
        if self._since is not None:
            self._since = (self._since[0], self._since[1] + seconds)

    def _take(self) -> None:
        step, metrics, names = self._pending.popleft()
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
            with jax.transfer_guard("allow"):  # of the step's number
                values["lr"] = self._config.optim.lr * float(self._share(step - 1))
            self._log.metrics(step, values)

    def _way_on(self) -> str:
        saved, optim = self._saved(), self._config.optim
        fields = "config.optim.lr, exit_lr, temperature_lr, warmup_steps, final_lr, weight_decay and clip_norm"
        if saved is None:
            return f"No checkpoint was saved before it: run the command with lower rates ({fields}) or without files at fault"
        return (
            f"The checkpoint of step {saved} is intact, and from there the same command meets the same batches again: continue "
            f"with other settings, such as --config.optim.lr={optim.lr / 2:g} (now {optim.lr:g}); {fields} may change. A file "
            "at fault may be replaced under its name; with fewer files it is another run, in a new --workdir"
        )


def _listed(names: Any) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class CutCaptions:
    """Counts captions that are longer than the context."""

    def __init__(self, context_length: int):
        self._context_length, self._cut, self._seen = context_length, 0, 0

    def add(self, batch: dict[str, Any]) -> None:
        truncated = batch.get("truncated", ())
        self._cut += int(sum(truncated))
        self._seen += len(truncated)

    def report(self) -> None:
        """Warns if there were any; of several processes the first one speaks, of the captions it read."""
        if self._cut and distributed.is_main():
            logging.warning(
                "%d of %d captions (%.1f%%) were longer than the context of %s tokens and were cut; "
                "config.clip.context_length sets it.",
                self._cut, self._seen, 100 * self._cut / self._seen, self._context_length or "the variant's",
            )  # fmt: skip
