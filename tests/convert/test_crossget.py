"""CrossGET's own checkpoints: embeddings of the official code after conversion, refusals, and layouts that cannot hold them."""

import jax
import numpy as np
import pytest

import icar_jax
from icar_jax.cli import main
from icar_jax.config import from_dict
from icar_jax.convert.convert import convert, in_memory
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts.base import Options
from icar_jax.models.clip import Clip, ClipArch
from tests.support import crossget


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return crossget.write(tmp_path_factory.mktemp("crossget") / "model.pth")


def options(**more):
    return Options(reduce="crossget", **{"image_r": crossget.IMAGE_R, "text_r": crossget.TEXT_R, **more})


def embeddings(loaded):
    graph = Clip.graph(from_dict(loaded.description["arch"], ClipArch, "arch"))
    case, params = crossget.case(), loaded.params
    images, tokens = case["images"].transpose(0, 2, 3, 1), case["tokens"].astype(np.int32)
    return jax.jit(lambda p: (graph.vision(p["vision"], images, (2,))[2], graph.text(p["text"], tokens)))(params)


def test_embeddings_are_those_of_the_official_code(file):
    case = crossget.case()
    loaded = in_memory(file, options())
    vision, text = (loaded.description["arch"][tower] for tower in ("vision", "text"))
    assert (vision["reduce"], vision["schedule"]) == ("crossget", (3, 3)) and text["schedule"] == (2, 2)
    assert loaded.description["preprocess"]["mean"][0] == pytest.approx(0.48145466)
    for found, name in zip(embeddings(loaded), ("image_embed", "text_embed")):
        np.testing.assert_allclose(found, case[name], atol=1e-5)
    plain = in_memory(file, Options(reduce="none"))
    for found, name in zip(embeddings(plain), ("image_embed_plain", "text_embed_plain")):
        np.testing.assert_allclose(found, case[name], atol=1e-5)


def test_its_plain_clip_is_read_as_any_other(tmp_path):
    tables = ("visual.transformer.cross_image", "transformer.cross_text")
    plain = crossget.write(tmp_path / "plain.pth", without=tables)
    loaded = in_memory(plain, Options(activation="quick_gelu", preprocess="openai", heads=(1, 1)))
    for found, name in zip(embeddings(loaded), ("image_embed_plain", "text_embed_plain")):
        np.testing.assert_allclose(found, crossget.case()[name], atol=1e-5)
    with pytest.raises(ConvertError, match="has no use for --image-r, --reduce, --text-r"):
        in_memory(plain, options())


def test_what_the_file_does_not_hold_is_asked_for(file):
    for given, message in (
        (Options(), "holds CrossGET's cross tokens; pass --reduce crossget, or --reduce none"),
        (Options(reduce="crossget"), "does not hold how many tokens each block merges; .* --image-r 16 --text-r 6, 0 for"),
        (options(text_r=-1), "does not hold how many tokens each block merges"),
        (Options(reduce="none", image_r=3), "--reduce none merges no tokens; leave out --image-r"),
        (options(activation="gelu"), "has no use for --activation"),
    ):
        with pytest.raises(ConvertError, match=message):
            in_memory(file, given)
    none = in_memory(file, options(image_r=0, text_r=0)).description["arch"]
    assert (none["vision"]["schedule"], none["vision"]["reduce"]) == ((), "crossget")


def test_the_command_writes_a_checkpoint_that_loads_and_that_no_other_layout_can_hold(file, tmp_path, capsys):
    main(["convert", str(file), str(tmp_path / "model"), "--reduce", "crossget", "--image-r", "3", "--text-r", "2"])
    assert "crossget layout" in capsys.readouterr().out
    model = icar_jax.load(tmp_path / "model", batch_size=2)
    assert model.arch.vision.tokens_after(2) == 12 and model.encode_image([np.zeros((32, 32, 3), np.uint8)]).shape == (1, 6)
    for layout in ("openai", "open_clip", "hf", "icar"):
        with pytest.raises(ConvertError, match=r"it reduces tokens by 'crossget' \(schedule \(3, 3\)\)"):
            export(tmp_path / "model", tmp_path / layout, layout)
    report = convert(file, tmp_path / "plain", Options(reduce="none"))
    assert report.notes[-1] == "the cross tokens were left out (--reduce none)"
