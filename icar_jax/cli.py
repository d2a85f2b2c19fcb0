"""`icar <command>`: argument parsing only, one function a command, and how the programs report errors."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from icar_jax import checkpoint, workdir
from icar_jax import config as cfg


@contextlib.contextmanager
def user_errors(interrupted: str = "stopped; the same command continues from the last checkpoint") -> Iterator[None]:
    """Ends the program with a plain message for errors a user can cause; other faults keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except (cfg.ConfigError, checkpoint.CheckpointError, OSError) as error:
        _fail(error)
    except (ValueError, RuntimeError) as error:
        # Raised by this package on purpose, or from deep inside a library: only the former reads well alone.
        if type(error).__module__.startswith("icar_jax") or _raised_here(error):
            _fail(error)
        raise


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("icar_jax")


def _fail(error: BaseException) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def run_program(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a root script: overrides of unknown fields are reported by name, and libraries log warnings only."""

    def parse(args: Sequence[str]) -> Sequence[str]:
        with user_errors():
            for arg in args[1:]:
                name = arg.lstrip("-").partition("=")[0]
                if arg.startswith("-") and name.startswith("config."):
                    cfg.check_override(name)
                elif name == "config" and "=" in arg:
                    _check_config_file(arg.partition("=")[2])
            rest = app.parse_flags_with_usage(args)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        return rest

    app.run(main, flags_parser=parse)


def _check_config_file(value: str) -> None:
    """Raises ConfigError where --config names no file, or an argument its get_config does not take."""
    path, _, argument = value.partition(":")
    if not Path(path).is_file():
        raise cfg.ConfigError(f"--config={value}: {path} is no file; configs/demo.py:clip is an example")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise cfg.ConfigError(f"--config={value}: {path} defines no get_config()")
    if argument and not inspect.signature(get_config).parameters:
        raise cfg.ConfigError(f"--config={value}: {path} takes no argument; write --config={path}")
    get_config(*([argument] if argument else []))


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `icar`."""
    parser = argparse.ArgumentParser(prog="icar", description="Image complexity-aware retrieval in JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_bundle(commands)
    _add_describe(commands)
    _add_scenes(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_reference(commands)
    _add_plan(commands)
    args, rest = parser.parse_known_args(argv)
    args.overrides = [word for word in rest if word.startswith("--config.")]
    if set(rest) - set(args.overrides) or (rest and "config" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.set_verbosity(logging.WARNING)
    # So that half-written folders are removed before the program ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with user_errors("stopped; nothing was written"):
        args.run(args)


def _add_bundle(commands) -> None:
    p = commands.add_parser(
        "bundle",
        help="join a CLIP and a complexity model with thresholds",
        description="Joins a CLIP with early exits and a complexity model into one folder that routes. Thresholds are "
        "set on calibration images, which the CLIP's workdir names, unless they are given.",
    )
    p.add_argument("--clip", required=True, help="workdir or checkpoint of the CLIP model")
    p.add_argument("--complexity", required=True, help="workdir or checkpoint of the complexity model")
    p.add_argument("--out", required=True, help="folder to write; WORKDIR/bundle is where evaluate.py looks")
    p.add_argument("--share", type=float, nargs="+", default=[], metavar="S", help="share of the images for each early exit")
    p.add_argument("--thresholds", type=float, nargs="+", metavar="T", help="use these instead of calibrating")
    p.add_argument("--root", help="folder of the pictures, where it moved since training")
    p.set_defaults(run=_bundle)


def _bundle(args: argparse.Namespace) -> None:
    from icar_jax.data import sources
    from icar_jax.evaluation.calibration import make_bundle

    calibration = None
    if args.thresholds is None:
        if (Path(args.clip) / workdir.CONFIG).is_file():
            data = workdir.load_config(args.clip).data
            data.root = args.root or data.root
            calibration = sources.calibration_source(data)
    elif args.share:
        raise cfg.ConfigError("--share and --thresholds exclude each other: a share is turned into a threshold")
    out = make_bundle(
        args.clip, args.complexity, args.out, calibration=calibration, shares=args.share, thresholds=args.thresholds
    )
    routing = checkpoint.describe(out)["routing"]
    print(f"Bundle: {out}: exits {routing['exits']}, thresholds {[round(t, 4) for t in routing['thresholds']]}")


def _add_describe(commands) -> None:
    p = commands.add_parser("describe", help="print what a checkpoint, bundle or workdir holds")
    p.add_argument("path")
    p.set_defaults(run=lambda args: print(json.dumps(checkpoint.describe(checkpoint.find(args.path)), indent=2)))


def _add_scenes(commands) -> None:
    p = commands.add_parser("scenes", help="write a sheet of scenes with their captions, to look at")
    p.add_argument("out", help="PNG file to write")
    p.add_argument("--split", default="val", help="train, calibration, val, test, relations or heldout")
    p.add_argument("-n", type=int, default=20, help="number of pictures")
    p.set_defaults(run=_scenes)


def _scenes(args: argparse.Namespace) -> None:
    from icar_jax.data.scenes import Scenes, contact_sheet

    if Path(args.out).suffix.lower() != ".png":
        raise cfg.ConfigError(f"{args.out} must end in .png")
    contact_sheet(Scenes(args.split, args.n), args.n, args.out)
    print(f"{args.n} pictures of scenes/{args.split}: {args.out}")


def _add_convert(commands) -> None:
    p = commands.add_parser(
        "convert",
        help="turn PyTorch CLIP, SigLIP, ConvNeXt or ICAR weights into a checkpoint",
        description="Reads OpenAI, OpenCLIP and Hugging Face CLIP, Hugging Face SigLIP, timm ConvNeXt and ICAR weights; the "
        "layout, sizes, activation and preprocessing are detected. docs/weights.md tells which files to get.",
    )
    p.add_argument("source", help="file or folder of weights; or a checkpoint, to give it another --tokenizer")
    p.add_argument("dest", help="folder to write")
    p.add_argument("--activation", default="", help="gelu, gelu_tanh or quick_gelu, where the source does not say")
    p.add_argument("--preprocess", default="", help="preset or JSON file, where the source does not say; presets: openai, "
                   "half, siglip, icar, icc, imagenet")  # fmt: skip
    p.add_argument("--exits", type=int, nargs="+", default=[], metavar="BLOCKS", help="add early exits after so many blocks")
    p.add_argument("--pool", default="", help="token the added exits read: cls (default), mean or first_patch")
    p.add_argument("--heads", type=int, nargs=2, default=[], metavar=("VISION", "TEXT"), help="attention heads, where unknown")
    p.add_argument("--image-size", type=int, default=0, metavar="PIXELS", help="resize the position embeddings for this size")
    p.add_argument("--tokenizer", default="", metavar="FILE", help="tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz")
    p.add_argument("--verify", default="", metavar="NPZ", help="compare with this output of `icar reference` before writing")
    p.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from icar_jax.convert.convert import Options, convert
    from icar_jax.convert.verify import format_table

    options = Options(
        args.activation, args.preprocess, tuple(args.exits), args.pool, tuple(args.heads), args.image_size, args.tokenizer
    )
    report = convert(args.source, args.dest, options, args.verify)
    print(report.summary())
    if report.differences:
        print(format_table(report.differences))
    for note in report.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"Checkpoint: {report.path}")


def _add_export(commands) -> None:
    p = commands.add_parser(
        "export",
        help="write a checkpoint in the layout of a PyTorch library",
        description="Writes weights with their configuration and tokenizer files into a new folder, offline and without torch.",
    )
    p.add_argument("checkpoint", help="checkpoint, bundle or workdir")
    p.add_argument("dest", nargs="?", help="new folder; CHECKPOINT-LAYOUT by default")
    p.add_argument("--to", required=True, metavar="LAYOUT", help="openai, open_clip, hf, icar or timm")
    p.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from icar_jax.convert.export import export

    source = Path(args.checkpoint)
    dest = args.dest or source.resolve().with_name(f"{source.resolve().name}-{args.to}")
    written = export(source, dest, args.to)
    for note in written.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"Exported: {written.path}: {', '.join(written.files)}")


def _add_reference(commands) -> None:
    p = commands.add_parser(
        "reference",
        help="run weights in PyTorch and save inputs and embeddings, for `icar convert --verify`",
        description="Runs the weights with the library they come from (needs torch and that library: the [parity] extra).",
    )
    p.add_argument("source", help="file or folder of weights, as given to `icar convert`")
    p.add_argument("out", help=".npz file to write")
    p.add_argument("--activation", default="", help="for OpenCLIP state dicts without a config: gelu or quick_gelu")
    p.add_argument("--heads", type=int, nargs=2, default=[], metavar=("VISION", "TEXT"), help="likewise, attention heads")
    p.add_argument("--exits", type=int, nargs="+", default=[], metavar="BLOCKS", help="the exit of a bare ICAR state dict")
    p.add_argument("--image-size", type=int, default=0, metavar="PIXELS", help="as given to `icar convert`")
    p.add_argument("--model-name", default="", help="the library's name of the model, where nothing beside the weights says it")
    p.add_argument("--images", type=int, default=4, help="number of images and captions")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=_reference)


def _reference(args: argparse.Namespace) -> None:
    from icar_jax.convert.reference import write_reference

    out = write_reference(
        args.source,
        args.out,
        activation=args.activation,
        heads=args.heads,
        exits=args.exits,
        image_size=args.image_size,
        model_name=args.model_name,
        images=args.images,
        seed=args.seed,
    )
    print(f"Reference: {out}; compare with `icar convert {shlex.quote(args.source)} DEST --verify {shlex.quote(str(out))}`")


def _add_plan(commands) -> None:
    p = commands.add_parser(
        "plan",
        help="what a training configuration needs on a TPU slice, compiled without one",
        description="Compiles the real training step for a slice and prints memory, FLOPs, collectives and a bound on its "
        "speed; exit status 0 only if it fits. Needs `pip install libtpu`; --devices compiles for CPU devices instead.",
    )
    p.add_argument("--config", required=True, help="configs/x.py or configs/x.py:argument")
    p.add_argument("--topology", default="", help="slice such as v5e:16x16 or v5p:4x4x4; with --devices a chip such as h100")
    p.add_argument("--devices", type=int, default=0, help="compile for so many CPU devices instead")
    p.add_argument("--sweep", action="store_true", help="try mesh shapes, remat and scan; list what fits, fastest first")
    p.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from icar_jax.training.plan_report import run

    sys.exit(run(_config(args), args.topology, args.devices, args.sweep, sys.stdout))


def _config(args: argparse.Namespace) -> cfg.ExperimentConfig:
    """The configuration of --config with the overrides --config.a.b=value that the root scripts take."""
    _check_config_file(args.config)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    for word in args.overrides:
        cfg.check_override(word.lstrip("-").partition("=")[0])
    values(["icar", f"--config={args.config}", *args.overrides])
    return values.config


if __name__ == "__main__":
    main()
