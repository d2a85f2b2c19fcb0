"""BERT and its kin against transformers: towers, padding, tokenizers and what is refused."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from icar_jax.checkpoint import read
from icar_jax.config import from_dict
from icar_jax.convert.convert import convert
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts.base import Options
from icar_jax.convert.parity.reference import declare_torchvision_operators
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.text import TextArch, TextTower

torch = pytest.importorskip("torch")
if "torchvision" not in sys.modules:
    declare_torchvision_operators(torch)  # before transformers, which imports torchvision
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SMALL = {"vocab_size": 90, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
         "max_position_embeddings": 20}  # fmt: skip
MODELS = {
    "bert": ("BertConfig", "BertModel"), "roberta": ("RobertaConfig", "RobertaModel"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"), "masked": ("BertConfig", "BertForMaskedLM"),
    "roberta-masked": ("RobertaConfig", "RobertaForMaskedLM"),
}  # fmt: skip


def make(folder, kind):
    config, model = (getattr(transformers, name) for name in MODELS[kind])
    torch.manual_seed(0)
    made = model(config(**SMALL)).eval()
    for name, value in made.named_parameters():  # fresh norms and biases are ones and zeros
        if "LayerNorm" in name or name.endswith("bias"):
            value.data += 0.1 * torch.randn_like(value)
    made.save_pretrained(folder)
    return made


def tower(folder):
    loaded = read(folder, "text")
    arch = from_dict(loaded.description["arch"], TextArch, "arch")
    return arch, TextTower.graph(arch), loaded.params["text"]


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_tower_equals_transformers(kind, pool, tmp_path):
    model = make(tmp_path / "source", kind)
    report = convert(tmp_path / "source", tmp_path / "out", Options(text_pool=pool))
    arch, graph, params = tower(tmp_path / "out")
    offset = 0 if kind in ("bert", "masked") else 2
    assert arch.context_length == 20 - offset and arch.pad_id == (0 if offset == 0 else 1)
    assert ("the heads of pretraining" in " ".join(report.notes)) == kind.endswith("masked")
    rng = np.random.default_rng(0)
    lengths = [1, 5, 12, arch.context_length]
    ids = np.full((4, arch.context_length), arch.pad_id, np.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.integers(3, 90, length)
    mask = torch.tensor(np.arange(ids.shape[1])[None] < np.array(lengths)[:, None]).long()
    with torch.no_grad():
        base = getattr(model, model.base_model_prefix, model)
        hidden = base(input_ids=torch.tensor(ids), attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        expected = (mean if pool == "mean" else hidden[:, 0]).numpy()
    np.testing.assert_allclose(graph(params, ids.astype(np.int32)), expected, atol=1e-5)
    np.testing.assert_allclose(graph(params, ids[:3, :12].astype(np.int32)), expected[:3], atol=1e-5)


def test_fewer_tokens_keep_the_first_positions(tmp_path):
    make(tmp_path / "source", "roberta")
    convert(tmp_path / "source", tmp_path / "long", Options(text_pool="mean"))
    convert(tmp_path / "source", tmp_path / "short", Options(text_pool="mean", context_length=7))
    (_, _, long), (arch, _, short) = tower(tmp_path / "long"), tower(tmp_path / "short")
    assert arch.context_length == 7
    np.testing.assert_array_equal(short["pos"], long["pos"][:7])


@pytest.mark.parametrize("change, options, message", [
    ({"position_embedding_type": "relative_key"}, {}, "position_embedding_type is 'relative_key'"),
    ({"hidden_act": "relu"}, {}, "hidden_act is 'relu'"), ({"is_decoder": True}, {}, "is_decoder is True"),
    ({"model_type": "camembert"}, {}, "describes a 'camembert' model"), ({"hidden_size": 25}, {}, "hidden_size"),
    ({}, {"text_pool": ""}, "--text-pool first"), ({}, {"text_pool": "max"}, "--text-pool=max"),
    ({}, {"context_length": 21}, "--context-length=21 must lie in 2 to 20"), ({}, {"exits": (1,)}, "no use for --exits"),
])  # fmt: skip
def test_what_the_tower_would_compute_otherwise_is_refused(change, options, message, tmp_path):
    make(tmp_path / "source", "bert")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConvertError, match=message):
        convert(tmp_path / "source", tmp_path / "out", Options(**{"text_pool": "mean", **options}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooling, message", [
    ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens is not supported"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token, pooling_mode_mean_tokens is not"),
    ({}, "no mode is not supported"), ("2_Dense", "the modules 2_Dense"),
])  # fmt: skip
def test_other_poolings_of_sentence_transformers_are_refused(pooling, message, tmp_path):
    make(tmp_path, "bert")
    (tmp_path / "1_Pooling").mkdir()
    content = {"word_embedding_dimension": 24, **(pooling if isinstance(pooling, dict) else {"pooling_mode_mean_tokens": True})}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(content))
    if isinstance(pooling, str):
        (tmp_path / pooling).mkdir()
    with pytest.raises(ConvertError, match=message):
        convert(tmp_path, tmp_path / "out")


TOWERS = os.environ.get("ICAR_JAX_TOWERS", "")
TEXTS = ["A dog runs on the beach .", "Zwei Hunde, café & l’été!", "", "two children " * 40, "un[SEP]known 漢字"]


@pytest.mark.skipif(not TOWERS, reason="ICAR_JAX_TOWERS names no folder of pretrained towers")
def test_minilm_as_sentence_transformers_runs_it(tmp_path):
    source = Path(TOWERS) / "minilm_l6"
    convert(source, tmp_path / "out", Options(context_length=64))
    arch, graph, params = tower(tmp_path / "out")
    assert arch.pool == "mean" and arch.context_length == 64
    tokenizer = Tokenizer.from_json((tmp_path / "out" / "tokenizer.json").read_text())
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    batch = theirs(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    ids = tokenizer(TEXTS, 64)
    length = batch["input_ids"].shape[1]
    np.testing.assert_array_equal(ids[:, :length], batch["input_ids"].numpy())
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    for given in (ids, ids[:, :length]):
        found = np.asarray(graph(params, given))
        np.testing.assert_allclose(found / np.linalg.norm(found, axis=1, keepdims=True), expected, atol=1e-5)
    one = np.asarray(graph(params, tokenizer(TEXTS[:1], 64)))
    np.testing.assert_allclose(one / np.linalg.norm(one), expected[:1], atol=1e-5)
