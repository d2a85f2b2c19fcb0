"""Models named on the hub: what is downloaded, from where a name is taken, and one line for everything that fails."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import icar_jax
from icar_jax import checkpoint
from icar_jax.config import ConfigError, hub_name
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.hub import download
from icar_jax.convert.source import open_source
from tests.support import hubserver, parity_cases
from tests.support.places import ROOT

pytest.importorskip("huggingface_hub")
NAME = "openai/tiny"
OTHERS = {"README.md": b"# tiny", "tf_model.h5": b"\x89HDF", "onnx/model.onnx": b"onnx", "pytorch_model.bin": b"a pickle"}

OTHERS_OF_ADAPTER = {"README.md": b"# lora", "optimizer.pt": b"x"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hubserver.running(tmp_path / "cache", monkeypatch) as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "hf"
    return parity_cases.write_source(parity_cases.load("hf_gelu"), folder)


def refusal(name, **options):
    with pytest.raises(ConvertError) as error:
        open_source(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text, expected", [
    ("openai/clip-vit-base-patch32", ("openai/clip-vit-base-patch32", "", "", False)),
    ("timm/vit_base_patch16_clip_224.openai", ("timm/vit_base_patch16_clip_224.openai", "", "", False)),
    ("hf-hub:laion/CLIP-ViT-B-32@v1", ("laion/CLIP-ViT-B-32", "v1", "", True)),
    ("hf_hub:timm/x", ("timm/x", "", "", True)),
    ("hf://a/b@refs/pr/7/sub/m.pt", ("a/b", "refs/pr/7", "sub/m.pt", True)),
    ("hf://a/b/m.pt", ("a/b", "", "m.pt", True)),
])  # fmt: skip
def test_names(text, expected):
    name = hub_name(text)
    assert (name.repository, name.revision, name.inside, name.explicit) == expected


def test_paths_are_no_names(tmp_path):
    for text in ("model", "./a/b", "/a/b", "a/b/c", "~/a", "s3://a/b", tmp_path / "a" / "b", "../b"):
        assert hub_name(text) is None
    with pytest.raises(ConfigError, match="names no repository.*hf://owner/name@revision"):
        hub_name("hf://onlyone")


def test_a_name_converts_as_the_folder_does(hub, source, tmp_path):
    commit = hub.add(NAME, source, OTHERS)
    report = convert(NAME, tmp_path / "named")
    convert(source, tmp_path / "local")
    assert checkpoint.sha256(tmp_path / "named" / checkpoint.WEIGHTS) == checkpoint.sha256(
        tmp_path / "local" / checkpoint.WEIGHTS
    )
    assert report.description["source"] == checkpoint.describe(tmp_path / "local")["source"] | {
        "repository": NAME, "commit": commit,
    }  # fmt: skip
    assert hub.downloaded() == {file.name for file in source.iterdir()}
    before = len(hub.seen)
    for same in (f"hf://{NAME}", f"hf-hub:{NAME}", f"hf://{NAME}@{commit}"):
        assert open_source(same).tensors.keys() == open_source(source).tensors.keys()
    assert not [path for method, path in hub.seen[before:] if method == "GET" and "/resolve/" in path]  # all is cached


def test_weights_are_named_wherever_they_are_read(hub, source, tmp_path):
    hub.add(NAME, source)
    clip = icar_jax.Clip.from_pretrained(NAME)
    assert clip.arch == icar_jax.Clip.from_pretrained(source).arch
    image = np.zeros((9, 9, 3), np.uint8)
    np.testing.assert_array_equal(icar_jax.load(NAME).encode_image([image]), icar_jax.load(source).encode_image([image]))
    convert(source, tmp_path / "own")
    commit = hub.add("me/own", tmp_path / "own", {"figure.png": b"png"})
    assert icar_jax.load("me/own").path.name == commit and "figure.png" not in hub.downloaded()


def test_a_path_that_exists_wins_and_a_folder_is_no_owner(hub, source, tmp_path):
    hub.add(NAME, source)
    (tmp_path / "openai" / "tiny").mkdir(parents=True)
    assert "holds no weights" in refusal(NAME)
    (tmp_path / "openai" / "tiny").rmdir()
    assert "openai/tiny does not exist" in refusal(NAME) and "weights/a.pt does not exist" in refusal("weights/a.pt")
    assert not hub.seen
    assert open_source(f"hf://{NAME}").layout == "hf_clip"


def test_revisions_files_and_folders_inside(hub, source):
    hub.add(NAME, source)
    weights = {name: np.zeros_like(array) for name, array in load_file(source / "model.safetensors").items()}
    save_file(weights, source.parent / "zero.safetensors")
    zero = (source.parent / "zero.safetensors").read_bytes()
    config = (source / "config.json").read_bytes()
    tagged = hub.repositories[NAME].add(
        {"sub/config.json": config, "sub/zero.safetensors": zero, "a.pt": b"", "b.pt": b""}, "v2"
    )
    for name in (f"hf://{NAME}@v2/sub", f"hf://{NAME}@v2/sub/zero.safetensors"):
        opened = open_source(name)
        assert not np.any(opened.tensors["logit_scale"].load()) and download.origin_of(opened.weights.path)["commit"] == tagged
    assert "several files of weights, name one of them: a.pt, b.pt" in refusal(f"{NAME}@v2")
    assert "neither a file nor a folder 'c.pt'; it holds a.pt, b.pt, sub" in refusal(f"hf://{NAME}@v2/c.pt")
    assert f"{NAME} has no revision 'v9'" in refusal(f"{NAME}@v9")


def test_shards_are_followed(hub, source, tmp_path):
    weights = load_file(source / "model.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(weights)
    parts = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
    for shard, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / shard)
    index = {"weight_map": {name: shard for shard, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    hub.add(NAME, folder, OTHERS | {"m-3.safetensors": b""})
    assert open_source(NAME).tensors.keys() == weights.keys()
    assert hub.downloaded() == {*parts, "config.json", "model.safetensors.index.json"}


def test_a_broken_download_goes_on_where_it_stopped(hub, source, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.add(NAME, source)
    hub.cut_after = 8 * 1024
    try:  # newer versions of huggingface_hub resume within the call
        open_source(NAME)
    except ConvertError as error:
        assert "try again, which goes on where it stopped" in str(error)
    opened = open_source(NAME)
    assert opened.weights.path.read_bytes() == (source / "model.safetensors").read_bytes()
    assert hub.ranges == [f"bytes={8 * 1024}-"]


def test_offline_the_cache_is_used(hub, source, monkeypatch, caplog):
    import huggingface_hub.constants

    commit = hub.add(NAME, source)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it" in refusal(NAME) and "does not hold it" in refusal(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    open_source(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert download.origin_of(open_source(NAME).weights.path) == {"repository": NAME, "commit": commit}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.fails_with = 503
    assert open_source(NAME).layout == "hf_clip" and commit in caplog.text
    assert "the hub answered 503" in refusal("openai/other")


def test_an_incomplete_cache_offline_says_so(hub, source, monkeypatch):
    import huggingface_hub.constants

    hub.add(NAME, source)
    huggingface_hub.hf_hub_download(NAME, "config.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "holds only a part of it: the cache of openai/tiny holds no weights" in refusal(NAME)


def test_a_server_that_is_gone(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hubserver.running(tmp_path / "cache", monkeypatch):
        pass
    assert "the hub cannot be reached" in refusal(NAME)


def test_gated_and_unknown_repositories(hub, source, monkeypatch):
    hub.add(NAME, source)
    hub.repositories[NAME].denied, hub.token = "GatedRepo", "secret"
    assert f"openai/tiny is gated: accept its terms at {hub.address}/openai/tiny, and log in" in refusal(NAME)
    assert "no repository on the Hugging Face hub, and no file or folder here has this name" in refusal("openai/none")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert open_source(NAME).layout == "hf_clip"


def test_a_full_disk_and_a_missing_extra(hub, source, monkeypatch):
    import huggingface_hub.constants

    hub.add(NAME, source)

    def failing(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return refusal(NAME)

    full = "No space left on device"
    for error in (OSError(errno.ENOSPC, full), RuntimeError(f"Data processing error: File I/O error: {full} (os error 28)")):
        assert "no space left on the disk of" in (text := failing(error)) and "HF_HOME" in text
    assert "cannot download openai/tiny: CAS service error; try again" in failing(RuntimeError("CAS service error"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refusal(NAME).startswith("openai/tiny is neither a file nor a folder here; a name on the Hugging Face hub needs")
    assert "pip install 'icar-jax[hub]'" in refusal(f"hf://{NAME}")


def test_an_adapter_by_name_says_its_base(hub, source):
    hub.add(NAME, source)
    about = {"peft_type": "LORA", "base_model_name_or_path": NAME}
    hub.repositories["me/lora"] = hubserver.Repository()
    hub.repositories["me/lora"].add({"adapter_config.json": json.dumps(about).encode(), "adapter_model.safetensors": b"x"})
    assert "is a LoRA adapter alone; pass --base WEIGHTS" in refusal("me/lora") and f"(it says {NAME})" in refusal("me/lora")


def test_an_adapter_and_its_base_by_name(hub, source, tmp_path):
    base = hub.add(NAME, source)
    key, rng = "vision_model.encoder.layers.0.self_attn.q_proj", np.random.default_rng(0)
    shape = load_file(source / "model.safetensors")[f"{key}.weight"].shape
    factors = {"A": rng.standard_normal((2, shape[1])), "B": rng.standard_normal((shape[0], 2))}
    (tmp_path / "lora").mkdir()
    save_file({f"base_model.model.{key}.lora_{part}.weight": array.astype(np.float32) for part, array in factors.items()},
              tmp_path / "lora" / "adapter_model.safetensors")  # fmt: skip
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    adapter = hub.add("me/lora", tmp_path / "lora", {"adapter_config.json": json.dumps(about).encode(), **OTHERS_OF_ADAPTER})
    report = convert("me/lora", tmp_path / "out", Options(base=NAME))
    said = report.description["source"]
    assert (said["commit"], said["adapter"]["commit"], said["adapter"]["repository"]) == (base, adapter, "me/lora")
    assert "optimizer.pt" not in hub.downloaded() and not np.array_equal(
        checkpoint.read(tmp_path / "out", "clip").params["vision"]["blocks"]["0"]["attn"]["qkv"]["kernel"],
        icar_jax.Clip.from_pretrained(source).split()[1]["vision"]["blocks"]["0"]["attn"]["qkv"]["kernel"],
    )


def test_a_cache_of_the_hub_is_refused_with_the_name(hub, source, tmp_path):
    commit = hub.add(NAME, source)
    open_source(NAME)
    for folder in (tmp_path / "cache", tmp_path / "cache" / "models--openai--tiny"):
        text = refusal(folder)
        assert "is a cache of the Hugging Face hub" in text and NAME in text and f"snapshots/{commit}" in text


def test_safetensors_come_before_pickles(tmp_path):
    from icar_jax.convert.folder import choose_weights

    assert choose_weights(["pytorch_model.bin", "open_clip_model.safetensors"], "X") == "open_clip_model.safetensors"
    assert choose_weights(["a.pt", "a.safetensors", "training_args.bin", "optimizer.pt"], "X") == "a.safetensors"
    with pytest.raises(ConvertError, match="X holds several files of weights, name one of them: pytorch_model.bin, b.safe"):
        choose_weights(["pytorch_model.bin", "b.safetensors"], "X")


@pytest.mark.check
def test_the_command_takes_names(hub, source, tmp_path):
    """With the settings of huggingface_hub in the environment, in a process of its own."""
    commit = hub.add(NAME, source)
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "PATH": os.environ["PATH"],
    }
    words = [sys.executable, "-m", "icar_jax.cli", "convert", f"hf://{NAME}", "out"]
    run = lambda **more: subprocess.run(words, env=environment | more, capture_output=True, text=True, cwd=tmp_path)
    done = run()
    assert done.returncode == 0, done.stderr
    assert checkpoint.describe(tmp_path / "out")["source"]["commit"] == commit
    assert run(HF_HUB_OFFLINE="1").returncode == 0
    lost = run(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert lost.returncode == 2 and lost.stderr.startswith("error: cannot download openai/tiny: HF_HUB_OFFLINE is set")
    assert len(lost.stderr.strip().splitlines()) == 1


def test_training_starts_from_names(hub, source):
    from icar_jax.config import ConfigError, ExperimentConfig, TrainConfig, validate
    from icar_jax.training import start

    commit = hub.add(NAME, source)
    with pytest.raises(ConfigError, match="config.train.init_image=openai/none.*no repository on the Hugging Face hub"):
        start.start_of(ExperimentConfig(train=TrainConfig(init_image="openai/none", init_text=NAME)))
    with pytest.raises(ConfigError, match="config.train.init_image: hf://x names no repository"):
        validate(ExperimentConfig(train=TrainConfig(init_image="hf://x", init_text=NAME)))
    with pytest.raises(ConfigError, match="init_text.*has no tokenizer"):  # both were read
        start.start_of(ExperimentConfig(train=TrainConfig(init_image=f"hf://{NAME}@{commit}", init_text=NAME)))
    convert(source, "own")
    hub.add("me/own", Path("own"))
    assert start.find("me/own", "clip").name == hub.repositories["me/own"].revisions["main"]
