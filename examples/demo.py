"""Runs all of ICAR in a few minutes on two CPU cores: train, route, evaluate, index, search.

    python examples/demo.py [FOLDER]        default: workdir/demo; the same command resumes an interrupted demo

Every step corresponds to one command, which is printed before it runs; here all steps run in one process, so that nothing is
imported or compiled twice.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Slow imports are deferred to the steps, so that the first lines appear immediately.
ROOT = Path(__file__).resolve().parent.parent
SCENES, QUERY = 500, "A small red circle on a yellow background."
PLAN = """ICAR on synthetic scenes: a CLIP with an exit after two of six blocks, and a complexity model that chooses the exit.

  1  train the complexity model      4  evaluate full depth, exit, routing, random routing and an oracle
  2  train the CLIP                  5  draw {scenes} held-out scenes
  3  bundle both with a threshold    6, 7  index them, and search them by text

It takes three to seven minutes on two CPU cores, and 200 MB of disk in {folder}.
The same command continues where it was stopped."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="workdir/demo", help="output folder (default: workdir/demo)")
    folder = Path(parser.parse_args().folder)
    print(PLAN.format(scenes=SCENES, folder=folder), flush=True)
    start = time.perf_counter()
    steps = list(enumerate(commands(folder), 1))
    for number, (title, words, run) in steps:
        print(f"\n[{number}/{len(steps)}, {time.perf_counter() - start:.0f} s] {title}\n$ {shlex.join(words)}", flush=True)
        run()
    print(f"\nThe demo took {time.perf_counter() - start:.0f} s.")
    print(f"Figure:  {folder / 'retention.png'}\nReport:  {folder / 'report' / 'index.html'}")
    print(f"Search:  .venv/bin/icar serve --store {folder / 'store'}")


def commands(folder: Path) -> list[tuple[str, list[str], Callable[[], object]]]:
    """Returns (title, command line, function that runs it in this process) of each step."""
    scorer, bundle, gallery, store = (str(folder / name) for name in ("complexity", "bundle", "gallery", "store"))
    captions = f"{gallery}/captions.jsonl"
    config = lambda name: f"--config=configs/demo.py:{name}"
    routed = f"--config.eval.complexity={scorer}"

    def icar(title: str, *words: str) -> tuple[str, list[str], Callable[[], object]]:
        from icar_jax import cli

        return title, ["icar", *words], lambda: cli.main(words)

    return [
        ("Complexity model", ["python", "train.py", config("complexity"), f"--workdir={scorer}"],
         lambda: _train("complexity", scorer)),
        ("CLIP with an early exit", ["python", "train.py", config("clip"), f"--workdir={folder}"],
         lambda: _train("clip", str(folder))),
        icar("Bundle", "bundle", "--clip", str(folder), "--complexity", scorer, "--out", bundle),
        ("Evaluation on 500 held-out scenes",
         ["python", "evaluate.py", config("clip"), f"--workdir={folder}", routed], lambda: _evaluate(folder, scorer)),
        icar("Images to search", "scenes", gallery, "-n", str(SCENES)),
        icar("Index", "index", f"{gallery}/images", "--checkpoint", bundle, "--store", store, "--captions", captions),
        icar("Search", "search", QUERY, "--store", store, "-k", "5"),
    ]  # fmt: skip


def _config(task: str):
    return runpy.run_path(str(ROOT / "configs" / "demo.py"))["get_config"](task)


def _train(task: str, workdir: str) -> None:
    from icar_jax.config import ConfigError
    from icar_jax.training.loop import train

    try:
        done = train(_config(task), Path(workdir))
    except ConfigError as error:
        raise ConfigError(f"{error}. Is it an older demo? Remove it, or use another folder: examples/demo.py DIR") from None
    if done == Path(workdir):  # stopped by a signal after saving a checkpoint
        sys.exit(143)


def _evaluate(folder: Path, scorer: str) -> None:
    from icar_jax.evaluation.evaluate import evaluate

    config = _config("clip")
    config.eval.complexity = scorer
    evaluate(config, folder)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    from icar_jax.cli import user_errors

    with user_errors():
        main()
