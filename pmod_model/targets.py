"""Which tokens compete, when the caller does not say: those of images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pmod_model.configuration import PModConfig


def vision_token_ids(model_config: Any) -> tuple[int, ...]:
    """Placeholder ids of images and videos in `input_ids`."""
    names = ("image_token_id", "video_token_id")
    ids = (getattr(model_config, name, None) for name in names)
    return tuple(token for token in ids if token is not None)


def tokens_per_image(model_config: Any) -> int | None:
    """Tokens of an image if all have the same number (LLaVA-1.5), else None."""
    strategy = getattr(model_config, "vision_feature_select_strategy", None)
    vision = getattr(model_config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if has_high_resolution(model_config) or strategy is None:
        return None
    if not (isinstance(size, int) and isinstance(patch, int)):
        return None
    has_class_token = getattr(vision, "model_type", "") == "clip_vision_model"
    return (size // patch) ** 2 + (strategy == "full" and has_class_token)


def has_high_resolution(model_config: Any) -> bool:
    """Whether images are cut into a base view and a high-resolution map (LLaVA-NeXT)."""
    return getattr(model_config, "image_grid_pinpoints", None) is not None


def derive_target_mask(
    model_config: Any, config: PModConfig, inputs: Mapping[str, Any], cache: Any
) -> Tensor | None:
    """The mask, bool [B, S], from the inputs of a multimodal model; None = nothing competes.

    A single token, and tokens that follow a prompt in `cache` without new images, are being decoded
    and never routed. With `target_tokens="all"`, every token competes if the batch holds an image,
    text-only sequences included, as in the authors' code.

    Raises:
        ValueError: the mask cannot be derived and must be given.
    """
    token_ids = vision_token_ids(model_config)
    if not token_ids:
        return None
    input_ids = inputs.get("input_ids")
    has_vision = any(_is_vision(name, value) for name, value in inputs.items())
    if input_ids is None:
        if has_vision:
            raise ValueError(
                "target_mask: expected bool [B, S] where inputs_embeds come with images, got None"
            )
        return None
    if input_ids.shape[1] == 1:  # before the cache is asked, which may wait for the device
        return None
    if cache is not None and not has_vision and bool(cache.get_seq_length() > 0):
        return None
    if config.target_tokens == "vision_high_res" and has_high_resolution(model_config):
        raise ValueError(
            "target_mask: expected bool [B, S], because input_ids do not tell which tokens of"
            f" {type(model_config).__name__} are of high resolution, got None"
        )
    vision = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in token_ids:
        vision |= input_ids == token
    if config.target_tokens == "all":
        return vision.any().expand_as(vision)
    return vision


def _is_vision(name: str, value: Any) -> bool:
    if name.startswith("pixel_values"):
        return value is not None
    return name == "mm_encoder_outputs" and bool(value)
