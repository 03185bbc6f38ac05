"""Published model sizes by name, and models without weights: to count needs no download."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from pmod_model.configuration import PModConfig
from pmod_model.inject import inject_pmod
from pmod_model.llava import PModLlavaConfig
from pmod_model.llava_next import PModLlavaNextConfig

# CLIP ViT-L/14 at 336 pixels: 24 x 24 tokens a crop
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# Vicuna 7B v1.5; the placeholder of images is no row of its embedding, as in the authors' code
TEXT = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _llava(pmod: PModConfig) -> PModLlavaConfig:
    return PModLlavaConfig(pmod=pmod, **_shared())


def _llava_next(pmod: PModConfig) -> PModLlavaNextConfig:
    return PModLlavaNextConfig(pmod=pmod, image_grid_pinpoints=GRIDS, **_shared())


def _shared() -> dict[str, Any]:
    return {
        "vision_config": dict(VISION),
        "text_config": dict(TEXT),
        "image_token_id": TEXT["vocab_size"],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "dtype": torch.bfloat16,
    }


PRESETS: dict[str, Callable[[PModConfig], Any]] = {
    "llava-1.5-7b": _llava,
    "llava-next-7b": _llava_next,
}


def preset_config(name: str, pmod: PModConfig | None = None) -> Any:
    """The config of a p-MoD model of published size; `pmod` None = the settings of the paper.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name](pmod or PModConfig())


def build_from_config(
    config: Any, pmod: PModConfig | None, device: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A p-MoD model of this config in evaluation mode: random weights, or none on "meta".

    Args:
        config: of a language model or of one of images and text.
        pmod: settings for a config that has none, ignored by one that has its own.
        device: where the parameters are made.
        dtype: of the parameters; None = that of the config, or float32.

    Raises:
        ValueError: transformers has no such model, or routers do not fit it.
    """
    multimodal = config.get_text_config() is not config
    factory: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    own = getattr(config, "pmod", None)
    settings = pmod or PModConfig() if own is None else PModConfig.from_dict(own)
    config = copy.deepcopy(config)  # injection writes the settings into it
    with torch.device(device):
        model = factory.from_config(config, dtype=dtype or config.dtype or torch.float32)
        if not hasattr(model, "pmod_config"):
            inject_pmod(model, settings)
    return model.eval()
