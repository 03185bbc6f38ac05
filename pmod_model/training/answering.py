"""Answers questions in words: the one use of `generate` that commands and the report share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from pmod_model.data.encoding import encode_prompt, stack_images
from pmod_model.data.errors import InputError
from pmod_model.data.images import open_source
from pmod_model.data.records import IMAGE, Record, Turn


@dataclass(frozen=True)
class Question:
    """A question, which may hold one `<image>` marker, its image, and what is said before."""

    turn: Turn
    image: Image.Image | None
    system: str = ""


def make_question(prompt: str, image: Image.Image | None, place: str) -> Question:
    """A question from a prompt; the image comes first unless the prompt says where.

    Raises:
        InputError: the prompt is empty, or its markers do not match the image.
    """
    if not prompt.replace(IMAGE, "").strip():
        raise InputError(place, "--prompt", "a question", repr(prompt))
    markers = prompt.count(IMAGE)
    if image is not None and markers == 0:
        prompt, markers = f"{IMAGE}\n{prompt}", 1
    images = int(image is not None)
    if markers != images:
        raise InputError(place, "--prompt", f"{images} {IMAGE} for {images} image(s)", markers)
    return Question(Turn(prompt, ""), image)


def record_question(record: Record, folder: Path | None, place: str) -> Question:
    """The first question of a record and its image.

    The image comes first unless that question says where, even if a later one holds the marker: so
    it is for prompts, and for turns drawn in training.

    Raises:
        InputError: the record has several images, or its image cannot be used.
    """
    place = f"{place} record (id {record.id!r})"
    if len(record.images) > 1:
        raise InputError(
            place, "image", "at most one image in a question to answer", len(record.images)
        )
    turn, image = record.turns[0], None
    if record.images:
        image = open_source(record.images[0], folder, place)
        if IMAGE not in turn.question:
            turn = Turn(f"{IMAGE}\n{turn.question}", turn.answer)
    return Question(turn, image, record.system)


def answer(
    model: PreTrainedModel,
    processor: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 128,
    place: str,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers to `questions`, in order; prompts of a batch are padded on the left.

    Args:
        model: a LLaVA-style model in evaluation mode.
        processor: its processor.
        questions: what to ask.
        max_new_tokens: longest answer.
        batch_size: prompts generated together.
        place: named in errors.
        on_batch: told the number of questions of each finished batch.

    Raises:
        InputError: `max_new_tokens` or `batch_size` is not positive, or a prompt does not fit the
            model.
    """
    for name, value in (("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        if value < 1:
            raise InputError(place, name, "an integer >= 1", value)
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        prompts = [
            encode_prompt(processor, question.turn, question.image, question.system)
            for question in questions[start : start + batch_size]
        ]
        inputs = pad_prompts(prompts, processor.tokenizer.pad_token_id or 0)
        _check_length(model, inputs["input_ids"].shape[1] + max_new_tokens, place)
        generated: Any = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, max_new_tokens=max_new_tokens, do_sample=False
        )
        new = generated[:, inputs["input_ids"].shape[1] :]
        answers += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        on_batch(len(prompts))
    return [text.strip() for text in answers]


def unknown_words(processor: Any, text: str) -> list[str]:
    """Words of `text` that the tokenizer has no token for."""
    unknown = processor.tokenizer.unk_token_id
    encoded = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [text[a:b] for token, (a, b) in pairs if unknown is not None and token == unknown]


def pad_prompts(prompts: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of prompts: input_ids, attention_mask [B, S], padded left, and images."""
    length = max(len(prompt["input_ids"]) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_token_id)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt["input_ids"]) :] = prompt["input_ids"]
        mask[row, length - len(prompt["input_ids"]) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | stack_images(prompts)


def _check_length(model: PreTrainedModel, length: int, place: str) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(place, "prompt", f"at most {limit} tokens with the answer", length)
