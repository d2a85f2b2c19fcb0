"""Runs the original models in PyTorch, as their own libraries build them, on random inputs.

Each `run_...` function takes torch, the library, the source and the user's request, and returns (arrays of the reference by
name, a description of the built model). This file imports nothing that needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.parity.reference_inputs import ACTIVATIONS, ReferenceRequest, captions, nchw, noise
from icar_jax.convert.parity.reference_reading import load_strictly, read_state_dict, refuse_options, require_stated
from icar_jax.convert.source import Source

Run = tuple[dict[str, Any], dict[str, Any]]
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's archives store as tensors
_EXIT_KEYS = ("early_temp", "temp_clamp", "early_ln.weight", "early_ln.bias", "early_proj.weight")


# --- Hugging Face: CLIP and SigLIP -----------------------------------------------------------------------------------------


def run_transformers(torch: ModuleType, transformers: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    refuse_options(
        source, asked, "transformers reads config.json and offers no other size", "model_name", "exits", "image_size"
    )
    folder = source.path if source.path.is_dir() else source.path.parent
    wanted, cls = ("clip", transformers.CLIPModel) if source.layout == "hf_clip" else ("siglip", transformers.SiglipModel)
    stated = source.configs.get("config.json", {}).get("model_type", wanted)
    if stated != wanted:
        raise ConvertError(
            f"{folder}: config.json describes a {stated!r} model, whose weights {cls.__name__} would run as its own"
        )
    safe = ".safetensors" in source.weights.path.name
    try:
        model, info = cls.from_pretrained(folder, local_files_only=True, use_safetensors=safe, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConvertError(f"{folder}: transformers cannot load it as {cls.__name__}: {error}") from error
    # transformers initialises tensors that the file lacks at random, with only a warning.
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    faults = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
    if faults:
        raise ConvertError(f"{folder}: the weights are not those of the {cls.__name__} in config.json: {faults}")
    model = model.float().eval()
    vision, text = model.config.vision_config, model.config.text_config
    stated = {"gelu_pytorch_tanh": "gelu_tanh"}.get(vision.hidden_act, vision.hidden_act)
    require_stated(source, asked, "config.json", stated, (vision.num_attention_heads, text.num_attention_heads))
    vocabulary = text.vocab_size
    if source.layout == "siglip":
        known = [i for i in (text.eos_token_id, text.pad_token_id) if i is not None and 0 <= i < vocabulary] or [1]
        special = {"start": None, "end": known[0], "pad": known[-1], "highest": False}
    else:
        # For an end token of 2 transformers pools the highest id; any other end token may have higher ids above it.
        highest = text.eos_token_id == 2
        end = vocabulary - 1 if highest else text.eos_token_id
        if not isinstance(end, int) or not 0 <= end < vocabulary:
            raise ConvertError(f"{folder}/config.json: eos_token_id is {end}, expected an id below the vocabulary {vocabulary}")
        start = text.bos_token_id if text.bos_token_id is not None and text.bos_token_id < vocabulary else None
        special = {"start": start if start != end else None, "end": end, "pad": end, "highest": highest}
    images = noise(asked, vision.image_size)
    tokens = captions(asked, text.max_position_embeddings, vocabulary, **special)
    output = model(pixel_values=nchw(torch, images), input_ids=torch.from_numpy(tokens).long())
    arrays = {"images": images, "tokens": tokens, "image_embeds": output.image_embeds, "text_embeds": output.text_embeds}
    arrays |= {name: getattr(model, name).reshape(()) for name in ("logit_scale", "logit_bias") if hasattr(model, name)}
    return arrays, {"class": cls.__name__, "activation": [vision.hidden_act, text.hidden_act]}


# --- open_clip: OpenAI, OpenCLIP, ICAR -------------------------------------------------------------------------------------


def run_open_clip(torch: ModuleType, open_clip: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    whole, extra = read_state_dict(torch, source)
    icar = source.layout == "icar"
    state = {k.removeprefix("clip.") if icar else k: v for k, v in whole.items() if not (icar and k in _EXIT_KEYS)}
    state = {k: v for k, v in state.items() if k not in (*_OPENAI_SIZES, "attn_mask")}
    config, built = _clip_config(open_clip, source, state, asked, extra if icar else {})
    custom = any(name.startswith("text.") for name in state)
    cls = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias")
    model = cls(**{key: config[key] for key in known if key in config})
    if asked.image_size:
        open_clip.model.resize_pos_embed(state, model)
    # Some checkpoints store the temperature as a vector of one.
    state |= {name: state[name].reshape(getattr(model, name).shape) for name in ("logit_scale", "logit_bias") if name in state}
    model = load_strictly(model, state, source, "open_clip")
    images = noise(asked, model.visual.image_size[0])
    tokens = _encoder_texts(model, config, asked) if source.layout == "open_clip_encoder" else _texts(model, config, asked)
    pixels = nchw(torch, images)
    arrays = {
        "images": images,
        "tokens": tokens,
        "image_embeds": model.encode_image(pixels, normalize=True),
        "text_embeds": model.encode_text(torch.from_numpy(tokens).long(), normalize=True),
        "logit_scale": model.logit_scale,
    }
    if model.logit_bias is not None:
        arrays["logit_bias"] = model.logit_bias
    if icar:
        arrays |= _icar_exit(torch, model, pixels, whole, source, asked, extra)
    return arrays, built


def _texts(model, config: Mapping[str, Any], asked: ReferenceRequest) -> Any:
    text = getattr(model, "text", None)
    pool = model.text_pool_type if text is None else text.pool_type
    end = (model.text_eos_id if text is None else text.eos_id) if pool == "eos" else model.vocab_size - 1
    pad = config["text_cfg"].get("pad_id", 0)
    start = model.vocab_size - 2 if end == model.vocab_size - 1 else None
    return captions(asked, model.context_length, model.vocab_size, start=start, end=end, pad=pad, highest=pool == "argmax")


def _encoder_texts(model, config: Mapping[str, Any], asked: ReferenceRequest) -> Any:
    encoder = model.text.config
    vocabulary, pad, context = encoder.vocab_size, encoder.pad_token_id, asked.context_length
    start = encoder.bos_token_id if encoder.bos_token_id not in (None, pad) else vocabulary - 2
    end = encoder.eos_token_id if encoder.eos_token_id not in (None, pad) else vocabulary - 1
    context = context or config["text_cfg"].get("context_length", 77)
    return captions(asked, context, vocabulary, start=start, end=end, pad=pad, highest=False)


def _icar_exit(
    torch, model, pixels, state, source: Source, asked: ReferenceRequest, extra: Mapping[str, Any]
) -> dict[str, Any]:
    layer = _settings(extra).get("early_exit_layer")
    if layer is None and len(asked.exits) != 1:
        raise ConvertError(
            f"{source.path} does not say after which block its exit head reads (no config.early_exit_layer); "
            f"give one number of executed blocks as exits, found {asked.exits}"
        )
    blocks = asked.exits[0] if layer is None else int(layer) + 1
    if asked.exits not in ((), (blocks,)) or not 1 <= blocks <= len(model.visual.transformer.resblocks):
        raise ConvertError(f"{source.path} has its exit after {blocks} blocks; {asked.exits or 'that many'} cannot be run")
    width, embed_dim = model.visual.transformer.width, model.visual.output_dim
    norm, proj = torch.nn.LayerNorm(width), torch.nn.Linear(width, embed_dim, bias=False)
    for part, name in ((norm, "early_ln."), (proj, "early_proj.")):
        load_strictly(
            part, {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}, source, f"the exit head {name}"
        )
    # Row 0 is the first patch: this output has no class token.
    taps = model.visual.forward_intermediates(pixels, [blocks - 1], stop_early=True, intermediates_only=True, output_fmt="NLC")
    embeds = torch.nn.functional.normalize(proj(norm(taps["image_intermediates"][0][:, 0])), dim=-1)
    scale = {f"exit_{blocks}_logit_scale": state["early_temp"].float().reshape(())} if "early_temp" in state else {}
    return {f"exit_{blocks}": embeds, **scale}


def _clip_config(
    open_clip: ModuleType, source: Source, state: Mapping[str, Any], asked: ReferenceRequest, extra: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's model configuration, and its origin: a file beside the weights, a name, or the shapes."""
    names, settings = open_clip.list_models(), _settings(extra)
    encoder = source.layout == "open_clip_encoder"  # always with a config
    name, shapes = settings.get("model_name"), {} if encoder else _clip_shapes(source, state)
    if "open_clip_config.json" in source.configs:
        refuse_options(source, asked, "open_clip_config.json describes the model", "model_name")
        config, built = source.configs["open_clip_config.json"].get("model_cfg", {}), "open_clip_config.json"
        if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]:
            raise ConvertError(f"{source.path}: open_clip_config.json lacks model_cfg.{', model_cfg.'.join(missing)}")
        # act_kwargs set an activation that has no name here.
        plain = not (config["vision_cfg"].get("act_kwargs") or config["text_cfg"].get("act_kwargs"))
        stated = "quick_gelu" if config.get("quick_gelu") else "gelu" if plain else asked.activation
        require_stated(source, asked, built, stated, _heads(config))
    elif asked.model_name:
        if asked.model_name not in names:
            raise ConvertError(f"open_clip has no model {asked.model_name!r}; found for example {', '.join(names[:8])}")
        config, built = open_clip.get_model_config(asked.model_name), asked.model_name
    elif name in names and _sizes(open_clip.get_model_config(name)) == _sizes(shapes):
        config, built = open_clip.get_model_config(name), name
    else:
        config, built = shapes, "shapes"
        _set_heads(open_clip, config, source, asked)
    config = {**config, "vision_cfg": dict(config["vision_cfg"]), "text_cfg": dict(config["text_cfg"])}
    for side, library in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name")):
        if config[side].get(library) and not (encoder and side == "text_cfg"):
            raise ConvertError(f"{source.path}: {side}.{library} names a tower of another library, which is not supported")
    if encoder:  # open_clip reads its config by this name, of a model of transformers or of a folder
        config["text_cfg"]["hf_model_pretrained"] = False
        if "config.json" in source.configs:
            config["text_cfg"]["hf_model_name"] = str(source.folder)
    if built != "open_clip_config.json":
        # open_clip runs OpenAI's weights with QuickGELU under any name of the model.
        openai = source.layout == "openai" or settings.get("pretrained") == "openai"
        base = config if built != "shapes" else (open_clip.get_model_config(name) if name in names else None)
        stated = "" if base is None else "quick_gelu" if base.get("quick_gelu") else "gelu"
        activation = asked.activation or ("quick_gelu" if openai else stated)
        if not activation:
            raise ConvertError(f"{source.path} does not say which activation it uses; give one of {', '.join(ACTIVATIONS)}")
        config["quick_gelu"] = activation == "quick_gelu"
        if activation == "gelu_tanh":
            config["vision_cfg"]["act_kwargs"] = config["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    if "logit_bias" in state:
        config.setdefault("init_logit_bias", 0.0)
    if asked.image_size:
        config["vision_cfg"]["image_size"] = asked.image_size
    return config, {"from": built, "config": config}


def _clip_shapes(source: Source, state: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's configuration from shapes: everything but heads and activation."""
    text = "text." if any(name.startswith("text.") for name in state) else ""
    try:
        conv, positions = state["visual.conv1.weight"].shape, state["visual.positional_embedding"].shape
        sides = {}
        for side, prefix in (("vision", "visual."), ("text", text)):
            first = f"{prefix}transformer.resblocks."
            hidden, width = state[f"{first}0.mlp.c_fc.weight"].shape
            layers = len({name[len(first) :].split(".")[0] for name in state if name.startswith(first)})
            # open_clip rounds width * ratio down.
            sides[side] = {"width": width, "layers": layers, "mlp_ratio": (hidden + 0.5) / width}
        vocabulary, context = state[f"{text}token_embedding.weight"].shape[0], state[f"{text}positional_embedding"].shape[0]
        embed_dim = state["visual.proj"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise ConvertError(f"{source.path} is not a vision transformer with a text transformer: {error}") from error
    image_size = conv[-1] * round((positions[0] - 1) ** 0.5)
    vision = {**sides["vision"], "patch_size": conv[-1], "image_size": image_size}
    vision["no_ln_pre"] = "visual.ln_pre.weight" not in state
    words = {"context_length": context, "vocab_size": vocabulary, "proj_bias": f"{text}text_projection.bias" in state}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": {**sides["text"], **words}}


def _sizes(config: Mapping[str, Any]) -> tuple:
    vision, text = config["vision_cfg"], config["text_cfg"]
    sides = [vision.get(k) for k in ("width", "layers", "patch_size")] + [text.get(k) for k in ("width", "layers")]
    return (config["embed_dim"], *sides)


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Attention heads (vision, text), with open_clip's defaults where the configuration has none."""
    vision = config["vision_cfg"]
    return vision.get("width", 768) // vision.get("head_width", 64), config["text_cfg"].get("heads", 8)


def _set_heads(open_clip: ModuleType, config: dict[str, Any], source: Source, asked: ReferenceRequest) -> None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    heads = {asked.heads} if asked.heads else set()
    if not heads and source.layout == "openai":
        heads = {(vision["width"] // 64, text["width"] // 64)}
    if not heads:  # those of open_clip's own models of these sizes
        known = map(open_clip.get_model_config, open_clip.list_models())
        heads = {_heads(other) for other in known if _sizes(other) == _sizes(config)}
    if len(heads) != 1 or any(h < 1 or w % h for h, w in zip(*heads, (vision["width"], text["width"]), strict=True)):
        raise ConvertError(
            f"{source.path}: the number of attention heads cannot be told from widths {vision['width']} (vision) and "
            f"{text['width']} (text); candidates: {sorted(heads) or 'none'}; give both heads, or a model name of open_clip"
        )
    (found,) = heads
    vision["head_width"], text["heads"] = vision["width"] // found[0], found[1]


# --- timm: ConvNeXt and ICC ------------------------------------------------------------------------------------------------


def run_timm(torch: ModuleType, timm: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    refuse_options(source, asked, "a ConvNeXt has none", "activation", "heads", "exits")
    state, _ = read_state_dict(torch, source)
    model, built = _convnext(timm, source, state, asked, {})
    model = load_strictly(model, state, source, "timm")
    images = noise(asked, _convnet_size(asked, source))
    return {"images": images, "logits" if model.num_classes else "features": model(nchw(torch, images))}, built


def run_icc(torch: ModuleType, timm: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    return _run_scorer(torch, timm, source, asked, "classifier", lambda nn, width: [nn.LayerNorm(width), nn.Linear(width, 2)])


def run_ic9600(torch: ModuleType, timm: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    def layers(nn: Any, width: int) -> list[Any]:
        first = [nn.LayerNorm(width), nn.Linear(width, 512), nn.ReLU(), nn.Dropout(0.2)]
        return [*first, nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 1)]

    return _run_scorer(torch, timm, source, asked, "regressor", layers)


def _run_scorer(torch: ModuleType, timm: ModuleType, source: Source, asked: ReferenceRequest, name: str, layers: Any) -> Run:
    """A complexity model whose head is called `name`: its backbone's features, and these `layers`."""
    refuse_options(source, asked, "a complexity model has none", "activation", "heads", "exits")
    whole, extra = read_state_dict(torch, source)
    state = {k.removeprefix("backbone."): v for k, v in whole.items() if k.startswith("backbone.")}
    backbone, built = _convnext(timm, source, state, asked, extra.get("hparams", {}))
    head = torch.nn.Sequential(*layers(torch.nn, backbone.num_features))
    model = load_strictly(torch.nn.ModuleDict({"backbone": backbone, name: head}), whole, source, "timm")
    images = noise(asked, _convnet_size(asked, source))
    return {"images": images, "logits": model[name](model["backbone"](nchw(torch, images)))}, built


def _convnext(timm: ModuleType, source: Source, state: Mapping[str, Any], asked: ReferenceRequest, hparams: Mapping[str, Any]):
    """(timm's model, its description): by config.json, by name, or from shapes where timm has no such model."""
    classes = len(state["head.fc.weight"]) if "head.fc.weight" in state else 0
    config = source.configs.get("config.json", {})
    named = asked.model_name or config.get("architecture") or hparams.get("model_name", "")
    if named and timm.is_model(named):
        arguments = config.get("model_args", {}) if named == config.get("architecture") else {}
        model = timm.create_model(named, pretrained=False, **{**arguments, "num_classes": classes})
        fits = {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
        if fits or asked.model_name:
            return model, {"from": named, "num_classes": classes}
    elif asked.model_name:
        raise ConvertError(f"timm has no model {asked.model_name!r}; `timm.list_models('convnext*')` lists them")
    try:
        depths = [len({k.split(".")[3] for k in state if k.startswith(f"stages.{i}.blocks.")}) for i in range(4)]
        dims = [len(state[f"stages.{i}.blocks.0.conv_dw.weight"]) for i in range(4)]
        convolutions = state["stages.0.blocks.0.mlp.fc1.weight"].ndim == 4
    except KeyError as error:
        raise ConvertError(f"{source.path} is not timm's ConvNeXt with four stages: {error} is missing") from error
    version = {"use_grn": "stages.0.blocks.0.mlp.grn.weight" in state}
    version["ls_init_value"] = 1e-6 if "stages.0.blocks.0.gamma" in state else None
    fields = {"depths": depths, "dims": dims, "conv_mlp": convolutions, "num_classes": classes, **version}
    return timm.models.convnext.ConvNeXt(**fields), {"from": "shapes", **fields}


def _convnet_size(asked: ReferenceRequest, source: Source) -> int:
    """Image size in pixels: the user's, that of timm's config.json, or 224; the weights fit every size."""
    pretrained = source.configs.get("config.json", {}).get("pretrained_cfg", {})
    return asked.image_size or pretrained.get("input_size", (3, 224, 224))[-1]


def _settings(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    config = extra.get("config")
    return config if isinstance(config, Mapping) else {}
