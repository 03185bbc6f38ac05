"""Configs and processors of the authors' LLaVA models and of ours, one from the other.

`pmod_model.convert` has the p-MoD settings and the names of parameters, this module the rest of an
official `config.json`: the backbone, the vision tower, and what is done to images.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
)

from pmod_model.convert import config_from_official, config_to_official
from pmod_model.llava import PModLlavaConfig
from pmod_model.llava_next import PModLlavaNextConfig, PModLlavaNextProcessor
from pmod_model.schedule import layer_ratios

MODEL_TYPE, ARCHITECTURE = "pmod_llava_llama", "PmodLlavaLlamaForCausalLM"
IMAGE = "<image>"
FEATURES = {"patch": "default", "cls_patch": "full"}
# the vision tower of every released model; its sizes are in no official config.json
RELEASED_TOWER = "openai/clip-vit-large-patch14-336"
RELEASED_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAMA_FIELDS = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "pretraining_tp",
    "use_cache",
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# a Vicuna conversation as LLaVA is trained on it ("v1")
CHAT_TEMPLATE = (
    "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant"
    " gives helpful, detailed, and polite answers to the user\\'s questions. ' }}"
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


def released_tower() -> CLIPVisionConfig:
    """The vision tower that official checkpoints name."""
    sizes: dict[str, Any] = RELEASED_SIZES
    return CLIPVisionConfig(**sizes)


def is_next(official: Mapping[str, Any]) -> bool:
    """Whether an official config is of LLaVA-NeXT rather than LLaVA-1.5.

    Raises:
        ValueError: it is of neither.
    """
    aspect, merge = official.get("image_aspect_ratio"), official.get("mm_patch_merge_type", "flat")
    if aspect == "anyres" and merge == "spatial_unpad":
        return True
    if aspect in (None, "pad", "square") and merge == "flat":
        return False
    known = "anyres with spatial_unpad (LLaVA-NeXT), or pad or square with flat (LLaVA-1.5)"
    _fail("image_aspect_ratio", known, f"{aspect} with {merge}")


def model_config(
    official: Mapping[str, Any], vision: CLIPVisionConfig, image_token_id: int, vocab_size: int
) -> PModLlavaConfig | PModLlavaNextConfig:
    """The config of the converted model.

    Args:
        official: an official `config.json`.
        vision: the config of its vision tower.
        image_token_id: placeholder of images, which the official code has none of.
        vocab_size: rows of the embedding, those of the placeholder included.

    Raises:
        ValueError: the official config has what transformers' LLaVA has not; the message names it.
    """
    for name, value in (("model_type", MODEL_TYPE), ("mm_projector_type", "mlp2x_gelu")):
        if official.get(name) != value:
            _fail(name, value, official.get(name))
    feature = official.get("mm_vision_select_feature", "patch")
    if feature not in FEATURES:
        _fail("mm_vision_select_feature", " or ".join(FEATURES), feature)
    fields: dict[str, Any] = {name: official[name] for name in LLAMA_FIELDS if name in official}
    rope = {name: official.get(name) for name in ("rope_theta", "rope_scaling")}
    fields |= {name: value for name, value in rope.items() if value is not None}
    text = LlamaConfig(**{**fields, "vocab_size": vocab_size})
    shared: dict[str, Any] = {
        "pmod": config_from_official(official),
        "text_config": text,
        "vision_config": vision,
        "image_token_index": image_token_id,
        "vision_feature_layer": official.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": FEATURES[feature],
        "tie_word_embeddings": bool(official.get("tie_word_embeddings", False)),
    }
    if not is_next(official):
        return PModLlavaConfig(**shared)
    return PModLlavaNextConfig(
        **shared,
        image_grid_pinpoints=_grids(official),
        max_num_patches=official.get("max_num_patches"),
    )


def image_processor(official: Mapping[str, Any], vision: CLIPVisionConfig) -> Any:
    """What the official code does to images: with Pillow the same pixels, bit by bit."""
    side = vision.image_size
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    if not is_next(official):
        return LlavaImageProcessorPil(**sizes, do_pad=official.get("image_aspect_ratio") == "pad")
    # not at the top: older transformers import it with torchvision only
    from transformers import LlavaNextImageProcessorPil

    return LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=_grids(official))


def build_processor(official: Mapping[str, Any], config: Any, tokenizer: Any) -> Any:
    """The processor of the converted model, with the chat format that LLaVA is trained on."""
    options: dict[str, Any] = {
        "image_processor": image_processor(official, config.vision_config),
        "tokenizer": tokenizer,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # the class token of CLIP
        "chat_template": getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE,
    }
    if not is_next(official):
        return LlavaProcessor(**options)
    most = official.get("max_num_patches")
    if most is None:
        return LlavaNextProcessor(**options)
    return PModLlavaNextProcessor(**options, max_num_patches=most)


def official_config(
    model: PreTrainedModel, vocab_size: int, vision_tower: str | None, pads: bool, max_length: int
) -> dict[str, Any]:
    """An official `config.json` for a p-MoD LLaVA.

    Args:
        model: a p-MoD LLaVA-1.5 or LLaVA-NeXT with Llama and CLIP.
        vocab_size: rows of the embedding without the placeholder of images.
        vision_tower: name or path of the vision tower for the official code; None = the released
            one, if the sizes are its own.
        pads: whether LLaVA-1.5 pads images to a square.
        max_length: longest sequence in tokens.

    Raises:
        ValueError: the official code cannot express the model.
    """
    config: Any = model.config
    text, vision = config.text_config, config.vision_config
    rope = dict(text.rope_parameters)
    if text.model_type != "llama" or vision.model_type != "clip_vision_model":
        _fail("model", "Llama and CLIP", f"{text.model_type} and {vision.model_type}")
    if rope.get("rope_type") != "default":
        _fail("rope_parameters", "rope_type default", rope.get("rope_type"))
    if vision_tower is None and any(
        getattr(vision, name) != value for name, value in RELEASED_SIZES.items()
    ):
        _fail("vision_tower", "a name, since the tower is not the released one", None)
    pmod: Any = model.pmod_config
    features = {ours: theirs for theirs, ours in FEATURES.items()}
    grids = getattr(config, "image_grid_pinpoints", None)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: getattr(text, name) for name in LLAMA_FIELDS},
        "vocab_size": vocab_size,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        **config_to_official(pmod, text.num_hidden_layers),
        "mod_special_init": True,
        "mod_target_layer_indices": sorted(layer_ratios(pmod, text.num_hidden_layers)),
        "mm_vision_tower": vision_tower or RELEASED_TOWER,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,  # so that the official code reads its weights from here
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if grids else "pad" if pads else "square",
        "mm_patch_merge_type": "spatial_unpad" if grids else "flat",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": max_length,
        **({"image_grid_pinpoints": _swapped(grids)} if grids else {}),
        **({"max_num_patches": getattr(config, "max_num_patches", None)} if grids else {}),
    }


def _grids(official: Mapping[str, Any]) -> list[list[int]]:
    grids = official.get("image_grid_pinpoints")
    try:
        grids = ast.literal_eval(grids) if isinstance(grids, str) else grids
        return _swapped(grids)
    except (ValueError, SyntaxError, TypeError):
        _fail("image_grid_pinpoints", "a list of [width, height]", grids)


def _swapped(grids: Any) -> list[list[int]]:
    """[width, height] of the authors, [height, width] of transformers, in an order that decides."""
    return [[int(second), int(first)] for first, second in grids]


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"convert: {name}: expected {expected}, got {got}")
