"""A tiny LLaVA-NeXT, and a batch for it whose image tokens are written out."""

from __future__ import annotations

from typing import Any

import torch
from model.conftest import IMAGE, PAD, RATIOS, TEXT, VISION, make_opinionated
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from pmod_model import PModConfig, PModLlavaNextConfig, PModLlavaNextForConditionalGeneration

SIDE = 56
BASE = 16  # tokens of a crop
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
SIZES = [[100, 112], [40, 150]]  # (height, width) of two images
LENGTHS = [BASE + 8 * 9, BASE + 4 * 13]


def make_next(max_num_patches: int | None = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = PModLlavaNextConfig(
        pmod=PModConfig(**{"schedule": RATIOS, **fields}),
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=GRIDS,
        max_num_patches=max_num_patches,
    )
    model: Any = make_opinionated(PModLlavaNextForConditionalGeneration(config))
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def make_batch(
    rows: list[list[int]], sizes: list[list[int]], left: bool = False
) -> dict[str, Tensor]:
    """Padded rows, and pixels of as many crops as the largest grid has."""
    length = max(map(len, rows))
    pads = [[PAD] * (length - len(row)) for row in rows]
    padded = [pad + row if left else row + pad for pad, row in zip(pads, rows, strict=True)]
    ids = torch.tensor(padded)
    pixels = torch.randn(len(sizes), 5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
    }


def images_of(count: int) -> list[int]:
    return [IMAGE] * count


def ragged_images() -> dict[str, Tensor]:
    """Two images that adjoin, text only, and one image."""
    first, second = (images_of(length) for length in LENGTHS)
    rows = [[5, *first, *second, 6, 7], [20, 21, 22], [8, 9, *second, 10, 11, 12]]
    return make_batch(rows, [*SIZES, SIZES[1]])


def views(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The image and the offset in it of every image token of `ragged`, written out."""
    image, offset = torch.zeros(2, *batch["input_ids"].shape, dtype=torch.int64)
    starts = [(0, 1, 0, LENGTHS[0]), (0, 1 + LENGTHS[0], 1, LENGTHS[1]), (2, 2, 2, LENGTHS[1])]
    for row, start, number, length in starts:
        image[row, start : start + length] = number
        offset[row, start : start + length] = torch.arange(length)
    return image, offset
