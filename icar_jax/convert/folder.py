"""Which files of a folder hold a model: of a folder on this machine, and of a repository before anything is downloaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from icar_jax import checkpoint
from icar_jax.convert import adapters
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts import registry
from icar_jax.convert.vocabulary import BESIDE, TOKENIZER_CONFIGS

_USUAL = (  # a layout may name more
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What training programs write beside weights, with the same endings.
_OF_TRAINING = {
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "rng_state.pth",
}
OWN = (checkpoint.DESCRIPTION, checkpoint.WEIGHTS, checkpoint.TOKENIZER)


def usual_weights() -> list[str]:
    """Names of weight files; of those in a folder the first is taken. Safetensors come before pickles."""
    return sorted((*_USUAL, *registry.weight_files()), key=lambda name: ".safetensors" not in name)


def choose_weights(names: Collection[str], where: str) -> str:
    """The file of weights among the `names` of a folder. Raises ConvertError, naming `where`, for none and for several.

    A pickle is not taken where a safetensors file lies beside it.
    """
    usual = usual_weights()
    others = sorted({n for n in names if PurePosixPath(n).suffix in SUFFIXES} - {*usual, *adapters.FILES, *_OF_TRAINING})
    safe = [name for name in others if name.endswith(".safetensors")]
    first = next((name for name in usual if name in names), None)
    if first and (".safetensors" in first or not safe):
        return first
    others = [first, *safe] if first else [n for n in others if n in safe or f"{PurePosixPath(n).stem}.safetensors" not in safe]
    if len(others) == 1:
        return others[0]
    if others:
        raise ConvertError(f"{where} holds several files of weights, name one of them: {', '.join(others)}")
    raise ConvertError(f"{where} holds no weights; expected {', '.join(usual)} or one file {', '.join(SUFFIXES)}")


def weights_file(path: Path) -> Path:
    """The file of weights at `path`, a file or a folder. Raises ConvertError, saying what to name instead, for none."""
    if path.is_file():
        return path
    if not path.exists():
        raise ConvertError(
            f"{path} does not exist; expected a file of weights, a folder that holds one, or hf://owner/name for a model on "
            "the Hugging Face hub"
        )
    _refuse_cache(path)
    return path / choose_weights([file.name for file in path.iterdir() if file.is_file()], str(path))


def _refuse_cache(folder: Path) -> None:
    """Raises ConvertError for a folder that Hugging Face libraries keep their downloads in."""
    models = sorted(folder.glob("models--*--*"))
    if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
        found = sorted((folder / "snapshots").iterdir())
        models = [folder]
    elif models:
        found = sorted(models[0].glob("snapshots/*"))
    else:
        return
    names = [model.name.removeprefix("models--").replace("--", "/", 1) for model in models]
    one = found[0] if found else folder / "snapshots" / "COMMIT"
    raise ConvertError(
        f"{folder} is a cache of the Hugging Face hub; give the name of a model ({', '.join(names[:5])}), or "
        f"the folder of one version in it, such as {one}"
    )


def needed(names: Collection[str], where: str, file: str = "") -> list[str]:
    """Of the `names` (paths) of a repository those that are read: of a checkpoint of this library, or of weights to convert.

    `file` chooses the weights. Shards that an index names are not listed, for only the index names them.
    Raises ConvertError as `choose_weights`.
    """
    if checkpoint.DESCRIPTION in names and not file:
        return sorted(
            n for n in names if PurePosixPath(n).name in OWN and str(PurePosixPath(n).parent) in (".", "clip", "complexity")
        )
    wanted = {*registry.config_files(), *TOKENIZER_CONFIGS, adapters.CONFIG, *adapters.FILES}
    if words := next((name for name in BESIDE if name in names), None):
        wanted.add(words)
    if adapters.FILES[0] in names:
        wanted.discard(adapters.FILES[1])
    alone = not file and any(name in names for name in adapters.FILES) and not any(name in names for name in usual_weights())
    if not alone:
        wanted.add(file or choose_weights([name for name in names if "/" not in name], where))
    return sorted(wanted & {*names})
