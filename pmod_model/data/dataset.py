"""Records as a torch data set, and the collator of its batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from pmod_model.data.encoding import IGNORED, encode_conversation, stack_images
from pmod_model.data.errors import InputError
from pmod_model.data.images import open_image, resolve_image
from pmod_model.data.records import Record, Turn


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Encoded conversations: input_ids, labels int64 [S] and pixel_values [images, 3, H, W].

    With `max_turns`, a record yields that many of its turns, chosen and ordered anew in each epoch
    from (seed, epoch, index) alone: the same in every process and after a restart. Its image comes
    before the first of them, whichever turn held the marker. A record with several images yields
    all its turns in their order, since each image belongs to a turn.

    Args:
        records: what to learn.
        folder: the image folder; None if no record has images.
        processor: a LLaVA-style processor.
        max_turns: turns per record and epoch; 0 keeps all, in their order, as a record with several
            images always does.
        max_length: longest sequence in tokens; a longer one is an error, since cutting it could cut
            an image.
        seed: of the choice of turns.
        name: of the data set, in errors.
    """

    def __init__(
        self,
        records: Sequence[Record],
        folder: Path | None,
        processor: Any,
        *,
        max_turns: int = 0,
        max_length: int = 2048,
        seed: int = 0,
        name: str = "data",
    ) -> None:
        self.records = records
        self.folder = folder
        self.processor = processor
        self.max_turns = max_turns
        self.max_length = max_length
        self.seed = seed
        self.name = name
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer's loader at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.records[index]
        place = f"{self.name} record {index} (id {record.id!r})"
        images = [
            open_image(resolve_image(self.folder or Path(), image, place), place)
            for image in record.images
        ]
        encoded = encode_conversation(self.processor, self._turns(record, index), images, place)
        length = len(encoded["input_ids"])
        if length > self.max_length:
            raise InputError(place, "length", f"at most {self.max_length} tokens", length)
        return encoded

    def _turns(self, record: Record, index: int) -> Sequence[Turn]:
        # images belong to their turns in order, so several cannot be drawn from
        if not self.max_turns or len(record.images) > 1:
            return record.turns
        turns = list(record.turns)
        random.Random(f"{self.seed}/{self.epoch}/{index}").shuffle(turns)
        return _images_first(record, turns)[: self.max_turns]


def _images_first(record: Record, turns: list[Turn]) -> list[Turn]:
    """Put the one image before every question: it belongs to the conversation, not to one turn."""
    if not record.images:
        return turns
    plain = [Turn(turn.text, turn.answer) for turn in turns]
    return [Turn(f"<image>\n{plain[0].question}", plain[0].answer), *plain[1:]]


@dataclass(frozen=True)
class Collator:
    """Pads a list of encoded conversations on the right and stacks their images.

    Returns input_ids, attention_mask, labels int64 [B, S] and, if any has images, pixel_values
    [images, ...] (and image_sizes [images, 2] for LLaVA-NeXT).
    """

    pad_token_id: int

    def __call__(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One batch."""
        ids = [feature["input_ids"] for feature in features]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(
                [feature["labels"] for feature in features], batch_first=True, padding_value=IGNORED
            ),
        }
        return batch | stack_images(features)
