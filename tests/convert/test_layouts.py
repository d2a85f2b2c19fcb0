"""The contract of a weight layout: one object adds one, and each layout detects its own sources and no other's."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from icar_jax import checkpoint, pytree
from icar_jax.convert import convert as convert_module
from icar_jax.convert import export as export_module
from icar_jax.convert import source as source_module
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts import registry
from icar_jax.convert.layouts.base import KINDS, Details, Export, ExportFiles, Layout, shape_of
from icar_jax.convert.layouts.clip_export import weights_without_exits
from icar_jax.convert.layouts.open_clip import open_clip_rules
from icar_jax.convert.parity.reference import LIBRARIES, write_reference
from icar_jax.convert.rules import Rule, count
from icar_jax.convert.source import open_source
from icar_jax.data.images import Preprocess
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch
from tests.support import parity_cases

# --- a new layout: OpenCLIP's towers under other names, with its own files -------------------------------------------------

RENAMED = (("visual.", "image."), ("transformer.resblocks.", "layers."), (".mlp.c_fc.", ".up."), ("logit_scale", "scale"))


def other_name(name):
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name if name.startswith(("image.", "scale")) else f"words.{name}"


def rules(source, arch):
    return [Rule(tuple(map(other_name, r.sources)), r.target, r.transform, r.why) for r in open_clip_rules()]


def arch(source, options):
    width, _, patch, _ = shape_of(source, "image.conv1.weight", 4)
    mlp, _ = shape_of(source, "image.layers.0.up.weight", 2)
    vocabulary, words = shape_of(source, "words.token_embedding.weight", 2)
    embed_dim = shape_of(source, "image.proj", 2)[1]
    sizes = source.config("other.json")
    heads, context = sizes.positive("heads", int), shape_of(source, "words.positional_embedding", 2)[0]
    depth, text_depth = count(source.tensors, "image.layers.{}"), count(source.tensors, "words.layers.{}")
    vision = VisionArch(sizes.positive("pixels", int), patch, width, depth, heads, mlp, embed_dim)
    text_mlp = shape_of(source, "words.layers.0.up.weight", 2)[0]
    text_heads = sizes.positive("text_heads", int)
    text = TextArch(
        context, vocabulary, words, text_depth, text_heads, text_mlp, embed_dim, end_id=vocabulary - 1, pool="argmax"
    )
    return ClipArch(vision, text)


def export_files(source):
    leaves, notes = weights_without_exits(source, rules(None, None))
    v, t = source.arch.vision, source.arch.text
    sizes = {"heads": v.heads, "text_heads": t.heads, "pixels": v.image_size}
    return ExportFiles({"other.safetensors": leaves, "other.json": sizes}, notes)


OTHER = Layout(
    name="other",
    kind="clip",
    detect=lambda source: source.has("image.") and "other.json" in source.configs,
    arch=arch,
    rules=rules,
    preprocess=lambda source, options, arch: Preprocess(arch.vision.image_size, "squash", "bilinear"),
    details=lambda source, options: Details({"made_by": "another library"}, {"release": 3}, ["a warning"]),
    tokenizer=lambda source, path, text: (None, "the layout has no tokenizer"),
    export=Export("other", export_files),
    options=frozenset({"exits", "pool"}),
    weight_files=("other.safetensors",),
    config_files=("other.json",),
)


@pytest.fixture
def other(tmp_path, monkeypatch):
    """(the folder of a source in the new layout, the same model in OpenCLIP's), with the layout registered."""
    case = parity_cases.load("open_clip_gelu")
    plain = parity_cases.write_source(case, tmp_path / "plain")
    model = case.files["open_clip_config.json"]["model_cfg"]
    sizes = {
        "heads": model["vision_cfg"]["width"] // model["vision_cfg"]["head_width"],
        "text_heads": model["text_cfg"]["heads"],
        "pixels": model["vision_cfg"]["image_size"],
    }
    weights = {other_name(name): array for name, array in case.weights.items()}
    renamed = dataclasses.replace(case, weights=weights, weights_file="other.safetensors", files={"other.json": sizes})
    folder = parity_cases.write_source(renamed, tmp_path / "other")
    (folder / "unrelated.safetensors").write_bytes(b"")  # the layout names its file, so another one does not confuse
    with pytest.raises(ConvertError, match="holds several files of weights"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ConvertError, match="unknown layout"):
        convert(folder / "other.safetensors", tmp_path / "out")
    monkeypatch.setattr(registry, "LAYOUTS", (*registry.LAYOUTS, OTHER))
    return folder, plain


def params_of(folder):
    return pytree.flatten(checkpoint.read(folder, "clip").params)


def test_one_object_converts_and_exports_a_new_layout(other, tmp_path):
    source, plain = other
    report = convert(source, tmp_path / "out")
    convert(plain, tmp_path / "expected")
    assert report.layout == report.description["source"]["layout"] == "other"
    found, expected = params_of(tmp_path / "out"), params_of(tmp_path / "expected")
    assert list(found) == list(expected)
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path])
    assert report.notes == ["the layout has no tokenizer", "a warning"]
    assert (report.description["source"]["made_by"], report.description["release"]) == ("another library", 3)
    assert report.description["preprocess"]["interpolation"] == "bilinear"

    written = export(tmp_path / "out", tmp_path / "back", "other")
    assert written.files == ["README.md", "other.json", "other.safetensors"]
    again = convert(written.path, tmp_path / "again")
    assert again.description["arch"] == report.description["arch"]
    assert again.description["hashes"] == report.description["hashes"]
    assert json.loads((written.path / "other.json").read_text()) == json.loads((source / "other.json").read_text())


def test_what_every_layout_gets_holds_for_a_new_one(other, tmp_path):
    source, _ = other
    report = convert(source, tmp_path / "out", Options(exits=(1,), pool="mean"))
    assert report.description["arch"]["vision"]["exits"] == [1]
    assert "those after 1 blocks were left out" in export(tmp_path / "out", tmp_path / "back", "other").notes[0]
    with pytest.raises(ConvertError, match=r"\(other layout\) has no use for --activation; leave it out"):
        convert(source, tmp_path / "no", Options(activation="gelu"))
    case = dataclasses.replace(parity_cases.load("open_clip_gelu"), weights_file="other.safetensors", files={})
    weights = {other_name(name): array for name, array in case.weights.items()}
    weights["image.stem.weight"] = weights.pop("image.conv1.weight")
    parity_cases.write_source(dataclasses.replace(case, weights=weights), source)
    with pytest.raises(ConvertError, match=r"(?s)lacks image.conv1.weight.*unknown in the source: image.stem.weight"):
        convert(source, tmp_path / "no")
    with pytest.raises(ConvertError, match="--to=tf must be one of openai, open_clip, hf, icar, other, timm, stablehlo"):
        export(tmp_path / "out", tmp_path / "no", "tf")
    with pytest.raises(ConvertError, match="has the layout 'other'; references exist for openai"):
        write_reference(source, tmp_path / "r.npz")
    assert not (tmp_path / "no").exists()


# --- the layouts that are here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", parity_cases.names())
def test_a_layout_detects_its_own_sources_and_no_others(name, tmp_path):
    case = parity_cases.load(name)
    source = open_source(parity_cases.write_source(case, tmp_path / "source"))
    assert [layout.name for layout in registry.LAYOUTS if layout.detect(source)] == [source.layout] == [case.layout]


def test_every_layout_has_a_golden_case_and_what_it_needs():
    known = set(registry.names()) - {"crossget"}  # its case is of the official code, in tests/fixtures/reduction
    assert {parity_cases.load(name).layout for name in parity_cases.names()} == known == set(LIBRARIES)
    assert len(registry.names()) == len(registry.LAYOUTS)
    for layout in registry.LAYOUTS:
        assert layout.kind in KINDS and registry.named(layout.name) is layout
        assert layout.options <= {field.name for field in dataclasses.fields(Options)}
    assert list(registry.exports()) == ["openai", "open_clip", "hf", "icar", "timm"]


def test_the_order_of_detection():
    """Where names of several layouts occur in one file, the more special one is taken."""
    assert [layout.name for layout in registry.by_precedence()] == [
        "hf_vision", "hf_text", "crossget", "hf_clip", "siglip", "hf_vit", "hf_dinov2", "bert",
        "open_clip_encoder", "icar", "openai", "open_clip",
        "timm_vit", "icc", "ic9600", "timm",
    ]  # fmt: skip


@pytest.mark.parametrize("module", [convert_module, export_module, source_module])
def test_no_layout_is_named_outside_its_file(module):
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert not [name for name in registry.names() if f'"{name}"' in text]
