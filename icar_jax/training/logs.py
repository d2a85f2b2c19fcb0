"""Training logs: metrics as JSON lines, a progress bar, and optional TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from icar_jax import workdir as files
from icar_jax.config import ConfigError
from icar_jax.files import json_file
from icar_jax.parallel import distributed

METRICS = "metrics.jsonl"
UNITS = ("pairs", "images")  # units of throughput: {unit}_per_s


def open_log(workdir: Path, steps: int, start: int, tensorboard: bool, title: str) -> RunLog | SilentLog:
    """Returns the log of a run that resumes after `start` steps; only process 0 writes.

    Raises ConfigError if `tensorboard` is set and tensorboardX is not installed.
    """
    return RunLog(workdir, steps, start, tensorboard, title) if distributed.is_main() else SilentLog()


def note_event(workdir: Path, step: int, name: str, **values: Any) -> None:
    """Appends the event {"step", "event": name, **values} to WORKDIR/metrics.jsonl. Raises OSError."""
    with (workdir / METRICS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"step": step, "event": name, **values}) + "\n")


class SilentLog:
    """A log that writes nothing, for all processes but the first."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def advance(self) -> None:
        pass

    def close(self) -> None:
        pass


class RunLog:
    """WORKDIR/metrics.jsonl and the progress bar of one run."""

    def __init__(self, workdir: Path, steps: int, start: int, tensorboard: bool, title: str):
        self._path = workdir / METRICS
        _drop_after(self._path, start)
        self._lines = self._path.open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=start, desc=title, unit="step", dynamic_ncols=True, mininterval=1.0)
        self._events = _event_writer(workdir, start) if tensorboard else None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl and shows the losses on the progress bar; values are Python floats.

        Raises OSError naming the file.
        """
        try:
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise OSError(
                f"{self._path} cannot be written at step {step}: {error}; free disk space and run the command again, "
                "it resumes from the last checkpoint"
            ) from error
        shown = {k: f"{v:.3f}" for k, v in values.items() if k.startswith("loss")}
        for unit in UNITS:
            if (speed := values.get(f"{unit}_per_s")) is not None:
                shown[f"{unit}/s"] = f"{speed:.1f}"
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def advance(self) -> None:
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
        try:
            self._lines.close()
        except OSError:
            pass  # the failed write has been reported already
        if self._events is not None:
            self._events.close()


def _event_writer(workdir: Path, start: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "config.train.tensorboard=True needs tensorboardX: pip install -e '.[tensorboard]', or set it to False"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)


def _drop_after(path: Path, start: int) -> None:
    """Deletes the lines after step `start`, so that no step appears twice in a resumed run."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if (step := _step(line)) is not None and step <= start]
    new = "".join(line + "\n" for line in kept)
    if new != text:
        files.write_text(path, new)


def _step(line: str) -> int | None:
    try:
        return int(json_file.parse(line, "metrics")["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None  # the run was killed while it wrote this line
