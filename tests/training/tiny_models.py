"""Tiny LLaVA-1.5 and LLaVA-NeXT, p-MoD and dense, and encoded conversations for them."""

from __future__ import annotations

from typing import Any

import torch
from model.conftest import IMAGE, RATIOS, TEXT, VISION, llava_config, make_opinionated
from model.llava_next import GRIDS, LENGTHS, SIDE, SIZES, make_next
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from pmod_model import PModConfig, inject_pmod

Feature = dict[str, Tensor]
KINDS = ["pmod-llava", "pmod-next", "dense-llava", "dense-next"]


def make_model(kind: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    if kind == "pmod-next":
        model = make_next()
    elif kind == "dense-next":
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            image_grid_pinpoints=GRIDS,
        )
        model = make_opinionated(LlavaNextForConditionalGeneration(config))
    else:
        model = LlavaForConditionalGeneration(llava_config())
        if kind == "pmod-llava":
            inject_pmod(model, PModConfig(schedule=RATIOS))
        model = make_opinionated(model)
    model.set_attn_implementation(attention)
    return model.train()


def feature(kind: str, text: list[int], images: list[int]) -> Feature:
    """`text` with images, of the sizes `images` numbers, after its first token."""
    generator = torch.Generator().manual_seed(sum(text))
    following = kind.endswith("next")
    run = [IMAGE] * sum(LENGTHS[i] if following else 16 for i in images)
    ids = torch.tensor([text[0], *run, *text[1:]])
    labels = ids.masked_fill(ids == IMAGE, -100)
    made = {"input_ids": ids, "labels": labels}
    if images and following:
        made["pixel_values"] = torch.randn(len(images), 5, 3, SIDE, SIDE, generator=generator)
        made["image_sizes"] = torch.tensor([SIZES[i] for i in images])
    elif images:
        made["pixel_values"] = torch.randn(len(images), 3, SIDE, SIDE, generator=generator)
    return made


def dummy(kind: str) -> Feature:
    """A masked image, as `dummy_image` makes it of a processor."""
    made = feature(kind, [1], [1])
    del made["labels"]
    made["input_ids"] = made["input_ids"][1:]
    return made


def ragged(kind: str) -> list[Feature]:
    """One image, two images, none."""
    return [
        feature(kind, [5, 6, 7, 8, 9, 10], [0]),
        feature(kind, [11, 12, 13, 14], [1, 0]),
        feature(kind, [20, 21, 22, 23, 24, 25], []),
    ]


def text_only(kind: str) -> list[Feature]:
    return [feature(kind, [5, 6, 7, 8, 9], []), feature(kind, [11, 12, 13], [])]


def as_dtype(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return batch
