"""How much of a separately trained full-depth CLIP is kept at a share of its cost, by training recipe, router and seed.

    python -m experiments.retention.study --dataset all --setting small --photos PATH/TO/flickr8k --out workdir/retention
        [--seeds 1 2 3] [--recipes all|NAME ...] [--routers complexity regret gallery blocks] [--jobs N]
        [--train-only | --report-only]

Trains every recipe of recipes.py with train.py, each run a workdir OUT/DATASET/RECIPE/SEED; evaluates it in a
gallery of held-out images and distractors; writes OUT/retention.json, retention.md and retention.png. Finished runs are
skipped and an interrupted one goes on, so Ctrl-C and the same command continue. The baseline and the static tower come first:
whether depth pays at all is printed as soon as they are evaluated. `--jobs 2` trains two runs side by side, each on half of
the cores, which on a CPU takes little longer than one on all of them; the programs then write to OUT/DATASET/RECIPE/SEED.log.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.retention import recipes, rows, shaded_scenes
from experiments.retention import report as retention_report
from experiments.retention.jobs import Children, Job, Progress, TrainingRun, work_through
from experiments.retention.recipes import DATASETS, RECIPES, SETTINGS, Sizes
from icar_jax import workdir as files
from icar_jax.cli.errors import user_errors
from icar_jax.config import ConfigError, to_json

ROOT = Path(__file__).parents[2]
ROUTERS = ("complexity", "regret", "gallery", "blocks")
FIRST = ("baseline", "static")  # every other run is compared with these


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    out: Path
    datasets: tuple[str, ...]
    sizes: dict[str, Sizes]
    setting: str
    seeds: tuple[int, ...]
    recipes: tuple[str, ...]
    routers: tuple[str, ...]
    photos: str
    jobs: int = 1


def jobs(plan: Plan, heads: bool = True) -> list[Job]:
    """ConvNeXt-IC and the pretrained towers, then those that all others are compared with, then seed by seed.

    Raises ConfigError.
    """
    found = []
    if "complexity" in plan.routers:
        # It learns scenes, whichever dataset is routed.
        config = recipes.complexity_config(plan.sizes[plan.datasets[0]], plan.out)
        found.append(Job(TrainingRun("ConvNeXt-IC", plan.out / "router", config)))
    needed = {RECIPES[name].init for name in plan.recipes}
    for dataset in dict.fromkeys(each for asked in plan.datasets for each in (plan.sizes[asked].after, asked) if each):
        for name in [each for each in recipes.PRETRAINED if each in needed]:
            sizes = SETTINGS[plan.setting][dataset]
            config = recipes.clip_config(name, dataset, sizes, recipes.PRETRAINING_SEED, plan.photos, plan.out)
            workdir = recipes.folder(plan.out, dataset, name, recipes.PRETRAINING_SEED)
            found.append(Job(TrainingRun(f"{dataset}/{name}", workdir, config)))
    others = [name for name in plan.recipes if name not in FIRST]
    for seed, names in [(seed, names) for names in (FIRST, others) for seed in plan.seeds]:
        for dataset in plan.datasets:
            for name in names:
                if plan.sizes[dataset].after and not RECIPES[name].init:
                    continue  # said by `left_out`
                config = recipes.clip_config(name, dataset, plan.sizes[dataset], seed, plan.photos, plan.out)
                run = TrainingRun(f"{dataset}/{name}/seed {seed}", recipes.folder(plan.out, dataset, name, seed), config)
                of = dataset, name, seed
                judged_by = [recipes.folder(plan.out, dataset, "baseline", seed)] if name != "baseline" else []
                judged_by += [plan.out / "router"] if config.clip.exits and "complexity" in plan.routers else []
                given = tuple(heads_of(plan, *of, config.clip.exits)) if heads else ()
                found.append(Job(run, given, of, tuple(judged_by)))
    return found


def left_out(plan: Plan) -> list[str]:
    """A sentence for each recipe that a dataset cannot have: from scratch it would see fewer pairs than the others."""
    return [
        f"{dataset}/{name} is left out: it starts from scratch, the others go on from towers of {plan.sizes[dataset].after}"
        for dataset in plan.datasets for name in plan.recipes if plan.sizes[dataset].after and not RECIPES[name].init
    ]  # fmt: skip


def router_folder(plan: Plan, dataset: str, router: str, recipe: str = "", seed: int = 0) -> Path:
    """The workdir of a router: one ConvNeXt-IC for all, and one head on the tower of every run."""
    if router == "complexity":
        return plan.out / "router"
    return recipes.folder(plan.out, dataset, recipe, seed) / router


def heads_of(plan: Plan, dataset: str, recipe: str, seed: int, exits: tuple[int, ...]) -> Iterator[TrainingRun]:
    """The routers that are trained on the tower of a run with exits."""
    for router in plan.routers:
        if router == "complexity" or not exits:
            continue
        s, clip = plan.sizes[dataset], recipes.folder(plan.out, dataset, recipe, seed)
        config = recipes.head_config(router, dataset, s, seed, plan.photos, clip, exits[0], plan.out)
        workdir = router_folder(plan, dataset, router, recipe, seed)
        yield TrainingRun(f"{dataset}/{recipe}/seed {seed}, router {router}", workdir, config)


def train(run: TrainingRun, children: Children, log: Path | None = None) -> None:
    """Runs or continues train.py, its output in `log`; a finished run is left alone.

    Raises ConfigError where the workdir holds another run, CalledProcessError where train.py fails.
    """
    if run.finished:
        files.require_same_config(run.workdir, run.config, files.FREE_ON_RESUME)
        return
    file = run.workdir.with_name(f"{run.workdir.name}.config.json")
    files.write_text(file, to_json(run.config) + "\n")
    command = [sys.executable, ROOT / "train.py", f"--config={Path(__file__).parent / 'config_file.py'}:{file}"]
    command += [f"--workdir={run.workdir}"]
    children.call(command, log)
    if not run.finished:
        raise subprocess.CalledProcessError(1, command)


def evaluate(plan: Plan, job: Job, children: Children, log: Path | None = None) -> bool:
    """Writes the rows of a trained run; False where they are there already. Raises CalledProcessError where that fails."""
    dataset, recipe, seed = job.of
    s, many = plan.sizes[dataset], RECIPES[recipe].exits
    asked_for = rows.request(
        job.run.config, job.run.workdir,
        {router: router_folder(plan, dataset, router, recipe, seed) for router in plan.routers} if many else {},
        calibration=s.calibration, distractors=s.distractors, budgets=recipes.budgets_of(recipe, s), draws=s.random_draws,
        against=None if recipe == "baseline" else recipes.folder(plan.out, dataset, "baseline", seed),
    )  # fmt: skip
    if rows.evaluated(asked_for):
        return False
    print(f"-- evaluate {job.run.name}\n", end="", flush=True)  # at once: other threads print too
    file = job.run.workdir.with_name(f"{seed}.evaluate.json")
    files.write_text(file, json.dumps(asked_for, indent=1) + "\n")
    children.call([sys.executable, "-m", "experiments.retention.rows", file], log)
    return True


def run_all(plan: Plan, todo: list[Job], *, train_only: bool) -> None:
    """Trains and evaluates what is not finished; reports when it is known whether depth pays, after each seed, at the end."""
    progress, children = Progress([run for job in todo for run in job.runs]), Children()
    part = {job.of: "depth" if job.of[1] in FIRST else job.of[2] for job in todo if job.of}
    new, lock = False, threading.Lock()

    def do(job: Job) -> None:
        nonlocal new
        log = None if plan.jobs == 1 else job.run.workdir.with_name(f"{job.run.workdir.name}.log")
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        for run in job.runs:
            if not run.finished:
                progress.begin(run, log)
                train(run, children, log)
                progress.end(run)
            else:
                train(run, children)
        if train_only or job.of is None:
            return
        evaluated = evaluate(plan, job, children, log)
        with lock:
            new |= evaluated
            of = part.pop(job.of)
            if new and part and of not in part.values():
                report(plan)
                new = False

    work_through(todo, do, plan.jobs, children)
    if not train_only:
        report(plan)


def report(plan: Plan) -> None:
    """Writes the tables and the figure of what is evaluated so far, and says whether depth pays."""
    about = {
        "setting": plan.setting, "seeds": list(plan.seeds), "datasets": list(plan.datasets), "recipes": list(plan.recipes),
        "routers": list(plan.routers), "sizes": {name: dataclasses.asdict(each) for name, each in plan.sizes.items()},
    }  # fmt: skip
    resamples = max(each.bootstrap for each in plan.sizes.values())
    record = retention_report.write(plan.out, about, plan.recipes, plan.seeds, resamples)
    for dataset, part in record["datasets"].items():
        print(retention_report.depth_sentence(dataset, part))
    print(f"Table: {plan.out / 'retention.md'}", flush=True)


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of = "shaded: scenes in the light and shade of photographs; both: scenes and photos"
    p.add_argument("--dataset", nargs="+", choices=(*DATASETS, "both", "all"), default=["scenes"], help=of)
    p.add_argument("--setting", choices=list(SETTINGS), default="small")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--recipes", nargs="+", default=["all"], help=f"every one by default; of {', '.join(RECIPES)}")
    p.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    p.add_argument("--photos", default="", help="folder of the photographs, with dataset*.json (Karpathy's layout)")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--jobs", type=int, default=1, help="runs side by side, each with its share of the cores (CPUs)")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true", help="no evaluation, no routers on the towers")
    only.add_argument("--report-only", action="store_true", help="only what is evaluated already (of all recipes by default)")
    args = p.parse_args(arguments)
    several = {"both": ("scenes", "photos"), "all": DATASETS}
    asked = {name for each in args.dataset for name in several.get(each, (each,))}
    datasets = tuple(name for name in DATASETS if name in asked)
    needs_photos = {"photos", "shaded"} & asked and not args.report_only
    if needs_photos and not (args.photos and Path(args.photos).is_dir()):
        p.error(f"--photos {args.photos!r} is no folder; name the one that holds dataset*.json")
    names = list(RECIPES) if args.recipes == ["all"] else args.recipes
    if unknown := [name for name in names if name not in RECIPES]:
        p.error(f"--recipes {' '.join(unknown)}: unknown; use all, or some of {', '.join(RECIPES)}")
    if recipes.PRETRAINING_SEED in args.seeds:
        p.error(f"--seeds {recipes.PRETRAINING_SEED}: that is pretraining's, its first batches would come again; use others")
    if args.jobs < 1:
        p.error(f"--jobs {args.jobs}: use 1, or more to train side by side")
    names = tuple(dict.fromkeys((*FIRST, *names)))
    photos = str(Path(args.photos).resolve()) if args.photos else ""
    sizes = {dataset: SETTINGS[args.setting][dataset] for dataset in datasets}
    plan = Plan(
        args.out.resolve(),
        datasets,
        sizes,
        args.setting,
        tuple(dict.fromkeys(args.seeds)),
        names,
        tuple(args.routers),
        photos,
        args.jobs,
    )
    return args, plan


def main() -> None:
    args, plan = parse()
    # Seeds share their programs, and compiling them is half of an evaluation on a CPU.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(plan.out / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `train`, which ends its child first
    with user_errors("stopped; the same command continues"):
        if args.report_only:
            runs = [recipes.folder(plan.out, d, "baseline", seed) for d in plan.datasets for seed in plan.seeds]
            if not any((run / rows.ROWS).is_file() for run in runs):
                raise ConfigError(
                    f"{plan.out} holds no evaluated baseline of {', '.join(plan.datasets)} with seeds "
                    f"{', '.join(map(str, plan.seeds))}: run this command without --report-only before, or name its folder"
                )
            report(plan)
            return
        todo = jobs(plan, heads=not args.train_only)  # every configuration is checked before the first hour
        for sentence in left_out(plan):
            print(sentence)
        if "shaded" in plan.datasets:
            sizes = plan.sizes["shaded"]
            folder = recipes.shaded_folder(plan.out, sizes)
            shaded_scenes.write(Path(plan.photos), folder, sizes.image_size, sizes.queries, sizes.distractors)
        try:
            run_all(plan, todo, train_only=args.train_only)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)  # it has been said why


if __name__ == "__main__":
    main()
