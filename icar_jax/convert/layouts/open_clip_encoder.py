"""OpenCLIP's CLIPs with a text encoder of transformers: XLM-RoBERTa, RoBERTa or BERT below `text.transformer.`.

Their config names the encoder (`text_cfg.hf_model_name`); the few settings that its shapes do not show are known of the names
that OpenCLIP's models use, and come from the encoder's own config.json for others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from icar_jax.convert.fields import ConvertError, Fields, read_json
from icar_jax.convert.layouts import bert, open_clip
from icar_jax.convert.layouts.base import Details, Export, ExportFiles, ExportSource, Layout, Options, Source, shape_of
from icar_jax.convert.layouts.clip_export import refuse, several_blocks
from icar_jax.convert.layouts.hf import CONFIG as ENCODER_CONFIG
from icar_jax.convert.layouts.open_clip_export import CONFIG, export_files
from icar_jax.convert.rules import TRANSPOSE, Rule, dropped, linear, prefixed, rule
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch

_PREFIX = "text.transformer."
_CONTEXT = 77  # OpenCLIP's number of tokens where its config names none
_ROBERTA = {"model_type": "roberta", "pad_token_id": 1, "layer_norm_eps": 1e-5, "max_position_embeddings": 514}
_XLM = {**_ROBERTA, "model_type": "xlm-roberta", "vocab_size": 250002}
_BERT = {"model_type": "bert", "pad_token_id": 0, "layer_norm_eps": 1e-12, "max_position_embeddings": 512}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
ENCODERS: dict[str, dict[str, Any]] = {  # configurations by the last part of the name
    "xlm-roberta-base": _XLM | _BASE, "xlm-roberta-large": _XLM | _LARGE,
    "roberta-base": _ROBERTA | _BASE, "roberta-large": _ROBERTA | _LARGE,
    "bert-base-uncased": _BERT | _BASE, "bert-base-cased": _BERT | _BASE, "bert-base-multilingual-cased": _BERT | _BASE,
    "bert-large-uncased": _BERT | _LARGE,
}  # fmt: skip
# hf_pooler_type: (pool, whether BERT's pooler follows)
_POOLERS = {
    "mean_pooler": ("mean", False), "cls_pooler": ("first", True), "cls_last_hidden_state_pooler": ("first", False),
}  # fmt: skip
_PROJECTIONS = {"linear": "linear", "mlp": "mlp", None: "none"}  # hf_proj_type
_KEPT = ("model_type", "pad_token_id", "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "vocab_size",
         "hidden_size", "num_hidden_layers", "intermediate_size")  # fmt: skip


def _text_cfg(source: Source) -> Fields:
    return open_clip.model_config(source).section("text_cfg")


def _name(source: Source) -> str:
    name = _text_cfg(source).get("hf_model_name", str, "")
    if not name:
        raise ConvertError(
            f"{source.path}: the text tower is an encoder of transformers ({_PREFIX}*), and nothing says which one; copy "
            f"{CONFIG}, with text_cfg.hf_model_name, beside the weights"
        )
    return name


def _encoder(source: Source) -> Fields:
    """The encoder's configuration. Raises ConvertError where neither its name nor a file beside the weights says it."""
    name = _name(source)
    if ENCODER_CONFIG in source.configs:
        return source.config(ENCODER_CONFIG)
    for folder in (source.folder / name, source.folder / name.rsplit("/", 1)[-1]):
        if (folder / ENCODER_CONFIG).is_file():
            return Fields(str(folder / ENCODER_CONFIG), read_json(folder / ENCODER_CONFIG))
    known = ENCODERS.get(name.rsplit("/", 1)[-1])
    if known is None:
        raise ConvertError(
            f"{source.path}: {CONFIG} names the text encoder {name!r}, whose heads and epsilon are unknown; known are "
            f"{', '.join(ENCODERS)}; of another BERT, RoBERTa or XLM-R copy its config.json beside the weights"
        )
    return Fields(f"text_cfg.hf_model_name {name}", known)


def _arch(source: Source, options: Options) -> ClipArch:
    encoder, text = _encoder(source), _text_cfg(source)
    vision = open_clip.vision_arch(source, options)
    pooler, projection = text.get("hf_pooler_type", str, "mean_pooler"), text.content.get("hf_proj_type", "mlp")
    if pooler not in _POOLERS or projection not in _PROJECTIONS:
        raise ConvertError(
            f"{text.where}: hf_pooler_type={pooler!r} with hf_proj_type={projection!r} is not supported; expected "
            f"{', '.join(_POOLERS)} and linear, mlp or null"
        )
    pool, has_pooler = _POOLERS[pooler]
    stated = text.get("context_length", int, _CONTEXT)
    tower = bert.encoder_arch(source, encoder, _PREFIX, options, pool, stated, "text_cfg.context_length")
    hidden = shape_of(source, "text.proj.0.weight", 2)[0] if projection == "mlp" else 0
    try:
        tower = dataclasses.replace(
            tower, embed_dim=vision.embed_dim, projection=_PROJECTIONS[projection], projection_width=hidden, pooler=has_pooler
        )
    except ValueError as error:
        raise ConvertError(f"{source.path}: {error}") from error
    return ClipArch(vision, tower, logit_bias="logit_bias" in source.tensors)


def _rules(offset: int, text: TextArch | None, positions: int = 0, types: int = 1) -> list[Rule]:
    context = text.context_length if text is not None else 0
    pooled = text is not None and text.pooler
    pooler = linear("pooler.dense", "text/pooler") if pooled else [
        dropped(f"pooler.dense.{part}", "a head that mean pooling does not read") for part in ("weight", "bias")
    ]  # fmt: skip
    head = {
        "linear": [rule("text.proj.weight", "text/proj/kernel", TRANSPOSE)],
        "mlp": [rule(f"text.proj.{i}.weight", f"text/proj_mlp/fc{n}/kernel", TRANSPOSE) for n, i in ((1, 0), (2, 2))],
    }
    wanted = head.get(text.projection, []) if text is not None else head["linear"] + head["mlp"]
    encoder = [*bert.encoder_rules(offset, context, positions, types), *pooler]
    return [*open_clip.vision_rules(), *prefixed(encoder, _PREFIX), *wanted]


def _source_rules(source: Source, arch: ClipArch | None) -> list[Rule]:
    text = arch.text if arch is not None else None
    return _rules(bert.offset_of(_encoder(source)) if text else 0, text)


def _details(source: Source, options: Options) -> Details:
    encoder = {key: _encoder(source).content[key] for key in _KEPT if _encoder(source).content.get(key) is not None}
    encoder["type_vocab_size"] = shape_of(source, f"{_PREFIX}embeddings.token_type_embeddings.weight", 2)[0]
    read = _text_cfg(source).get("hf_pooler_type", str) == "cls_pooler"
    pooler = f"{_PREFIX}pooler.dense.weight" in source.tensors and not read
    return Details(
        origin={"text_encoder": {"name": _name(source), **encoder}},
        notes=["left out: the encoder's pooler, which the pooling does not read"] if pooler else [],
    )


# --- export ----------------------------------------------------------------------------------------------------------------


def _export(source: ExportSource) -> ExportFiles:
    """An OpenCLIP folder. Raises ConvertError where no name of an encoder gives OpenCLIP this one."""
    text: TextArch = source.arch.text
    name, encoder = _known_encoder(source)
    refuse("open_clip", {
        f"its text tower has the projection {text.projection!r}": text.projection not in _PROJECTIONS.values(),
        f"its text tower pools {text.pool!r}": (text.pool, text.pooler) not in _POOLERS.values(),
        "its MLP of the projection has not the mean of the widths before and after it":
            text.projection == "mlp" and text.projection_width != (text.width + text.embed_dim) // 2,
        **several_blocks(text),
    })  # fmt: skip
    offset, positions = bert.offset_of(encoder), encoder.positive("max_position_embeddings", int)
    config = {
        "context_length": text.context_length,
        "hf_model_name": name,
        "hf_tokenizer_name": name,
        "hf_model_pretrained": False,
        "hf_proj_type": next(theirs for theirs, ours in _PROJECTIONS.items() if ours == text.projection),
        "hf_pooler_type": next(key for key, value in _POOLERS.items() if value == (text.pool, text.pooler)),
    }
    if source.tokenizer is not None and source.tokenizer.cleaning != "whitespace":
        refuse("open_clip", {"its tokenizer does not clean text": not source.tokenizer.cleaning})
        config["tokenizer_kwargs"] = {"clean": source.tokenizer.cleaning}
    types = encoder.positive("type_vocab_size", int, 2 if encoder.get("model_type", str) == "bert" else 1)
    made = export_files(source, _rules(offset, text, positions, types), config)
    if positions > offset + text.context_length:
        made.notes.append(
            f"the positions of the text encoder beyond {text.context_length} tokens are zero; text_cfg.context_length says so"
        )
    return made


def _known_encoder(source: ExportSource) -> tuple[str, Fields]:
    """(name, configuration) of the encoder: the one it was converted from, or a published one of its sizes."""
    text: TextArch = source.arch.text
    origin = Fields(source.where, source.description.get("source", {})).section("text_encoder")
    if origin:
        return origin.get("name", str, ""), origin
    mine = {
        "pad_token_id": text.pad_id, "layer_norm_eps": text.norm_eps, "hidden_size": text.width,
        "num_hidden_layers": text.depth, "num_attention_heads": text.heads, "vocab_size": text.vocabulary,
    }  # fmt: skip
    sizes = {"roberta-base": 50265, "roberta-large": 50265, "bert-base-cased": 28996, "bert-base-multilingual-cased": 119547}
    for name, known in ENCODERS.items():
        if {"vocab_size": sizes.get(name, 30522), **known}.items() >= mine.items() and text.mlp_width == 4 * text.width:
            return name, Fields(name, known)
    raise ConvertError(
        f"the open_clip layout names a text encoder of transformers, and none is known that has the sizes of this one; known "
        f"are {', '.join(ENCODERS)}"
    )


LAYOUT = Layout(
    name="open_clip_encoder",
    kind="clip",
    detect=lambda source: source.has(open_clip.ENCODER) and open_clip.is_vit(source),
    arch=_arch,
    rules=_source_rules,
    preprocess=open_clip.preprocess,
    details=_details,
    export=Export("open_clip", _export, holds=lambda arch: arch.text.post_norm),
    options=open_clip.LAYOUT.options | {"context_length"},
    config_files=(CONFIG, ENCODER_CONFIG),
    precedence=2,
)
