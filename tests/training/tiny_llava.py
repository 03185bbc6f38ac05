"""A p-MoD LLaVA in miniature with a real processor, and easy-VQA batches for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from pmod_model import PModConfig, PModLlavaConfig
from pmod_model.data.collators import Collator
from pmod_model.data.dataset import ConversationDataset
from pmod_model.data.easyvqa import easy_vqa_records
from pmod_model.data.processor import build_processor
from pmod_model.data.records import Record
from pmod_model.training.models import build_model
from pmod_model.training.preset import Preset

IGNORED = -100
SIZES = Preset(image_size=32, patch_size=8, hidden_size=64, layers=4)
IMAGE_TOKENS = 16
# routed and keeping all, routed and keeping none, routed, dense
SCHEDULE = PModConfig(schedule=[1.0, 0.0, 0.5, None], max_ratio=1.0)
ROUTED = 3


@functools.cache
def records() -> tuple[list[Record], Path]:
    found, folder = easy_vqa_records("train")
    return found[:16], folder


@functools.cache
def processor() -> Any:
    return build_processor(records()[0], SIZES.image_size, SIZES.patch_size)


def make_model(pmod: PModConfig | None = SCHEDULE, sizes: Preset = SIZES) -> Any:
    """Always the same weights; routers that prefer some tokens, since those of a new model tie."""
    torch.manual_seed(0)
    model = build_model(sizes, processor(), pmod)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "mod_router" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return model.train()


def pmod_config(folder: Path) -> PModLlavaConfig:
    """The config of a plain LLaVA with the settings of these tests."""
    return PModLlavaConfig(pmod=SCHEDULE, **AutoConfig.from_pretrained(folder).to_dict())


def freeze_vision(model: Any) -> Any:
    """As in the paper's recipe; the last layers of the tower are unused and would get no gradient."""
    model.model.vision_tower.requires_grad_(False)
    return model


def checkpoint_layers(model: Any, *, use_reentrant: bool) -> Any:
    # the second name is that of older releases
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    return model


def dataset(turns: int = 2) -> ConversationDataset:
    found, folder = records()
    return ConversationDataset(found, folder, processor(), max_turns=turns)


def collator() -> Collator:
    return Collator(processor().tokenizer.pad_token_id)


def image_batch(indices: Sequence[int]) -> dict[str, Tensor]:
    rows = dataset()
    return collator()([rows[index] for index in indices])


def text_batch(indices: Sequence[int]) -> dict[str, Tensor]:
    """The same conversations without their images."""
    token = processor().image_token_id
    features = []
    for index in indices:
        row = dataset()[index]
        text = row["input_ids"] != token
        features.append({"input_ids": row["input_ids"][text], "labels": row["labels"][text]})
    return collator()(features)


def with_blank_image(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A blank image after the first row, masked: the tower and projector run, and nothing changes.

    A batch with images stays as it is.
    """
    if "pixel_values" in batch:
        return batch
    fill = {
        "input_ids": (processor().image_token_id, processor().tokenizer.pad_token_id),
        "attention_mask": (0, 0),
        "labels": (IGNORED, IGNORED),
    }
    padded = {}
    for name, (first, others) in fill.items():
        added = batch[name].new_full((len(batch[name]), IMAGE_TOKENS), others)
        added[0] = first
        padded[name] = torch.cat((batch[name], added), dim=1)
    side = SIZES.image_size
    return padded | {"pixel_values": torch.zeros(1, 3, side, side)}


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of what is trained; a parameter without one is left out."""
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
