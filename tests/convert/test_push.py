"""`icar push` and the model cards of exports and checkpoints."""

import sys

import pytest

import icar_jax
from icar_jax import checkpoint, cli
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.hub import card
from icar_jax.convert.hub.push import push
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.models.flops import router_flops, text_flops, vision_flops
from tests.support import hubserver, parity_cases

pytest.importorskip("huggingface_hub")
NAME = "openai/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with hubserver.running(tmp_path / "cache", monkeypatch) as running:
        running.token = "secret"
        yield running


@pytest.fixture
def converted(hub, tmp_path):
    """A checkpoint with an exit, converted by name."""
    hub.add(NAME, parity_cases.write_source(parity_cases.load("hf_gelu"), tmp_path / "source"))
    convert(NAME, tmp_path / "model", Options(exits=(1,)))
    return tmp_path / "model"


def files_of(hub, name):
    repository = hub.repositories[name]
    return repository.commits[repository.commit_of("main")]


def test_an_export_goes_up_with_its_card_and_comes_down_again(hub, converted, tmp_path, capsys):
    made = export(converted, tmp_path / "out", "hf")
    assert card.FILE in made.files
    cli.main(["push", str(made.path), "me/tiny"])
    assert f"Pushed: {hub.address}/me/tiny/commit/" in capsys.readouterr().out
    sent = files_of(hub, "me/tiny")
    assert {name: data for name, data in sent.items() if name != card.FILE} == {
        file.name: file.read_bytes() for file in made.path.iterdir() if file.name != card.FILE
    }
    words, source = sent[card.FILE].decode(), checkpoint.describe(converted)["source"]
    assert "library_name: transformers" in words and f"base_model:\n- {NAME}\n" in words and "# me/tiny" in words
    assert f"[{NAME}](https://huggingface.co/{NAME}) at commit `{source['commit']}`" in words
    assert "this layout holds no early exits" in words and 'AutoModel.from_pretrained("me/tiny")' in words
    assert "exit after" not in words and "full depth" in words and card.PLACE not in words
    convert("me/tiny", tmp_path / "again")
    assert checkpoint.sha256(converted / "params.safetensors") != "" and icar_jax.load(tmp_path / "again").exits == (2,)


def test_the_costs_of_a_checkpoint_are_the_counted_ones(hub, converted):
    icar = icar_jax.load(converted)
    done = push(converted, "me/own")
    words = files_of(hub, "me/own")[card.FILE].decode()
    vision, text = icar.arch.vision, icar.arch.text
    early, full = vision_flops(vision, 1), vision_flops(vision)
    assert f"| an image, exit after 1 blocks | {early / 1e9:.4g} | {early / full:.1%} |" in words
    assert (
        f"| an image, full depth | {full / 1e9:.4g} | 100.0% |" in words
        and f"| a text | {text_flops(text) / 1e9:.4g} |" in words
    )
    assert set(done.files) >= {"README.md", "icar.json", "params.safetensors"} and not (converted / "README.md").exists()
    assert icar_jax.load("me/own").exits == icar.exits


def test_a_bundle_with_its_thresholds(hub, clip_folder, complexity_folder, tmp_path):
    make_bundle(clip_folder, complexity_folder, tmp_path / "bundle", thresholds=(0.3, 0.6))
    push(tmp_path / "bundle", "me/bundle", private=True)
    sent = files_of(hub, "me/bundle")
    words, model = sent[card.FILE].decode(), icar_jax.load("me/bundle")
    cost = router_flops(model.scorer.complexity.arch)
    assert f"the complexity score of an image | {cost / 1e9:.4g} |" in words and "is above 0.3, 0.6" in words
    assert model.exits == icar_jax.load(tmp_path / "bundle").exits and {"clip/icar.json", "complexity/icar.json"} < set(sent)
    (tmp_path / "bundle" / "README.md").write_text("# My own words")
    push(tmp_path / "bundle", "me/bundle")
    assert files_of(hub, "me/bundle")[card.FILE] == b"# My own words"


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(hub, converted, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    before = len(hub.seen)
    for folder, name, message in [
        (tmp_path / "photos", "me/x", "neither a checkpoint .* nor an export"), (tmp_path / "none", "me/x", "is no folder"),
        (converted, "me", "names no repository; expected owner/name"), (converted, "hf://me/x/file.pt", "names no repository"),
    ]:  # fmt: skip
        with pytest.raises(ConvertError, match=message):
            push(folder, name)
    assert len(hub.seen) == before
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ConvertError, match="cannot upload to me/x: the hub answered 401.*log in with `hf auth login`"):
        push(converted, "me/x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConvertError, match=r"pip install 'icar-jax\[hub\]'"):
        push(converted, "me/x")


@pytest.mark.parametrize("case, options, layout, part", [
    ("convnext_v2_linear", {}, "timm", "an image"), ("icc", {}, "icar", "the complexity score of an image"),
])  # fmt: skip
def test_cards_of_other_kinds(case, options, layout, part, tmp_path):
    convert(parity_cases.write_source(parity_cases.load(case), tmp_path / "s"), tmp_path / "m", Options(**options))
    words = (export(tmp_path / "m", tmp_path / "out", layout).path / card.FILE).read_text()
    assert f"\n| {part} | " in words
