"""Put routed layers into a loaded model of transformers.

Instances get a new class, a subclass of their own with the same name, and routed layers a child
module `mod_router`. No module is wrapped or replaced, so checkpoint keys, class names (FSDP,
`_no_split_modules`) and module paths (PEFT) are those of the backbone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from pmod_model.cache_name import cache_name
from pmod_model.configuration import PModConfig
from pmod_model.context import RoutingRecord
from pmod_model.images import cuts_images
from pmod_model.layer import DenseLayer, RoutedLayer
from pmod_model.models import DecoderModel, GenerativeModel, MultimodalModel, with_target_mask
from pmod_model.router import Router
from pmod_model.schedule import layer_ratios, warn_of_other_depth
from pmod_model.targets import has_high_resolution, tokens_per_image
from pmod_model.trial import check_layers, trial_inputs

BLOCK = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
OTHER_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def inject_pmod(model: PreTrainedModel, config: PModConfig) -> PreTrainedModel:
    """Turn a loaded model into a p-MoD model, in place.

    Works on pre-norm decoders of transformers (Llama, Mistral, Qwen, ...) and on vision-language
    models built on them. Routers start at zero. Afterwards `forward` and `generate` accept
    `target_mask`, bool [B, S], True = may be skipped; left out, it is derived from the image and
    video tokens in `input_ids`. Without any target a forward pass is that of the backbone.

    Args:
        model: the model, with or without a head.
        config: the settings; also stored in `model.config.pmod`, which `save_pretrained` writes,
            with the number of layers that they were made for.

    Returns:
        `model`.

    Raises:
        TypeError: `model` or `config` has the wrong type.
        ValueError: the model is already injected, is not of pre-norm blocks, has sliding-window
            attention in a routed layer, or computes something else than its parts do; or the
            settings do not fit it.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"inject_pmod: model: expected a PreTrainedModel, got {type(model).__name__}"
        )
    if not isinstance(config, PModConfig):
        raise TypeError(f"inject_pmod: config: expected a PModConfig, got {type(config).__name__}")
    decoder = find_decoder(model)
    if isinstance(decoder, DecoderModel):
        _fail("model", "a model without routers", f"{type(model).__name__}, already injected")
    _check_settings(model, config)
    layers: Any = decoder.layers
    ratios = layer_ratios(config, len(layers))
    if not ratios:
        _fail(
            "config",
            f"a schedule with a ratio <= max_ratio {config.max_ratio}",
            "dense layers only",
        )
    warn_of_other_depth(config, getattr(model.config, "pmod_layers", None), len(layers))
    for index in ratios:
        _check_block(layers[index], index, decoder.config)
    for module in (model, decoder, *layers):
        if "forward" in vars(module):
            _fail(
                "model",
                "a model whose forward is its own",
                f"a hooked {type(module).__name__}; inject first",
            )
    trial = trial_inputs(decoder, layers, ratios)
    original = [type(layer) for layer in layers]
    for index, layer in enumerate(layers):
        if index in ratios:
            _add_router(layer, config)
        else:
            layer.__class__ = _subclass(type(layer), DenseLayer)
    mismatch = check_layers(layers, trial)
    if mismatch is not None:
        for layer, its_class in zip(layers, original, strict=True):
            layer.__class__ = its_class
            layer._modules.pop("mod_router", None)
        name = original[mismatch].__name__
        _fail(
            "model", "blocks x + attention(norm(x)), then + mlp(norm(x))", f"{name}, which differs"
        )
    _extend_models(model, decoder, config, ratios)
    return model


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The text decoder in `model`: the module that owns the layers and the token embedding."""
    for module in model.modules():
        parts = (getattr(module, name, None) for name in ("layers", "embed_tokens", "norm"))
        if isinstance(module, PreTrainedModel) and all(
            isinstance(part, nn.Module) for part in parts
        ):
            return module
    _fail("model", "a decoder with layers, embed_tokens and norm", type(model).__name__)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingRecord]]:
    """Collect what every routed forward pass keeps, while the context is open.

    One record per forward pass in which a token competes (the prefill of a `generate`, not its
    decoding steps; the last replay under gradient checkpointing).

    Example:
        with record_routing(model) as records:
            model(**inputs)
        records[0].kept[8]  # bool [B, S]: image tokens that layer 8 kept

    Raises:
        ValueError: the model has no routed layers.
    """
    decoder = find_decoder(model)
    if not isinstance(decoder, DecoderModel):
        raise ValueError(
            f"record_routing: model: expected a p-MoD model, got {type(model).__name__}"
        )
    records: list[RoutingRecord] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"routing_records": records}

    handle = decoder.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield records
    finally:
        handle.remove()


def _check_settings(model: PreTrainedModel, config: PModConfig) -> None:
    if config.gate_attention:
        _fail(
            "config.gate_attention", "False, because no kernel weights the attention branch", True
        )
    if config.pool == "sequence":
        return
    if config.pool == "frame" and getattr(model.config, "video_token_id", None) is not None:
        _fail(
            "config.pool", '"sequence" or "image" for a model of videos', '"frame", not supported'
        )
    if config.target_tokens == "all":
        _fail("config.pool", '"sequence" with target_tokens "all"', f'"{config.pool}"')
    if has_high_resolution(model.config) and not cuts_images(model):
        got = f'"{config.pool}", not supported'
        _fail("config.pool", f'"sequence" for {type(model).__name__}', got)


def _check_block(layer: nn.Module, index: int, model_config: Any) -> None:
    name = type(layer).__name__
    missing = [part for part in BLOCK if not isinstance(getattr(layer, part, None), nn.Module)]
    extra = [part for part in OTHER_NORMS if hasattr(layer, part)]
    if missing or extra:
        how = f"without {', '.join(missing)}" if missing else f"with {', '.join(extra)}"
        _fail(f"layers[{index}]", f"a pre-norm block of {', '.join(BLOCK)}", f"{name} {how}")
    kinds = getattr(model_config, "layer_types", None)
    window = getattr(model_config, "sliding_window", None)
    if kinds is None:
        kinds = [f"a sliding window of {window}" if window else "full_attention"] * (index + 1)
    if kinds[index] != "full_attention":
        _fail(f"layers[{index}]", "full attention in a routed layer", kinds[index])
    if not isinstance(getattr(layer.self_attn, "layer_idx", None), int):
        _fail(f"layers[{index}]", "an attention module that knows its layer_idx", name)


def _add_router(layer: Any, config: PModConfig) -> None:
    like = layer.input_layernorm.weight
    # DeepSpeed ZeRO-3 spreads parameters while a model is built, and leaves empty ones
    shape = getattr(like, "ds_shape", like.shape)
    layer.mod_router = Router(
        shape[0], bias=config.router_bias, device=like.device, dtype=like.dtype
    )
    layer.pmod_config = config
    layer.__class__ = _subclass(type(layer), RoutedLayer)


def _extend_models(
    model: PreTrainedModel, decoder: Any, config: PModConfig, ratios: dict[int, float]
) -> None:
    decoder.__class__ = _subclass(type(decoder), DecoderModel)
    decoder.pmod_ratios = ratios
    decoder.pmod_tokens_per_image = tokens_per_image(model.config)
    owner: Any = decoder
    for module in model.modules():
        if any(child is decoder for child in module.children()):
            owner = module
            owner.__class__ = _subclass(type(owner), MultimodalModel)
    top: Any = model
    if top is not decoder:
        top.__class__ = _subclass(type(top), GenerativeModel)
    for module in (decoder, owner, top):
        module.pmod_config = config
    top.config.pmod = config.to_dict()
    top.config.pmod_layers = len(decoder.layers)


@functools.cache
def _subclass(cls: type, mixin: type) -> type:
    """`cls` with `mixin` before it, under the name of `cls`; `cls` itself if it has the mixin."""
    if issubclass(cls, mixin):
        return cls
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        # looked up once: torch.compile does not trace the inspection of a signature
        "pmod_cache_name": cache_name(cls),
    }
    if issubclass(cls, PreTrainedModel):
        for name in ("forward", "prepare_inputs_for_generation"):
            original: Any = getattr(cls, name, None)
            if original is None:
                continue
            # a mixin without its own version only makes the argument known
            members[name] = with_target_mask(vars(mixin).get(name, original), original)
    return type(cls.__name__, (mixin, cls), members)


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"inject_pmod: {name}: expected {expected}, got {got}")
