"""From a conversation to token ids and labels, with any processor that has a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pmod_model.data.errors import InputError
from pmod_model.data.records import IMAGE, Turn, messages_of

IGNORED = -100
IMAGE_INPUTS = ("pixel_values", "image_sizes")  # the latter where images are cut into crops
CROPPED = 5
PRINTED = "{'type': 'text'"


def encode_prompt(
    processor: Any, turn: Turn, image: Image.Image | None, system: str = ""
) -> dict[str, Tensor]:
    """Inputs of one question, up to where its answer begins: input_ids int64 [S], and images."""
    messages = messages_of([turn], system)[:-1]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return _process(processor, text, [] if image is None else [image])


def encode_conversation(
    processor: Any,
    turns: Sequence[Turn],
    images: Sequence[Image.Image],
    place: str,
    system: str = "",
) -> dict[str, Tensor]:
    """Model inputs of a whole conversation, with labels on its answers alone.

    The answers' positions come from rendering the chat template up to each answer and through it,
    and from the tokenizer's character offsets, never from searching the text.

    Returns:
        input_ids, labels int64 [S] (-100 where nothing is learnt), and what the processor makes of
        images, if there are any: pixel_values, and image_sizes from that of LLaVA-NeXT.

    Raises:
        InputError: what `tokenize_conversation` refuses.
    """
    tokens = tokenize_conversation(processor, turns, len(images), place, system)
    inputs = _process(processor, tokens.text, images)
    # The processor repeats the image token; all other tokens are the same, in the same order.
    image_id = processor.image_token_id
    ids = inputs["input_ids"]
    expanded = torch.full_like(ids, IGNORED)
    expanded[ids != image_id] = tokens.labels[tokens.ids != image_id]
    return {**inputs, "labels": expanded}


@dataclass(frozen=True, eq=False)
class Tokens:
    """A conversation with one token per image.

    Attributes:
        text: what the chat template made of it.
        ids: int64 [S].
        labels: int64 [S], -100 where nothing is learnt.
    """

    text: str
    ids: Tensor
    labels: Tensor


def tokenize_conversation(
    processor: Any, turns: Sequence[Turn], images: int, place: str, system: str = ""
) -> Tokens:
    """Tokens and labels of a conversation with so many images, which need not be there.

    Raises:
        InputError: a text holds a special token of the tokenizer (it would become one, for fast
            tokenizers look for them in all text), the template renders a prefix of the conversation
            differently from the whole, without an answer, or with other than one marker per image,
            or no label is left.
    """
    _check_special(processor, turns, system, place)
    text, spans = _render(processor, turns, system, place)
    plain = processor.tokenizer(
        text, add_special_tokens=_adds_special(processor, text), return_offsets_mapping=True
    )
    ids = torch.tensor(plain["input_ids"])
    found = int((ids == processor.image_token_id).sum())
    if found != images:
        expected = f"one with {images} image tokens for {images} images"
        raise InputError(place, "chat template", expected, found, kind="image count")
    labels = torch.tensor(
        [
            token if any(start < b and a < end for start, end in spans) and a < b else IGNORED
            for token, (a, b) in zip(plain["input_ids"], plain["offset_mapping"], strict=True)
        ]
    )
    # the first token is predicted by nothing
    if not (labels[1:] != IGNORED).any():
        expected = "an answer that template and tokenizer make tokens of"
        raise InputError(place, "conversations", expected, "no labels", kind="no labels")
    return Tokens(text, ids, labels)


def stack_images(encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The images of several encoded conversations or prompts, in order; empty if there are none.

    Images of LLaVA-NeXT, [images, crops, 3, H, W], get as many crops as the largest has, as from
    its processor; the model reads only those that are there.
    """
    stacked = {}
    for name in IMAGE_INPUTS:
        images = [inputs[name] for inputs in encoded if name in inputs]
        if images and images[0].ndim == CROPPED:
            most = max(image.shape[1] for image in images)
            pad = torch.nn.functional.pad
            images = [pad(image, (0, 0) * 3 + (0, most - image.shape[1])) for image in images]
        if images:
            stacked[name] = torch.cat(images)
    return stacked


def _check_special(processor: Any, turns: Sequence[Turn], system: str, place: str) -> None:
    texts = [("system", system)]
    for i, turn in enumerate(turns):
        texts += [
            (f"question {i}", turn.question.replace(IMAGE, "\n")),
            (f"answer {i}", turn.answer),
        ]
    added = processor.tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {processor.image_token}
    for argument, text in texts:
        for token in special:
            if token in text:
                expected = f"a text without the special token {token!r}"
                raise InputError(place, argument, expected, repr(text[:80]), kind="special token")


def _render(
    processor: Any, turns: Sequence[Turn], system: str, place: str
) -> tuple[str, list[tuple[int, int]]]:
    messages = messages_of(turns, system)
    spans = []
    text = ""
    for end in range(len(messages) % 2 + 2, len(messages) + 1, 2):
        asked = processor.apply_chat_template(messages[: end - 1], add_generation_prompt=True)
        answered = processor.apply_chat_template(messages[:end])
        if not (asked.startswith(text) and answered.startswith(asked)):
            expected = "one that renders the start of a conversation as it renders the whole"
            raise InputError(place, "chat template", expected, "one that does not", kind="template")
        answer = messages[end - 1]["content"][0]["text"]
        rendered = answered[len(asked) :]
        # a template that takes plain texts prints the part as Python does
        if answer not in rendered or (PRINTED in rendered and PRINTED not in answer):
            expected = f"one that renders the answer {answer[:40]!r}"
            raise InputError(place, "chat template", expected, repr(rendered[:80]), kind="template")
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
        encoded |= {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
    return encoded


def _adds_special(processor: Any, text: str) -> bool:
    bos = processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))
