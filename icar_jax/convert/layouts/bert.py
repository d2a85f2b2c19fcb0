"""Text encoders as Hugging Face and sentence-transformers store them: BERT, MiniLM, RoBERTa and XLM-R.

The tower has one type of token, so its embedding is part of the position embeddings. RoBERTa's positions begin after its
padding's id; the rows before are left out.
"""

from __future__ import annotations

import re

import numpy as np

from icar_jax.convert import rules
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts.base import Details, Layout, Options, Source, require_agreement, shape_of
from icar_jax.convert.layouts.hf import CONFIG
from icar_jax.convert.rules import QKV_BIAS, QKV_WEIGHT, Rule, Transform, dropped, linear, norm, prefixed, rule
from icar_jax.convert.settings import choose_heads
from icar_jax.models.text import TextArch

POOLING, SENTENCE = "1_Pooling/config.json", "sentence_bert_config.json"
_TYPES = ("bert", "roberta", "xlm-roberta")
_PREFIXES = ("bert.", "roberta.", "")
_BLOCK = [
    rule([f"attention.self.{part}.weight" for part in ("query", "key", "value")], "attn/qkv/kernel", QKV_WEIGHT),
    rule([f"attention.self.{part}.bias" for part in ("query", "key", "value")], "attn/qkv/bias", QKV_BIAS),
    *linear("attention.output.dense", "attn/out"),
    *norm("attention.output.LayerNorm", "ln1"),
    *linear("intermediate.dense", "mlp/fc1"),
    *linear("output.dense", "mlp/fc2"),
    *norm("output.LayerNorm", "ln2"),
]
# Heads for masked words and pairs of sentences, beside the encoder in a file of a pretraining model.
_LANGUAGE_HEADS = [
    f"{name}.{kind}"
    for name in ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder",
                 "cls.seq_relationship", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
    for kind in ("weight", "bias")
] + ["cls.predictions.bias", "lm_head.bias"]  # fmt: skip
POOLS = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}


def detect(source: Source) -> bool:
    """Whether the names are those of a BertModel or a RobertaModel."""
    return any(f"{prefix}embeddings.word_embeddings.weight" in source.tensors for prefix in _PREFIXES)


def arch(source: Source, options: Options) -> TextArch:
    """The architecture. Raises ConvertError where something is missing, contradictory or unsupported."""
    if CONFIG not in source.configs:
        raise ConvertError(f"{source.path}: there is no config.json, so heads and epsilon are unknown; copy the whole folder")
    stated = source.config(SENTENCE).positive("max_seq_length", int)
    where = f"{SENTENCE}: max_seq_length"
    return encoder_arch(source, source.config(CONFIG), _prefix(source), options, _pool(source, options), stated, where)


def encoder_arch(
    source: Source, config: Fields, prefix: str, options: Options, pool: str, stated: int | None, where: str
) -> TextArch:
    """The architecture of an encoder whose names begin with `prefix` and whose configuration is `config`.

    `stated` is the number of tokens of a text that `where` says. Raises ConvertError where something is missing, contradictory
    or unsupported.
    """
    kind = config.get("model_type", str, "")
    if kind not in _TYPES:
        raise ConvertError(
            f"{source.path}: {config.where} describes a {kind!r} model, whose encoder may compute otherwise under the same "
            f"names; supported are {', '.join(_TYPES)}"
        )
    refused = {
        "position_embedding_type": (config.get("position_embedding_type", str, "absolute"), "absolute"),
        "hidden_act": (config.get("hidden_act", str, "gelu"), "gelu"),
        "is_decoder": (config.get("is_decoder", bool, False), False),
        "add_cross_attention": (config.get("add_cross_attention", bool, False), False),
    }
    for name, (found, supported) in refused.items():
        if found != supported:
            raise ConvertError(f"{config.where}: {name} is {found!r}, and only {supported!r} is supported")
    vocabulary, width = shape_of(source, f"{prefix}embeddings.word_embeddings.weight", 2)
    positions = shape_of(source, f"{prefix}embeddings.position_embeddings.weight", 2)[0]
    mlp = shape_of(source, f"{prefix}encoder.layer.0.intermediate.dense.weight", 2)[0]
    depth = rules.count(source.tensors, f"{prefix}encoder.layer.{{}}")
    require_agreement(source, config.where, {
        "vocab_size": (config.get("vocab_size", int), vocabulary), "hidden_size": (config.get("hidden_size", int), width),
        "max_position_embeddings": (config.get("max_position_embeddings", int), positions),
        "num_hidden_layers": (config.get("num_hidden_layers", int), depth),
        "intermediate_size": (config.get("intermediate_size", int), mlp),
    })  # fmt: skip
    pad = config.get("pad_token_id", int, 0 if kind == "bert" else 1)
    if not 0 <= pad < vocabulary:
        raise ConvertError(f"{config.where}: pad_token_id {pad} lies outside the vocabulary of {vocabulary}")
    return TextArch(
        context_length=_context(source, options, positions - offset_of(config), stated, where), vocabulary=vocabulary,
        width=width, depth=depth, mlp_width=mlp, embed_dim=width,
        heads=choose_heads(
            options.heads[-1] if options.heads else 0, config.positive("num_attention_heads", int), width, depth, "text",
            config.where,
        ),
        norm_eps=config.positive("layer_norm_eps", float, 1e-12 if kind == "bert" else 1e-5), end_id=0, pool=pool,
        causal=False, post_norm=True, pad_id=pad, projection="none",
    )  # fmt: skip


def text_rules(source: Source, arch: TextArch | None) -> list[Rule]:
    """Rules for the names of a BertModel or a RobertaModel, alone or inside a pretraining model."""
    encoder = [
        *encoder_rules(offset_of(source.config(CONFIG)), arch.context_length if arch is not None else 0),
        *(dropped(f"pooler.dense.{kind}", "the head for pairs of sentences") for kind in ("weight", "bias")),
    ]
    return [*prefixed(encoder, _prefix(source)), *(dropped(name, "a head of pretraining") for name in _LANGUAGE_HEADS)]


def encoder_rules(offset: int, context: int, positions: int = 0, types: int = 1) -> list[Rule]:
    """Rules for the names of an encoder of `context` tokens whose positions begin at row `offset`.

    Backwards there are `positions` rows, those after the context zero (0: as few as there can be), and `types` types of tokens,
    all zero, for theirs is in the positions.
    """
    return [
        rule("embeddings.word_embeddings.weight", "text/embed"),
        rule(
            ["embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"], "text/pos",
            _positions(offset, context, positions, types),
        ),
        *norm("embeddings.LayerNorm", "text/ln_embed"),
        *prefixed(_BLOCK, "encoder.layer.{}.", "text/blocks/{}/"),
        dropped("embeddings.position_ids", "0, 1, 2, ..."),
        dropped("embeddings.token_type_ids", "zeros"),
    ]  # fmt: skip


def _positions(offset: int, context: int, positions: int, types: int) -> Transform:
    """Position embeddings of `context` tokens from row `offset` on, plus the embedding of the only type of token."""

    def forward(arrays: list[np.ndarray]) -> np.ndarray:
        return arrays[0][offset : offset + context] + arrays[1][:1]

    def backward(a: np.ndarray) -> list[np.ndarray]:
        after = max(positions - offset - len(a), 0)
        return [np.pad(a, ((offset, after), (0, 0))), np.zeros((types, a.shape[1]), a.dtype)]

    return Transform(forward, backward)


def _prefix(source: Source) -> str:
    return next((prefix for prefix in _PREFIXES if source.has(f"{prefix}embeddings.word_embeddings")), "")


def offset_of(config: Fields) -> int:
    """Number of position embeddings before the first token's."""
    return 0 if config.get("model_type", str, "") == "bert" else config.get("pad_token_id", int, 1) + 1


def _context(source: Source, options: Options, positions: int, stated: int | None, where: str) -> int:
    """Tokens of a text: the user's number, else the stated one, else that of the positions."""
    wanted = options.context_length or stated or positions
    if not 2 <= wanted <= positions:
        asked = f"--context-length={wanted}" if options.context_length else f"{where} {wanted}"
        raise ConvertError(f"{source.path}: {asked} must lie in 2 to {positions}, the positions of this encoder")
    return wanted


def _pool(source: Source, options: Options) -> str:
    """The pooling: the user's, else that of sentence-transformers. Raises ConvertError where it is unknown or unsupported."""
    strangers = sorted(
        entry.name for entry in source.folder.iterdir()
        if entry.is_dir() and re.fullmatch(r"\d+_\w+", entry.name) and not entry.name.endswith(("_Pooling", "_Normalize"))
    )  # fmt: skip
    if strangers:
        raise ConvertError(f"{source.path}: the modules {', '.join(strangers)} after the pooling are not supported")
    if options.text_pool:
        if options.text_pool not in POOLS.values():
            raise ConvertError(f"--text-pool={options.text_pool} must be one of {', '.join(POOLS.values())}")
        return options.text_pool
    pooling = source.config(POOLING)
    if not pooling:
        raise ConvertError(
            f"{source.path}: nothing beside the weights says how tokens become one embedding; pass --text-pool first (the "
            "[CLS] token) or --text-pool mean"
        )
    modes = sorted(name for name in pooling.content if name.startswith("pooling_mode_") and pooling.get(name, bool))
    if len(modes) != 1 or modes[0] not in POOLS:
        raise ConvertError(f"{pooling.where}: {', '.join(modes) or 'no mode'} is not supported; expected {' or '.join(POOLS)}")
    if pooling.get("include_prompt", bool, True) is False:
        raise ConvertError(f"{pooling.where}: include_prompt false is not supported")
    return POOLS[modes[0]]


def _details(source: Source, options: Options) -> Details:
    heads = [name for name in _LANGUAGE_HEADS if name in source.tensors]
    pooler = f"{_prefix(source)}pooler.dense.weight" in source.tensors
    notes = [f"left out: {what}" for what, there in (("the pooler", pooler), ("the heads of pretraining", heads)) if there]
    return Details(notes=notes)


LAYOUT = Layout(
    name="bert",
    kind="text",
    detect=detect,
    arch=arch,
    rules=text_rules,
    details=_details,
    options=frozenset({"tokenizer", "context_length", "text_pool"}),
    config_files=(CONFIG, POOLING, SENTENCE),
    precedence=2,
)
