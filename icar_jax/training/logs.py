"""What a run leaves behind for people: metrics as JSON lines, a progress bar, optional TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from icar_jax import workdir as files
from icar_jax.config import ConfigError
from icar_jax.parallel import distributed

METRICS = "metrics.jsonl"
UNITS = ("pairs", "images")  # that speed is counted in


def open_log(workdir: Path, steps: int, start: int, tensorboard: bool, title: str) -> RunLog | SilentLog:
    """The log of a run that continues after `start` steps; of several processes only the first one writes."""
    return RunLog(workdir, steps, start, tensorboard, title) if distributed.is_main() else SilentLog()


def note_event(workdir: Path, step: int, name: str, **values: Any) -> None:
    """Appends to the metrics what happened after `step`: {"step", "event": name, **values}. Raises OSError."""
    with (workdir / METRICS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"step": step, "event": name, **values}) + "\n")


class SilentLog:
    """Takes what a log takes and keeps nothing."""

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
        """Appends one line and shows the losses beside the bar; values are plain floats. Raises OSError naming the file."""
        try:
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise OSError(
                f"{self._path} cannot be written at step {step}: {error}; make room and run the command again, "
                "it continues from the last checkpoint"
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
            pass  # what could not be written was reported when it was written
        if self._events is not None:
            self._events.close()


def _event_writer(workdir: Path, start: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "config.train.tensorboard=True needs tensorboardX: pip install -e '.[tensorboard]', or switch it off"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)


def _drop_after(path: Path, start: int) -> None:
    """Drops lines beyond the step a run continues from, so that no step appears twice."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if (step := _step(line)) is not None and step <= start]
    new = "".join(line + "\n" for line in kept)
    if new != text:
        files.write_text(path, new)


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # a line that was cut off when the run was killed
