"""Sources of vision towers from parity cases, converted or refused."""

import dataclasses

import pytest

from icar_jax import checkpoint
from icar_jax.config import from_dict
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.fields import ConvertError
from icar_jax.models.vision import VisionArch
from tests.support import parity_cases


def source_of(name, folder, weights=None, **files):
    """The case's source; `files` change the JSON files, by their names without suffix."""
    case = parity_cases.load(name)
    changed = {file: {**content, **files.get(file.removesuffix(".json"), {})} for file, content in case.files.items()}
    case = dataclasses.replace(case, files=changed, weights=case.weights if weights is None else weights)
    return case, parity_cases.write_source(case, folder / "source")


def converted(name, folder, **options):
    _, source = source_of(name, folder)
    report = convert(source, folder / "model", Options(**options))
    return report, checkpoint.read(folder / "model", "vision").params


def arch_of(report):
    return from_dict(report.description["arch"], VisionArch, "arch")


def refusal(name, folder, weights=None, options=Options(), **files):
    _, source = source_of(name, folder, weights, **files)
    with pytest.raises(ConvertError) as error:
        convert(source, folder / "no", options)
    assert not (folder / "no").exists()
    return str(error.value)
