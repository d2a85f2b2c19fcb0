"""The commands on weights: `icar convert`, `join`, `export`, `push`, `compile` and `reference`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def add(commands) -> None:
    """Adds `icar convert`, `join`, `export`, `push`, `compile` and `reference` to the subparsers."""
    _add_convert(commands)
    _add_join(commands)
    _add_export(commands)
    _add_push(commands)
    _add_compile(commands)
    _add_reference(commands)


def _add_convert(commands) -> None:
    p = commands.add_parser(
        "convert",
        help="convert PyTorch CLIP, SigLIP, ViT, DINOv2, ConvNeXt or ICAR weights to a checkpoint",
        description="Reads OpenAI, OpenCLIP and Hugging Face CLIP, Hugging Face SigLIP, Hugging Face and timm ViT and DINOv2, "
        "timm ConvNeXt and ICAR weights; the layout, sizes, activation and preprocessing are detected. docs/weights.md lists "
        "the files to download.",
    )
    p.add_argument("source", help="file or folder of weights, or a name on the Hugging Face hub: owner/name, "
                   "hf://owner/name@revision; or a checkpoint, to replace its tokenizer")  # fmt: skip
    p.add_argument("dest", help="folder to write")
    p.add_argument("--activation", default="", help="gelu, gelu_tanh or quick_gelu, if not specified by the source")
    p.add_argument("--preprocess", default="", help="preset or JSON file, if not specified by the source; presets: openai, "
                   "half, siglip, icar, icc, imagenet")  # fmt: skip
    p.add_argument("--exits", type=_exits, nargs="+", default=[], metavar="BLOCKS", help="add early exits after these blocks; "
                   "none leaves out the exit of an ICAR checkpoint")  # fmt: skip
    p.add_argument("--pool", default="", help="pooling of the added exits: cls, mean, first_patch, cls_mean (as full depth)")
    p.add_argument("--heads", type=int, nargs="+", default=[], metavar="NUMBER", help="attention heads, if unknown: of the "
                   "vision and the text tower, or of a single tower")  # fmt: skip
    p.add_argument("--image-size", type=int, default=0, metavar="PIXELS", help="resize the position embeddings to this size")
    p.add_argument("--tokenizer", default="", metavar="FILE", help="tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz")
    p.add_argument("--context-length", type=int, default=0, metavar="N", help="tokens of a text, for a text encoder")
    p.add_argument("--text-pool", default="", help="pooling of a text encoder, if unknown: first or mean")
    p.add_argument("--base", default="", metavar="SOURCE", help="base weights of a folder that holds a LoRA adapter alone")
    p.add_argument("--weights", default="", choices=("ema", "plain"), help="weights of a file that holds averaged ones (EMA) "
                   "beside the others (plain)")  # fmt: skip
    p.add_argument("--reduce", default="", help="of CrossGET's checkpoints: crossget, or none for its towers without reduction")
    p.add_argument("--image-r", type=int, default=-1, metavar="N", help="with --reduce crossget: tokens that each block of the "
                   "vision tower merges; 0 merges none")  # fmt: skip
    p.add_argument("--text-r", type=int, default=-1, metavar="N", help="the same of the text tower")
    p.add_argument("--verify", default="", metavar="NPZ", help="compare with this output of `icar reference` before writing")
    p.set_defaults(run=_convert)


_NONE = "none"


def _exits(text: str) -> int | str:
    """A number of blocks, or 'none'."""
    if text == _NONE:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of blocks, or none, found {text!r}") from None


def _convert(args: argparse.Namespace) -> None:
    from icar_jax.convert.convert import Options, convert
    from icar_jax.convert.parity.verify import format_table

    options = Options(
        args.activation, args.preprocess, tuple(exit for exit in args.exits if exit != _NONE), args.pool,
        tuple(args.heads), args.image_size, args.tokenizer,
        args.context_length, args.text_pool, args.base, args.weights, args.reduce, args.image_r, args.text_r,
        _NONE in args.exits,
    )  # fmt: skip
    report = convert(args.source, args.dest, options, args.verify)
    print(report.summary())
    if report.differences:
        print(format_table(report.differences))
    for note in report.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"Checkpoint: {report.path}")


def _add_join(commands) -> None:
    p = commands.add_parser(
        "join",
        help="make a CLIP of an image tower and a text tower",
        description="Writes a CLIP with the vision tower of one model and the text tower of another, with preprocessing and "
        "tokenizer. The projections into the common space are drawn at random; training them is the first thing to do "
        "(configs/lit.py). Both models may be checkpoints, or weights that `icar convert` reads.",
    )
    p.add_argument("--image", required=True, metavar="A", help="vision tower: DINOv2, ViT, or a CLIP")
    p.add_argument("--text", required=True, metavar="B", help="text tower: BERT, RoBERTa, sentence-transformers, or a CLIP")
    p.add_argument("dest", help="folder to write")
    p.add_argument("--embed-dim", type=int, default=256, metavar="D", help="dimensions of the common space (256)")
    p.add_argument("--head", default="cls", choices=("cls", "mean", "cls_mean"), help="what is projected of an image: class "
                   "token, mean of the patches, or both (cls)")  # fmt: skip
    p.add_argument("--projection-width", type=int, default=0, metavar="N", help="adds an MLP with N hidden channels to the "
                   "linear projections")  # fmt: skip
    p.add_argument("--head-blocks", type=int, default=1, metavar="N", help="each head reads the last N blocks up to it (1)")
    p.add_argument("--text-head-blocks", type=int, default=1, metavar="N", help="the same for the text tower (1)")
    p.add_argument("--exits", type=int, nargs="+", default=[], metavar="BLOCKS", help="early exits after these blocks")
    p.add_argument("--image-size", type=int, default=0, metavar="PIXELS", help="resize the position embeddings to this size")
    p.add_argument("--preprocess", default="", help="of the images, if the vision tower's files do not say")
    p.add_argument("--context-length", type=int, default=0, metavar="N", help="tokens of a text (as the text tower says)")
    p.add_argument("--text-pool", default="", help="pooling of the text tower, if its files do not say: first or mean")
    p.add_argument("--tokenizer", default="", metavar="FILE", help="tokenizer.json, if not beside the text tower")
    p.add_argument("--seed", type=int, default=0, help="of the projections (0)")
    p.set_defaults(run=_join)


def _join(args: argparse.Namespace) -> None:
    from icar_jax.convert.join import Joint, Options, join

    projection = "linear_mlp" if args.projection_width else "linear"
    blocks = (args.head_blocks, args.text_head_blocks)
    joint = Joint(args.embed_dim, args.head, projection, args.projection_width, tuple(args.exits), args.seed, *blocks)
    image = Options(image_size=args.image_size, preprocess=args.preprocess)
    text = Options(context_length=args.context_length, text_pool=args.text_pool, tokenizer=args.tokenizer)
    print(f"Checkpoint: {join(args.image, args.text, args.dest, joint, image, text)}")


def _add_export(commands) -> None:
    p = commands.add_parser(
        "export",
        help="export a checkpoint to the layout of a PyTorch library, or to StableHLO programs",
        description="Writes weights with their configuration and tokenizer files into a new folder, offline and without torch. "
        "With --to stablehlo, each exit, the text tower and the complexity model become programs that JAX can run without "
        "this package.",
    )
    p.add_argument("checkpoint", help="checkpoint, bundle or workdir")
    p.add_argument("dest", nargs="?", help="new folder (CHECKPOINT-LAYOUT)")
    p.add_argument("--to", required=True, metavar="LAYOUT", help="openai, open_clip, hf, icar, timm or stablehlo")
    p.add_argument("--platforms", nargs="+", metavar="NAME", help="with stablehlo: cpu, cuda, rocm, tpu (cpu cuda tpu)")
    p.add_argument("--batch", type=int, metavar="N", help="with stablehlo: fixed batch size; symbolic by default")
    p.add_argument("--dtype", metavar="NAME", help="with stablehlo: dtype of activations, float32 (default) or bfloat16")
    p.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from icar_jax.convert.export import export
    from icar_jax.convert.fields import ConvertError

    source = Path(args.checkpoint)
    dest = args.dest or source.resolve().with_name(f"{source.resolve().name}-{args.to}")
    options = {name: getattr(args, name) for name in ("platforms", "batch", "dtype") if getattr(args, name) is not None}
    if args.to == "stablehlo":
        from icar_jax.convert.stablehlo import export_programs

        written = export_programs(source, dest, **options)
    elif options:
        raise ConvertError(f"--{', --'.join(options)} can only be used with --to stablehlo")
    else:
        written = export(source, dest, args.to)
    for note in written.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"Exported: {written.path}: {', '.join(written.files)}")


def _add_push(commands) -> None:
    p = commands.add_parser(
        "push",
        help="upload a checkpoint or an export to the Hugging Face hub",
        description="Creates the repository if need be and uploads the files in one commit, with a model card: what the model "
        "is, what it was made from, its exits and their counted FLOPs. Log in with `hf auth login`, or set HF_TOKEN.",
    )
    p.add_argument("folder", help="checkpoint, bundle, workdir, or a folder that `icar export` wrote")
    p.add_argument("repository", help="owner/name, or owner/name@branch")
    p.add_argument("--private", action="store_true", help="create the repository as a private one")
    p.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> None:
    from icar_jax.convert.hub.push import push

    done = push(args.folder, args.repository, args.private)
    print(f"Pushed: {done.address}: {', '.join(done.files)}")


def _add_compile(commands) -> None:
    p = commands.add_parser(
        "compile",
        help="write a model's programs beside it, so that it starts faster",
        description="Traces every exit, the text tower and the complexity model once and writes them into CHECKPOINT/programs. "
        "`icar index`, `embed`, `search` and `serve`, and icar_jax.load, then skip this at every start. Programs that do not "
        "fit the weights, the dtype or the machine are ignored with a note.",
    )
    p.add_argument("checkpoint", help="checkpoint, bundle or workdir")
    p.add_argument("--platforms", nargs="+", default=["cpu", "cuda", "tpu"], metavar="NAME", help="after CHECKPOINT: "
                   "cpu, cuda, rocm, tpu (cpu cuda tpu)")  # fmt: skip
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of activations (float32)")
    p.set_defaults(run=_compile)


def _compile(args: argparse.Namespace) -> None:
    from icar_jax import checkpoint
    from icar_jax.inference.ahead import ExportedPrograms
    from icar_jax.inference.loading import load

    folder, programs = checkpoint.find(args.checkpoint), ExportedPrograms()
    model = load(folder, dtype=args.dtype, programs=programs)
    if model.thresholds is not None:
        _ = model.router  # names its programs when it is made
    files = programs.write(folder, model.identity, args.dtype, args.platforms, lambda name: print(f"tracing {name}"))
    size = sum(file.stat().st_size for file in files)
    print(f"Programs: {files[0].parent}: {len(files) - 1} for {', '.join(args.platforms)}, {size / 1e6:.1f} MB")


def _add_reference(commands) -> None:
    p = commands.add_parser(
        "reference",
        help="run weights in PyTorch and save inputs and embeddings, for `icar convert --verify`",
        description="Runs the weights in the library they come from (needs torch and that library: the [parity] extra).",
    )
    p.add_argument("source", help="file or folder of weights, as given to `icar convert`")
    p.add_argument("out", help=".npz file to write")
    p.add_argument("--activation", default="", help="gelu or quick_gelu, for OpenCLIP state dicts without a config")
    p.add_argument("--heads", type=int, nargs=2, default=[], metavar=("VISION", "TEXT"), help="attention heads of such weights")
    p.add_argument("--exits", type=int, nargs="+", default=[], metavar="BLOCKS", help="exit of a bare ICAR state dict")
    p.add_argument("--image-size", type=int, default=0, metavar="PIXELS", help="as given to `icar convert`")
    p.add_argument("--context-length", type=int, default=0, metavar="N", help="of a text encoder, as given to `icar convert`")
    p.add_argument("--text-pool", default="", help="of a text encoder, as given to `icar convert`: first or mean")
    p.add_argument("--model-name", default="", help="name of the model in the library, if no file next to the weights gives it")
    p.add_argument("--images", type=int, default=4, help="number of images and texts")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=_reference)


def _reference(args: argparse.Namespace) -> None:
    from icar_jax.convert.parity.reference import write_reference

    out = write_reference(
        args.source,
        args.out,
        activation=args.activation,
        heads=args.heads,
        exits=args.exits,
        image_size=args.image_size,
        context_length=args.context_length,
        text_pool=args.text_pool,
        model_name=args.model_name,
        images=args.images,
        seed=args.seed,
    )
    print(f"Reference: {out}; compare with `icar convert {shlex.quote(args.source)} DEST --verify {shlex.quote(str(out))}`")
