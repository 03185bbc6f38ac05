"""Which image tokens each layer of a LLaVA keeps, and where in the image they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaModel, LlavaNextModel, PreTrainedModel

from pmod_model.inject import find_decoder, record_routing
from pmod_model.report.pictures import model_view
from pmod_model.targets import tokens_per_view

MAP_PIXELS = 672  # the larger side of the picture under a high-resolution map


@dataclass(frozen=True, eq=False)
class Region:
    """A grid of tokens over a picture.

    Attributes:
        name: what it is a view of.
        picture: what its tokens were made of.
        tokens: int64 [rows, columns], the place of each among the tokens of the image.
    """

    name: str
    picture: Image.Image
    tokens: Tensor


def record_kept(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Run one prompt with one image: for each routed layer, bool [N], the image tokens it kept.

    Those that never compete (base views with `target_tokens` "vision_high_res") are kept.

    Args:
        model: a p-MoD model; a dense one has no routed layer.
        inputs: input_ids [S] and images, from `encode_prompt`.
    """
    ids = inputs["input_ids"]
    vision = ids == model.config.image_token_id
    batch = {**inputs, "input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if not hasattr(find_decoder(model), "pmod_ratios"):
        return {}
    with torch.inference_mode(), record_routing(model) as records:
        model(**batch)
    if not records:
        return {}
    skippable = records[0].target_mask[0, vision]
    return {layer: mask[0, vision] | ~skippable for layer, mask in sorted(records[0].kept.items())}


def image_regions(
    model: PreTrainedModel, processor: Any, inputs: Mapping[str, Tensor], image: Image.Image
) -> list[Region] | None:
    """Where the tokens of an image are: the image of LLaVA-1.5; the views of LLaVA-NeXT.

    The newlines after the rows of a high-resolution map are at no place in the image.

    Args:
        model: a LLaVA.
        processor: its processor.
        inputs: what the processor made of the image.
        image: the image itself.

    Returns:
        One region, or two, or None if the layout of the tokens is not known.
    """
    owner = next((m for m in model.modules() if isinstance(m, (LlavaModel, LlavaNextModel))), None)
    length = None if owner is None else tokens_per_view(model.config)
    if owner is None or length is None:
        return None
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    # a class token, where it is among the features, comes first
    square = torch.arange(length - side * side, length).view(side, side)
    settings = processor.image_processor
    pixels = inputs["pixel_values"][0]
    cut = isinstance(owner, LlavaNextModel)
    seen = model_view(pixels[0] if cut else pixels, settings.image_mean, settings.image_std)
    regions = [Region("base view" if cut else "image", seen, square)]
    if cut:
        height, width = inputs["image_sizes"][0].tolist()
        tokens = map_tokens(owner, (height, width), length)
        if tokens is not None:
            whole = image.copy()
            whole.thumbnail((MAP_PIXELS, MAP_PIXELS))
            regions.append(Region("high-resolution map", whole, tokens))
    return regions


def map_tokens(model: nn.Module, image_size: tuple[int, int], base: int) -> Tensor | None:
    """The high-resolution map of LLaVA-NeXT: int64 [rows, columns], places among all its tokens.

    Found by packing features of zeros with newlines of ones.

    Args:
        model: a `LlavaNextModel`.
        image_size: height and width of the image in pixels.
        base: tokens of the base view, which come first.

    Returns:
        The places; None if the image has a base view alone.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    owner: Any = model
    config = owner.config
    crops = image_size_to_num_patches(
        image_size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    packed, _ = owner.pack_image_features(
        [torch.zeros(crops, base, 1)],
        [image_size],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=torch.ones(1),
    )
    newline = packed[0][:, 0] == 1
    rows = int(newline[base:].sum())
    if rows == 0 or bool(newline[base]):
        return None
    places = torch.arange(base, len(newline)).view(rows, -1)
    return places[:, :-1]
