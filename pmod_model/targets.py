"""Which tokens compete, when the caller does not say: those of images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmod_model.configuration import PModConfig

if TYPE_CHECKING:
    from pmod_model.images import ImageTokens


def vision_token_ids(model_config: Any) -> tuple[int, ...]:
    """Placeholder ids of images and videos in `input_ids`."""
    names = ("image_token_id", "video_token_id")
    ids = (getattr(model_config, name, None) for name in names)
    return tuple(token for token in ids if token is not None)


def tokens_per_image(model_config: Any) -> int | None:
    """Tokens of an image if all have the same number (LLaVA-1.5), else None."""
    return None if has_high_resolution(model_config) else tokens_per_view(model_config)


def tokens_per_view(model_config: Any) -> int | None:
    """Tokens of a crop in LLaVA: the image of LLaVA-1.5, the base view of LLaVA-NeXT; else None."""
    strategy = getattr(model_config, "vision_feature_select_strategy", None)
    vision = getattr(model_config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if strategy is None or not (isinstance(size, int) and isinstance(patch, int)):
        return None
    has_class_token = getattr(vision, "model_type", "") == "clip_vision_model"
    return (size // patch) ** 2 + (strategy == "full" and has_class_token)


def has_high_resolution(model_config: Any) -> bool:
    """Whether images are cut into a base view and a high-resolution map (LLaVA-NeXT)."""
    return getattr(model_config, "image_grid_pinpoints", None) is not None


def has_mrope(decoder_config: Any) -> bool:
    """Whether positions have three dimensions (Qwen-VL)."""
    return "mrope_section" in (getattr(decoder_config, "rope_parameters", None) or {})


def derive_target_mask(
    model_config: Any,
    config: PModConfig,
    inputs: Mapping[str, Any],
    cache: Any,
    images: ImageTokens | None = None,
) -> Tensor | None:
    """The mask, bool [B, S], from the inputs of a multimodal model; None = nothing competes.

    A single token, and tokens that follow a prompt in `cache` without new images, are being decoded
    and never routed. With `target_tokens="all"`, every token competes if the batch holds an image,
    text-only sequences included, as in the authors' code. With "vision_high_res", the base views of
    LLaVA-NeXT do not compete, the newlines of its high-resolution maps do.

    Args:
        model_config: the config of the multimodal model.
        config: the settings.
        inputs: what its forward pass gets, by name.
        cache: the key-value cache among them, or None.
        images: where the images of LLaVA are, if that could be told.

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
        if images is not None:
            return images.high_resolution()
        if has_vision:
            raise ValueError(
                "target_mask: expected bool [B, S], because the inputs do not tell which tokens of"
                f" {type(model_config).__name__} are of high resolution, got None"
            )
        return None
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
