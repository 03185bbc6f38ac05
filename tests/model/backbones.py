"""Backbones other than LLaVA: tiny random models of the classes of transformers, and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from model.conftest import IMAGE, PAD, TEXT
from torch import Tensor
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VIDEO, VISION_START, VISION_END = 121, 118, 119
SPECIAL = [PAD, VISION_START, VISION_END, IMAGE, VIDEO]
Row = dict[str, Tensor]


@dataclass(frozen=True)
class Backbone:
    """A model, and two prompts for it that differ in length and in what may be skipped.

    A prompt has ids and masks [1, S]; everything else of it (pixels, sizes) has an entry per image.
    """

    model: Any
    rows: list[Row]

    def batch(self) -> Row:
        """Both prompts, left padded."""
        return pad_left(self.rows)


def pad_left(rows: list[Row]) -> Row:
    length = max(row["input_ids"].shape[1] for row in rows)

    def padded(row: Row, name: str) -> Tensor:
        value = row[name]
        if value.shape[:2] != row["input_ids"].shape:
            return value
        return torch.nn.functional.pad(value, (length - value.shape[1], 0))  # PAD and False are 0

    return {name: torch.cat([padded(row, name) for row in rows]) for name in rows[0]}


def prompt(*ids: int) -> Row:
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def text_rows() -> list[Row]:
    """16 of 20 and 8 of 13 tokens may be skipped."""
    ids = torch.randint(5, 100, (33,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [prompt(*ids[:20]), prompt(*ids[20:])]
    for row, target in zip(rows, (slice(2, 18), slice(1, 9)), strict=True):
        row["target_mask"] = torch.zeros_like(row["input_ids"], dtype=torch.bool)
        row["target_mask"][0, target] = True
    return rows


def text(cls: Any, config: Any) -> Callable[[], Backbone]:
    return lambda: Backbone(cls(config), text_rows())


def qwen_rows() -> list[Row]:
    """An image of 8 tokens; one of 8 and one of 4."""
    image = [VISION_START, *[IMAGE] * 8, VISION_END]
    small = [VISION_START, *[IMAGE] * 4, VISION_END]
    rows = [prompt(5, *image, 7, 8, 9), prompt(*image, 10, 11, *small, 12, 13)]
    for row, grid in zip(rows, ([[1, 4, 8]], [[1, 8, 4], [1, 4, 4]]), strict=True):
        row["mm_token_type_ids"] = (row["input_ids"] == IMAGE).int()
        row["image_grid_thw"] = torch.tensor(grid)
        patches = int(row["image_grid_thw"].prod(-1).sum())
        row["pixel_values"] = torch.randn(patches, 3 * 2 * 14 * 14)
    return rows


QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
ROPE: dict[str, Any] = {"mrope_section": [2, 3, 3], "rope_type": "default"}


def qwen2_5_vl() -> Backbone:
    config = Qwen2_5_VLConfig(
        vision_config={
            **QWEN_VISION,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "in_chans": 3,
        },
        text_config={**TEXT, "rope_scaling": {**ROPE, "type": "mrope"}},
        **QWEN_TOKENS,
    )
    return Backbone(Qwen2_5_VLForConditionalGeneration(config), qwen_rows())


def qwen3_vl() -> Backbone:
    config = Qwen3VLConfig(
        vision_config={
            **QWEN_VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],  # added to the hidden states after layers 0 and 1
            "in_channels": 3,
        },
        text_config={**TEXT, "head_dim": 16, "rope_scaling": {**ROPE, "mrope_interleaved": True}},
        **QWEN_TOKENS,
    )
    return Backbone(Qwen3VLForConditionalGeneration(config), qwen_rows())


def llava_onevision() -> Backbone:
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[56, 56], [28, 56], [56, 28]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model: Any = LlavaOnevisionForConditionalGeneration(config)
    rows = []
    for size, before, after in (([56, 56], [5, 6], [7, 8]), ([56, 40], [9], [10, 11])):
        vision = {
            "pixel_values": torch.randn(1, 5, 3, 28, 28),
            "image_sizes": torch.tensor([size]),
        }
        with torch.no_grad():
            (features,) = model.get_image_features(**vision, return_dict=True).pooler_output
        rows.append({**prompt(*before, *[IMAGE] * len(features), *after), **vision})
    return Backbone(model, rows)


def internvl() -> Backbone:
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [112, 112],
            "patch_size": [14, 14],
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    image = [IMAGE] * 16
    rows = [prompt(5, 6, *image, 7, 8), prompt(9, *image, *image, 10, 11)]
    for images, row in enumerate(rows, start=1):
        row["pixel_values"] = torch.randn(images, 3, 112, 112)
    return Backbone(InternVLForConditionalGeneration(config), rows)


TEXT_BACKBONES: dict[str, Callable[[], Backbone]] = {
    "llama": text(LlamaForCausalLM, LlamaConfig(**TEXT)),
    "mistral": text(MistralForCausalLM, MistralConfig(**TEXT, sliding_window=None)),
    "qwen2": text(Qwen2ForCausalLM, Qwen2Config(**TEXT)),
    "qwen3": text(Qwen3ForCausalLM, Qwen3Config(**TEXT, head_dim=16)),
    "phi3": text(Phi3ForCausalLM, Phi3Config(**TEXT, sliding_window=None)),
    "granite": text(
        GraniteForCausalLM,
        GraniteConfig(**TEXT, residual_multiplier=0.3, attention_multiplier=0.25),
    ),
}
VISION_BACKBONES: dict[str, Callable[[], Backbone]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
}
