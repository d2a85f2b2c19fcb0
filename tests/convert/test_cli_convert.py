"""`icar convert`, `export` and `reference` as they are typed: flags, what is printed where, exit status."""

import json

import numpy as np
import pytest

from icar_jax import checkpoint, cli
from icar_jax.convert import convert as module
from tests.support import parity_cases


def source_of(name, folder):
    return parity_cases.write_source(parity_cases.load(name), folder)


def icar(*words):
    cli.main([str(word) for word in words])


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        icar(*words)
    return stopped.value.code, capsys.readouterr().err


def test_convert_with_every_flag_then_export(tmp_path, capsys):
    source = source_of("open_clip_gelu", tmp_path / "a source")
    (tmp_path / "a source" / "open_clip_config.json").unlink()
    file = next((tmp_path / "a source").glob("open_clip*"))
    (tmp_path / "p.json").write_text(json.dumps({"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3,
                                                 "std": [0.25] * 3}))  # fmt: skip
    flags = ["--activation", "gelu", "--preprocess", tmp_path / "p.json", "--exits", 1, "--pool", "mean"]
    icar("convert", file, tmp_path / "o u t", *flags, "--heads", 2, 2, "--image-size", 32)
    out = capsys.readouterr()
    assert "Source: open_clip layout" in out.out and f"Checkpoint: {tmp_path / 'o u t'}" in out.out
    assert "warning: no tokenizer was found" in out.err
    description = checkpoint.describe(tmp_path / "o u t")
    vision = description["arch"]["vision"]
    assert (vision["exits"], vision["pool"], vision["heads"], vision["image_size"]) == ([1], "mean", 2, 32)
    assert description["preprocess"]["std"] == [0.25] * 3
    icar("export", tmp_path / "o u t", "--to", "open_clip")
    out = capsys.readouterr()
    assert "open_clip_model.safetensors" in out.out and "were left out" in out.err
    assert (tmp_path / "o u t-open_clip" / "open_clip_config.json").is_file()
    assert source.exists()


def test_refusals_end_with_status_2_and_one_message(tmp_path, capsys):
    source = source_of("hf_gelu", tmp_path / "s")
    code, text = refused(capsys, "convert", source, tmp_path / "out", "--activation", "relu")
    assert code == 2 and text.startswith("error: --activation=relu") and "Traceback" not in text
    code, text = refused(capsys, "convert", tmp_path / "none", tmp_path / "out")
    assert code == 2 and "does not exist" in text
    code, text = refused(capsys, "export", source, "--to", "hf")
    assert code == 2 and "no icar.json" in text
    assert not (tmp_path / "out").exists()


def test_verify_prints_the_differences_and_stops_a_wrong_conversion(tmp_path, capsys):
    case = parity_cases.load("hf_gelu")
    source = source_of("hf_gelu", tmp_path / "s")
    meta = {"layout": "hf_clip", "source": {}, "sha256": checkpoint.sha256(source / "model.safetensors")}
    arrays = {"images": case.images, "tokens": case.inputs["tokens"].astype(np.int32)}
    arrays |= {name: case.outputs[name] for name in ("image_embeds", "text_embeds")}
    np.savez(tmp_path / "r.npz", **arrays, meta=np.array(json.dumps(meta)))
    icar("convert", source, tmp_path / "out", "--verify", tmp_path / "r.npz")
    out = capsys.readouterr().out
    assert "image" in out and "text" in out and "ok" in out
    arrays["text_embeds"] = np.roll(arrays["text_embeds"], 1, axis=1)
    np.savez(tmp_path / "r.npz", **arrays, meta=np.array(json.dumps(meta)))
    code, text = refused(capsys, "convert", source, tmp_path / "other", "--verify", tmp_path / "r.npz")
    assert code == 2 and "text" in text and not (tmp_path / "other").exists()


def test_an_interrupt_says_that_nothing_was_written(tmp_path, capsys, monkeypatch):
    source = source_of("hf_gelu", tmp_path / "s")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.checkpoint, "write", interrupted)
    code, text = refused(capsys, "convert", source, tmp_path / "out")
    assert code == 130 and "nothing was written" in text and not (tmp_path / "out").exists()
