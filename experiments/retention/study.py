"""Measures how much recall of a full-depth CLIP is retained at a fraction of its cost, by recipe, router and seed.

    python -m experiments.retention.study --dataset all --setting small --photos PATH/TO/flickr8k --out workdir/retention
        [--seeds 1 2 3] [--recipes all|NAME ...] [--routers complexity regret gallery blocks] [--jobs N]
        [--train-only | --report-only]

Trains every recipe of recipes.py with train.py, each run in the workdir OUT/DATASET/RECIPE/SEED; evaluates it in a
gallery of held-out images and distractors; writes OUT/retention.json, retention.md and retention.png. Finished runs are
skipped and interrupted ones are resumed, so after Ctrl-C the same command continues. The baseline and the shallower baseline
run first: whether depth pays is printed as soon as they are evaluated. `--jobs 2` trains two runs in parallel, each on half
of the cores, which on a CPU takes little longer than one run on all cores; output then goes to OUT/DATASET/RECIPE/SEED.log.
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
from experiments.retention.jobs import ChildProcesses, Job, Progress, TrainingRun, run_jobs
from experiments.retention.recipes import DATASETS, RECIPES, SETTINGS, Sizes
from icar_jax import workdir as files
from icar_jax.cli.errors import user_errors
from icar_jax.config import ConfigError, to_json

ROOT = Path(__file__).parents[2]
ROUTERS = ("complexity", "regret", "gallery", "blocks")
FIRST = ("baseline", "static")  # all other runs are compared with these


@dataclass(frozen=True)
class Plan:
    """The study selected on the command line."""

    out: Path
    datasets: tuple[str, ...]
    sizes: dict[str, Sizes]
    setting: str
    seeds: tuple[int, ...]
    recipes: tuple[str, ...]
    routers: tuple[str, ...]
    photos: str
    jobs: int = 1


def make_jobs(plan: Plan, heads: bool = True) -> list[Job]:
    """Returns all jobs in order: ConvNeXt-IC, the pretrained towers, the reference runs FIRST, then the rest by seed.

    Raises ConfigError.
    """
    found = []
    if "complexity" in plan.routers:
        # Trained on scenes for every dataset.
        config = recipes.complexity_config(plan.sizes[plan.datasets[0]], plan.out)
        found.append(Job(TrainingRun("ConvNeXt-IC", plan.out / "router", config)))
    needed = {RECIPES[name].init for name in plan.recipes}
    for dataset in dict.fromkeys(each for name in plan.datasets for each in (plan.sizes[name].after, name) if each):
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
                    continue  # reported by `skipped_recipes`
                config = recipes.clip_config(name, dataset, plan.sizes[dataset], seed, plan.photos, plan.out)
                run = TrainingRun(f"{dataset}/{name}/seed {seed}", recipes.folder(plan.out, dataset, name, seed), config)
                of = dataset, name, seed
                judged_by = [recipes.folder(plan.out, dataset, "baseline", seed)] if name != "baseline" else []
                judged_by += [plan.out / "router"] if config.clip.exits and "complexity" in plan.routers else []
                routers = tuple(router_runs(plan, *of, config.clip.exits)) if heads else ()
                found.append(Job(run, routers, of, tuple(judged_by)))
    return found


def skipped_recipes(plan: Plan) -> list[str]:
    """Returns a sentence for each recipe skipped for a dataset, because from scratch it would see fewer pairs than others."""
    return [
        f"{dataset}/{name} is skipped: it starts from scratch, the others fine-tune towers of {plan.sizes[dataset].after}"
        for dataset in plan.datasets for name in plan.recipes if plan.sizes[dataset].after and not RECIPES[name].init
    ]  # fmt: skip


def router_folder(plan: Plan, dataset: str, router: str, recipe: str = "", seed: int = 0) -> Path:
    """Returns the workdir of a router: one ConvNeXt-IC shared by all runs, or a head trained on the tower of one run."""
    if router == "complexity":
        return plan.out / "router"
    return recipes.folder(plan.out, dataset, recipe, seed) / router


def router_runs(plan: Plan, dataset: str, recipe: str, seed: int, exits: tuple[int, ...]) -> Iterator[TrainingRun]:
    """Yields the runs of the routers trained on the tower of a run with exits."""
    for router in plan.routers:
        if router == "complexity" or not exits:
            continue
        s, clip = plan.sizes[dataset], recipes.folder(plan.out, dataset, recipe, seed)
        config = recipes.head_config(router, dataset, s, seed, plan.photos, clip, exits[0], plan.out)
        workdir = router_folder(plan, dataset, router, recipe, seed)
        yield TrainingRun(f"{dataset}/{recipe}/seed {seed}, router {router}", workdir, config)


def train(run: TrainingRun, children: ChildProcesses, log: Path | None = None) -> None:
    """Runs or resumes train.py with output in `log`; does nothing for a finished run.

    Raises ConfigError if the workdir holds another run, CalledProcessError if train.py fails.
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


def evaluate(plan: Plan, job: Job, children: ChildProcesses, log: Path | None = None) -> bool:
    """Evaluates a trained run; returns False if its rows already exist. Raises CalledProcessError if the evaluation fails."""
    dataset, recipe, seed = job.of
    s, many = plan.sizes[dataset], RECIPES[recipe].exits
    request = rows.make_request(
        job.run.config, job.run.workdir,
        {router: router_folder(plan, dataset, router, recipe, seed) for router in plan.routers} if many else {},
        calibration=s.calibration, distractors=s.distractors, budgets=recipes.budgets_of(recipe, s), draws=s.random_draws,
        against=None if recipe == "baseline" else recipes.folder(plan.out, dataset, "baseline", seed),
    )  # fmt: skip
    if rows.is_evaluated(request):
        return False
    print(f"-- evaluate {job.run.name}\n", end="", flush=True)  # one write, since other threads print too
    file = job.run.workdir.with_name(f"{seed}.evaluate.json")
    files.write_text(file, json.dumps(request, indent=1) + "\n")
    children.call([sys.executable, "-m", "experiments.retention.rows", file], log)
    return True


def run_all(plan: Plan, todo: list[Job], *, train_only: bool) -> None:
    """Trains and evaluates unfinished runs; reports once the reference runs are evaluated, after each seed, and at the end."""
    progress, children = Progress([run for job in todo for run in job.runs]), ChildProcesses()
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

    run_jobs(todo, do, plan.jobs, children)
    if not train_only:
        report(plan)


def report(plan: Plan) -> None:
    """Writes tables and figure of all runs evaluated so far, and prints whether depth pays."""
    about = {
        "setting": plan.setting, "seeds": list(plan.seeds), "datasets": list(plan.datasets), "recipes": list(plan.recipes),
        "routers": list(plan.routers), "sizes": {name: dataclasses.asdict(each) for name, each in plan.sizes.items()},
    }  # fmt: skip
    resamples = max(each.bootstrap for each in plan.sizes.values())
    record = retention_report.write_report(plan.out, about, plan.recipes, plan.seeds, resamples)
    for dataset, part in record["datasets"].items():
        print(retention_report.depth_sentence(dataset, part))
    print(f"Table: {plan.out / 'retention.md'}", flush=True)


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of = "shaded: photograph-textured scenes; both: scenes and photos"
    p.add_argument("--dataset", nargs="+", choices=(*DATASETS, "both", "all"), default=["scenes"], help=of)
    p.add_argument("--setting", choices=list(SETTINGS), default="small")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--recipes", nargs="+", default=["all"], help=f"default: all of {', '.join(RECIPES)}")
    p.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    p.add_argument("--photos", default="", help="folder of captioned photographs, with dataset*.json (Karpathy's layout)")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--jobs", type=int, default=1, help="number of parallel runs, each with its share of the cores (CPUs)")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true", help="skip evaluation and router training on the towers")
    only.add_argument("--report-only", action="store_true", help="only report runs that are already evaluated")
    args = p.parse_args(arguments)
    several = {"both": ("scenes", "photos"), "all": DATASETS}
    selected = {name for each in args.dataset for name in several.get(each, (each,))}
    datasets = tuple(name for name in DATASETS if name in selected)
    needs_photos = {"photos", "shaded"} & selected and not args.report_only
    if needs_photos and not (args.photos and Path(args.photos).is_dir()):
        p.error(f"--photos {args.photos!r} is not a folder; pass the folder that contains dataset*.json")
    names = list(RECIPES) if args.recipes == ["all"] else args.recipes
    if unknown := [name for name in names if name not in RECIPES]:
        p.error(f"unknown --recipes {' '.join(unknown)}; use all, or some of {', '.join(RECIPES)}")
    if recipes.PRETRAINING_SEED in args.seeds:
        p.error(f"--seeds {recipes.PRETRAINING_SEED} is used by pretraining and would repeat its batches; use other seeds")
    if args.jobs < 1:
        p.error(f"--jobs {args.jobs} must be at least 1")
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
    # All seeds use the same programs, and compilation is half of an evaluation on a CPU.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(plan.out / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds `ChildProcesses.call`, which stops them
    with user_errors("stopped; the same command continues"):
        if args.report_only:
            runs = [recipes.folder(plan.out, d, "baseline", seed) for d in plan.datasets for seed in plan.seeds]
            if not any((run / rows.ROWS).is_file() for run in runs):
                raise ConfigError(
                    f"{plan.out} holds no evaluated baseline of {', '.join(plan.datasets)} with seeds "
                    f"{', '.join(map(str, plan.seeds))}: first run this command without --report-only, or pass another --out"
                )
            report(plan)
            return
        todo = make_jobs(plan, heads=not args.train_only)  # validates every configuration before the first run
        for sentence in skipped_recipes(plan):
            print(sentence)
        if "shaded" in plan.datasets:
            sizes = plan.sizes["shaded"]
            folder = recipes.shaded_folder(plan.out, sizes)
            shaded_scenes.write_scenes(Path(plan.photos), folder, sizes.image_size, sizes.queries, sizes.distractors)
        try:
            run_all(plan, todo, train_only=args.train_only)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)  # the error was already printed


if __name__ == "__main__":
    main()
