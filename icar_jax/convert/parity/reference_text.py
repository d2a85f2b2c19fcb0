"""Runs text encoders in PyTorch, as transformers builds them; functions as of `reference_models`.

`features` are the last hidden states, pooled as sentence-transformers pools them: the first token's, or the mean of all tokens
but the padding.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts.bert import POOLING, POOLS, SENTENCE
from icar_jax.convert.parity.reference_inputs import ReferenceRequest, captions
from icar_jax.convert.parity.reference_models import Run
from icar_jax.convert.parity.reference_reading import class_of, load_transformers, refuse_options
from icar_jax.convert.source import Source

_CLASSES = {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}
_MAY_LACK = ("pooler.", "position_ids", "token_type_ids")  # parts of the library's models that no output here depends on


def run_transformers_text(torch: ModuleType, transformers: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    refuse_options(
        source, asked, "config.json describes the encoder", "model_name", "activation", "heads", "exits", "image_size"
    )
    class_of(source, _CLASSES)
    pool = _pool(source, asked)
    model = load_transformers(transformers, source, _CLASSES, _MAY_LACK)
    tokens, mask = _texts(source, model.config, asked)
    hidden = model(
        input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()
    ).last_hidden_state  # fmt: skip
    weight = torch.from_numpy(mask).float()[..., None]
    features = hidden[:, 0] if pool == "first" else (hidden * weight).sum(1) / weight.sum(1)
    built = {"class": type(model).__name__, "activation": model.config.hidden_act, "pool": pool}
    return {"tokens": tokens, "features": features}, built


def run_lone_text(torch: ModuleType, transformers: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    """The text tower of a CLIP or a SigLIP alone."""
    names = ("model_name", "exits", "heads", "image_size", "context_length", "text_pool")
    refuse_options(source, asked, "config.json describes the tower", *names)
    projected = "text_projection.weight" in source.tensors
    classes = {
        "clip_text_model": "CLIPTextModelWithProjection" if projected else "CLIPTextModel",
        "siglip_text_model": "SiglipTextModel",
    }
    model = load_transformers(transformers, source, classes, ("position_ids",))
    config, siglip = model.config, model.config.model_type == "siglip_text_model"
    highest = config.eos_token_id == 2
    end = 1 if siglip else config.vocab_size - 1 if highest else config.eos_token_id
    if not isinstance(end, int) or not 0 <= end < config.vocab_size:
        raise ConvertError(f"{source.folder}/config.json: eos_token_id is {end}, expected an id below {config.vocab_size}")
    tokens = captions(
        asked, config.max_position_embeddings, config.vocab_size, start=None, end=end, pad=end, highest=highest and not siglip
    )
    out = model(input_ids=torch.from_numpy(tokens).long())
    features = out.text_embeds if projected else out.pooler_output
    return {"tokens": tokens, "features": features}, {"class": type(model).__name__, "activation": config.hidden_act}


def _texts(source: Source, config: Any, asked: ReferenceRequest) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [N, L] and which of them are none of the padding at the end of a row, bool [N, L]."""
    vocabulary, pad = config.vocab_size, config.pad_token_id
    if not isinstance(pad, int) or not 0 <= pad < vocabulary:
        raise ConvertError(f"{source.folder}/config.json: pad_token_id is {pad}, expected an id below {vocabulary}")
    # RoBERTa's first position is the one after its padding's id.
    positions = config.max_position_embeddings - (0 if config.model_type == "bert" else pad + 1)
    stated = source.configs.get(SENTENCE, {}).get("max_seq_length")
    context = asked.context_length or stated or positions
    if not isinstance(context, int) or not 2 <= context <= positions:
        raise ConvertError(f"{source.path}: a text of {context} tokens: this encoder has positions for 2 to {positions}")
    known = [i for i in (config.eos_token_id, vocabulary - 1, vocabulary - 2) if _is_word(i, vocabulary, pad)]
    start = config.bos_token_id if _is_word(config.bos_token_id, vocabulary, pad) else None
    tokens = captions(asked, context, vocabulary, start=start, end=known[0], pad=pad, highest=False)
    return tokens, tokens != pad  # no text contains the padding's id


def _is_word(token: Any, vocabulary: int, pad: int) -> bool:
    return isinstance(token, int) and 0 <= token < vocabulary and token != pad


def _pool(source: Source, asked: ReferenceRequest) -> str:
    """The user's pooling, else that of sentence-transformers. Raises ConvertError where it is unknown or unsupported."""
    if asked.text_pool:
        return asked.text_pool
    content = source.configs.get(POOLING)
    if content is None:
        raise ConvertError(
            f"{source.path} does not say how its tokens become one embedding (no {POOLING}); give one of "
            f"{', '.join(POOLS.values())} as text_pool"
        )
    modes = sorted(name for name, value in content.items() if name.startswith("pooling_mode_") and value is True)
    if len(modes) != 1 or modes[0] not in POOLS:
        raise ConvertError(
            f"{source.folder}/{POOLING}: {', '.join(modes) or 'no mode'} is not supported; expected {' or '.join(POOLS)}"
        )
    return POOLS[modes[0]]
