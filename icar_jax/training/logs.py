"""What a run leaves behind for people: metrics as JSON lines, a progress bar, optional TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from icar_jax.config import ConfigError


class RunLog:
    """WORKDIR/metrics.jsonl and the progress bar of one run."""

    def __init__(self, workdir: Path, steps: int, start: int, tensorboard: bool, title: str):
        self._lines = _continued(workdir / "metrics.jsonl", start).open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=start, desc=title, unit="step", dynamic_ncols=True, mininterval=1.0)
        self._events = _event_writer(workdir) if tensorboard else None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends one line and shows the losses beside the bar; values are plain floats."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        shown = {k: f"{v:.3f}" for k, v in values.items() if k.startswith("loss")}
        if "pairs_per_s" in values:
            shown["pairs/s"] = f"{values['pairs_per_s']:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def advance(self) -> None:
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
        self._lines.close()
        if self._events is not None:
            self._events.close()


def _event_writer(workdir: Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "config.train.tensorboard=True needs tensorboardX: pip install -e '.[tensorboard]', or switch it off"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"))


def _continued(path: Path, start: int) -> Path:
    """Drops lines at or beyond the step a run continues from, so that no step appears twice."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step(line) is not None and _step(line) <= start]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return path


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # a line that was cut off when the run was killed
