"""From a conversation to token ids and labels, with any processor that has a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pmod_model.data.errors import InputError
from pmod_model.data.records import Turn, messages_of

IGNORED = -100


def encode_prompt(processor: Any, turn: Turn, image: Image.Image | None) -> dict[str, Tensor]:
    """Inputs of one question, up to where its answer begins: input_ids int64 [S], pixel_values."""
    text = processor.apply_chat_template(messages_of([turn])[:1], add_generation_prompt=True)
    return _process(processor, text, [] if image is None else [image])


def encode_conversation(
    processor: Any, turns: Sequence[Turn], images: Sequence[Image.Image], place: str
) -> dict[str, Tensor]:
    """Model inputs of a whole conversation, with labels on its answers alone.

    The answers' positions come from rendering the chat template up to each answer and through it,
    and from the tokenizer's character offsets, never from searching the text.

    Returns:
        input_ids, labels int64 [S] (-100 where nothing is learnt), and pixel_values if there are
        images.

    Raises:
        InputError: the template renders a prefix of the conversation differently from the whole, or
            no label is left.
    """
    text, spans = _render(processor, turns, place)
    inputs = _process(processor, text, images)
    plain = processor.tokenizer(
        text, add_special_tokens=_adds_special(processor, text), return_offsets_mapping=True
    )
    labels = torch.tensor(
        [
            token if any(start < b and a < end for start, end in spans) and a < b else IGNORED
            for token, (a, b) in zip(plain["input_ids"], plain["offset_mapping"], strict=True)
        ]
    )
    # The processor repeats the image token; all other tokens are the same, in the same order.
    image_id = processor.image_token_id
    ids = inputs["input_ids"]
    expanded = torch.full_like(ids, IGNORED)
    expanded[ids != image_id] = labels[torch.tensor(plain["input_ids"]) != image_id]
    if not (expanded != IGNORED).any():
        raise InputError(
            place, "conversations", "an answer that the tokenizer can encode", "no labels"
        )
    return {**inputs, "labels": expanded}


def _render(processor: Any, turns: Sequence[Turn], place: str) -> tuple[str, list[tuple[int, int]]]:
    messages = messages_of(turns)
    spans = []
    text = ""
    for end in range(2, len(messages) + 1, 2):
        asked = processor.apply_chat_template(messages[: end - 1], add_generation_prompt=True)
        answered = processor.apply_chat_template(messages[:end])
        if not (asked.startswith(text) and answered.startswith(asked)):
            expected = "one that renders the start of a conversation as it renders the whole"
            raise InputError(place, "chat template", expected, "one that does not")
        spans.append((len(asked), len(answered)))
        text = answered
    eos = processor.tokenizer.eos_token
    if eos and not text.rstrip().endswith(
        eos
    ):  # LLaVA-1.5's template leaves the end to the trainer
        text += eos
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _process(processor: Any, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    inputs = processor(
        text=[text],
        images=list(images) or None,
        add_special_tokens=_adds_special(processor, text),
        return_tensors="pt",
    )
    encoded = {"input_ids": inputs["input_ids"][0]}
    if images:
        encoded["pixel_values"] = inputs["pixel_values"]
    return encoded


def _adds_special(processor: Any, text: str) -> bool:
    bos = processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))
