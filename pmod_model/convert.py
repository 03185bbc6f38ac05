"""Convert configs and checkpoints of the authors' p-MoD code, both ways.

Their format: https://github.com/MCG-NJU/p-MoD at commit 459f6df. Encoded strings such as
"shiftedcos_decay_0.85_0.15" and "tanh_0.2_1" are read and written here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from pmod_model.configuration import PModConfig

OFFICIAL_DEPTH = 31  # their schedule divides by it, whatever the number of layers
CURVES = {"shiftedcos": "shifted_cosine", "shiftedlinear": "shifted_linear"}
TOKENS = {"vision_all": "vision", "vision_hr": "vision_high_res", "all": "all"}
PROJECTOR = {"0": "linear_1", "2": "linear_2"}
OFFICIAL_VISION = "model.vision_tower.vision_tower.vision_model."
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # recomputed, so dropped
SHOWN = 20


def config_from_official(official: Mapping[str, Any]) -> PModConfig:
    """The p-MoD settings in an official `config.json`.

    Raises:
        ValueError: a key is missing, or a value is none that the official code accepts.
    """
    target_layers = _get(official, "mod_target_layers")
    mean = _get(official, "mod_router_factor")
    activation, scale, bias = _parse_gate(_get(official, "mod_weight_norm"))
    tokens = _get(official, "mod_target_token_type")
    if tokens not in TOKENS:
        _fail("mod_target_token_type", f"one of {', '.join(TOKENS)}", tokens)
    return PModConfig(
        **_parse_layers(target_layers, official),
        mean_ratio=mean,
        gate_activation=activation,  # type: ignore[arg-type]
        gate_scale=scale,
        gate_bias=bias,
        router_bias=_get(official, "mod_bias_enabled"),
        target_tokens=TOKENS[tokens],  # type: ignore[arg-type]
    )


def config_to_official(config: PModConfig, num_layers: int | None = None) -> dict[str, Any]:
    """The `mod_*` keys of an official config that computes what `config` does.

    Args:
        config: the settings.
        num_layers: decoder layers of the model; needed unless `decay_depth` is 31.

    Raises:
        ValueError: the official code cannot express the settings.
    """
    expected = {
        "gate_attention": False,
        "gate_mlp": True,
        "scale_skipped": True,
        "pool": "sequence",
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            _fail(name, f"{value!r}, which the official code hard-codes", getattr(config, name))
    scale, bias = _write_number(config.gate_scale), _write_number(config.gate_bias)
    tokens = {ours: theirs for theirs, ours in TOKENS.items()}
    return {
        "mod_target_layers": _write_layers(config, num_layers),
        "mod_router_factor": config.mean_ratio,
        "mod_weight_norm": f"{config.gate_activation}_{scale}_{bias}",
        "mod_bias_enabled": config.router_bias,
        "mod_target_token_type": tokens[config.target_tokens],
    }


def state_dict_from_official(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename official parameters to those of a transformers model in memory.

    The names are those of LLaVA if there is an `mm_projector`, a vision tower or an image newline,
    else those of `LlamaForCausalLM`. Part of a checkpoint (a shard) is fine. No tensor is copied.

    Raises:
        ValueError: keys are unknown; the message lists them.
    """
    multimodal = any(
        key.startswith(("model.mm_projector.", "model.vision_tower.")) for key in official
    )
    multimodal |= "model.image_newline" in official
    rename = functools.partial(_from_official_key, decoder=_decoder_prefix(multimodal))
    kept = {key: value for key, value in official.items() if not key.endswith(BUFFERS)}
    return _renamed(kept, rename)


def state_dict_to_official(
    state_dict: Mapping[str, Tensor], layers: Collection[int] | None = None
) -> dict[str, Tensor]:
    """The inverse of `state_dict_from_official`.

    Args:
        state_dict: parameters of a p-MoD LLaVA or `LlamaForCausalLM`.
        layers: indices of the routed layers; None = those that have a router in `state_dict`.

    Raises:
        ValueError: keys are unknown; the message lists them.
    """
    multimodal = any(key.startswith("model.language_model.") for key in state_dict)
    multimodal |= any(key.startswith("model.multi_modal_projector.") for key in state_dict)
    decoder = _decoder_prefix(multimodal)
    if layers is None:
        routers = (key.split(".") for key in state_dict if ".mod_router." in key)
        layers = {int(parts[parts.index("layers") + 1]) for parts in routers}
    rename = functools.partial(_to_official_key, decoder=decoder, routed=frozenset(layers))
    return _renamed(state_dict, rename)


def _parse_layers(text: Any, official: Mapping[str, Any]) -> dict[str, Any]:
    parts = text.split("_") if isinstance(text, str) else []
    if len(parts) == 4 and parts[0] in CURVES and parts[1] == "decay":
        return {
            "schedule": CURVES[parts[0]],
            "max_ratio": _number("mod_target_layers", parts[2]),
            "min_ratio": _number("mod_target_layers", parts[3]),
            "decay_depth": OFFICIAL_DEPTH,
        }
    constant = {"schedule": "constant", "max_ratio": 1.0, "min_ratio": 0.0}
    if text in ("deep_all", "deep_all_include_last", "interleave"):
        return {**constant, "layers": _layer_set(text, _get(official, "num_hidden_layers"))}
    wanted = (
        "shiftedcos_decay_MAX_MIN, shiftedlinear_decay_MAX_MIN, deep_all, deep_all_include_last"
    )
    _fail("mod_target_layers", f"{wanted} or interleave", text)


def _layer_set(kind: str, num_layers: int) -> tuple[int, ...]:
    if kind == "interleave":
        return tuple(range(1, num_layers, 2))
    return tuple(range(2, num_layers if kind == "deep_all_include_last" else num_layers - 1))


def _write_layers(config: PModConfig, num_layers: int | None) -> str:
    if config.schedule == "constant" and config.layers is not None and num_layers is not None:
        for kind in ("deep_all", "deep_all_include_last", "interleave"):
            if tuple(config.layers) == _layer_set(kind, num_layers):
                return kind
    curves = {ours: theirs for theirs, ours in CURVES.items()}
    if (
        not isinstance(config.schedule, str)
        or config.schedule not in curves
        or config.layers is not None
    ):
        known = "shifted_cosine, shifted_linear, or constant on deep_all or interleave layers"
        _fail("schedule", f"{known} (with num_layers)", config.schedule)
    depth = config.decay_depth or (None if num_layers is None else num_layers - 1)
    if depth != OFFICIAL_DEPTH:
        _fail("decay_depth", f"{OFFICIAL_DEPTH}, which the official code hard-codes", depth)
    bounds = f"{_write_number(config.max_ratio)}_{_write_number(config.min_ratio)}"
    return f"{curves[config.schedule]}_decay_{bounds}"


def _parse_gate(text: Any) -> tuple[str, float, float]:
    parts = text.split("_") if isinstance(text, str) else []
    if len(parts) not in (1, 3) or parts[0] not in ("tanh", "sigmoid", "softmax", "none"):
        _fail(
            "mod_weight_norm", "tanh, sigmoid, softmax or none, alone or as NAME_SCALE_BIAS", text
        )
    if len(parts) == 1:
        return parts[0], 1.0, 1.0
    return parts[0], _number("mod_weight_norm", parts[1]), _number("mod_weight_norm", parts[2])


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        _fail(name, "numbers between underscores", text)


def _write_number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _decoder_prefix(multimodal: bool) -> str:
    return "model.language_model." if multimodal else "model."


def _from_official_key(key: str, decoder: str) -> str | None:
    if key in ("lm_head.weight", "model.image_newline"):
        return key
    if key in ("model.embed_tokens.weight", "model.norm.weight"):
        return decoder + key.removeprefix("model.")
    if key.startswith(OFFICIAL_VISION):
        return _vision_prefix() + key.removeprefix(OFFICIAL_VISION)
    parts = key.split(".")
    if parts[:2] == ["model", "mm_projector"] and len(parts) == 4 and parts[2] in PROJECTOR:
        return f"model.multi_modal_projector.{PROJECTOR[parts[2]]}.{parts[3]}"
    if parts[:2] == ["model", "layers"] and len(parts) > 4 and parts[2].isdigit():
        rest = parts[4:] if parts[3] == "decoder_layer" else parts[3:]
        if parts[3] == "router":
            if parts[4:] not in (["router", "weight"], ["router", "bias"]):
                return None
            rest = ["mod_router", parts[5]]
        return f"{decoder}layers.{parts[2]}.{'.'.join(rest)}" if _is_layer_part(rest[0]) else None
    return None


def _to_official_key(key: str, decoder: str, routed: frozenset[int]) -> str | None:
    if key in ("lm_head.weight", "model.image_newline"):
        return key
    if key in (f"{decoder}embed_tokens.weight", f"{decoder}norm.weight"):
        return "model." + key.removeprefix(decoder)
    if key.startswith("model.vision_tower."):
        rest = key.removeprefix("model.vision_tower.").removeprefix("vision_model.")
        return OFFICIAL_VISION + rest
    projector = {ours: theirs for theirs, ours in PROJECTOR.items()}
    parts = key.split(".")
    if parts[:2] == ["model", "multi_modal_projector"] and parts[2] in projector:
        return f"model.mm_projector.{projector[parts[2]]}.{parts[3]}"
    if not key.startswith(f"{decoder}layers."):
        return None
    index, *rest = key.removeprefix(f"{decoder}layers.").split(".")
    if not index.isdigit() or not rest or not _is_layer_part(rest[0]):
        return None
    if rest[0] == "mod_router":
        return f"model.layers.{index}.router.router.{rest[1]}"
    wrapper = "decoder_layer." if int(index) in routed else ""
    return f"model.layers.{index}.{wrapper}{'.'.join(rest)}"


def _is_layer_part(name: str) -> bool:
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "mod_router")
    return name in parts


def _renamed(
    state_dict: Mapping[str, Tensor], rename: Callable[[str], str | None]
) -> dict[str, Tensor]:
    names = {key: rename(key) for key in state_dict}
    unknown = sorted(key for key, name in names.items() if name is None)
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ValueError(
            "convert: state_dict: expected parameters of a p-MoD checkpoint,"
            f" got {len(unknown)} unknown: {', '.join(unknown[:SHOWN])}{more}"
        )
    return {str(names[key]): value for key, value in state_dict.items()}


@functools.cache
def _vision_prefix() -> str:
    """Where the installed transformers keeps CLIP's parameters; older releases nest them more."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tiny = CLIPVisionConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    with torch.device("meta"):
        nested = any(key.startswith("vision_model.") for key in CLIPVisionModel(tiny).state_dict())
    return "model.vision_tower." + ("vision_model." if nested else "")


def _get(official: Mapping[str, Any], key: str) -> Any:
    if key not in official:
        _fail(key, "a key of the official config", "none")
    return official[key]


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"convert: {name}: expected {expected}, got {got}")
