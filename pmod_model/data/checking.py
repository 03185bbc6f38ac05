"""Looks at a record before a run depends on it, without decoding a picture, and encodes it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from pmod_model.data.augment import augment as augment_image
from pmod_model.data.broken import BrokenRecords
from pmod_model.data.encoding import encode_conversation, tokenize_conversation
from pmod_model.data.errors import InputError
from pmod_model.data.images import open_source, source_size
from pmod_model.data.reading import Selected, id_at
from pmod_model.data.records import Record
from pmod_model.data.turns import Turn


@dataclass(frozen=True)
class Checked:
    """The records that can be used.

    Attributes:
        records: in their order.
        lengths: tokens of each, those of its images included.
        has_images: whether each has images.
    """

    records: Sequence[Record]
    lengths: list[int]
    has_images: list[bool]


def check_records(
    records: Sequence[Record],
    folder: Path | None,
    processor: Any,
    *,
    max_length: int = 2048,
    max_turns: int = 0,
    name: str = "data",
    broken: BrokenRecords | None = None,
    decode: bool = False,
) -> Checked:
    """Records whose conversation has labels and fits, and whose images' headers are in order.

    Args:
        records: to look at; those that are checked when asked for may be malformed.
        folder: the image folder.
        processor: a LLaVA-style processor, which says how many tokens an image has.
        max_length: longest sequence in tokens.
        max_turns: as for `ConversationDataset`; of more turns, the longest count.
        name: of the data set, in errors.
        broken: what to do about broken records; None raises.
        decode: decode every image too.

    Raises:
        InputError: a record is broken under the policy "error", or too many are.
    """
    broken = broken or BrokenRecords()
    before = broken.total
    tokens = _image_tokens(processor)
    indices, lengths, has_images = [], [], []
    for index in range(len(records)):
        try:
            record = records[index]
            place = record.place or f"{name} record {index} (id {record.id!r})"
            sizes = [source_size(image, folder, place) for image in record.images]
            if decode:
                for image in record.images:
                    open_source(image, folder, place)
            turns = _longest(record, max_turns)
            found = tokenize_conversation(processor, turns, len(sizes), place, record.system)
            images = sum(tokens(width, height) for width, height in sizes)
            length = len(found.ids) - len(sizes) + images
            check_length(length, max_length, place)
        except InputError as error:
            broken.add(id_at(records, index), error)
            continue
        indices.append(index)
        lengths.append(length)
        has_images.append(bool(record.images))
    broken.check(len(records) + before, name)
    whole = len(indices) == len(records)
    return Checked(records if whole else Selected(records, indices), lengths, has_images)


def check_length(length: int, max_length: int, place: str) -> None:
    """Refuse a sequence that is too long: cutting it could cut an image.

    Raises:
        InputError: it is longer than `max_length`.
    """
    if length > max_length:
        expected = f"at most {max_length} tokens"
        raise InputError(place, "length", expected, length, kind="length")


def encode_record(
    record: Record,
    turns: Sequence[Turn],
    folder: Path | None,
    processor: Any,
    *,
    max_length: int,
    augment: Sequence[str],
    rng: random.Random,
    place: str,
) -> dict[str, Tensor]:
    """Open the images of a record, change them as `augment` says, and encode `turns` with them.

    Raises:
        InputError: the record is broken, or longer than `max_length` tokens.
    """
    images = [open_source(image, folder, place) for image in record.images]
    images = [augment_image(image, augment, rng) for image in images]
    encoded = encode_conversation(processor, turns, images, place, record.system)
    check_length(len(encoded["input_ids"]), max_length, place)
    return encoded


def _longest(record: Record, max_turns: int) -> Sequence[Turn]:
    if not max_turns or len(record.images) > 1 or len(record.turns) <= max_turns:
        return record.turns
    # the image comes before the first turn, wherever its marker was
    turns = sorted(record.turns, key=lambda turn: len(turn.text) + len(turn.answer), reverse=True)
    return images_first(record, turns)[:max_turns]


def images_first(record: Record, turns: Sequence[Turn]) -> list[Turn]:
    """Put the one image before every question: it belongs to the conversation, not to one turn."""
    if not record.images:
        return list(turns)
    plain = [Turn(turn.text, turn.answer) for turn in turns]
    return [Turn(f"<image>\n{plain[0].question}", plain[0].answer), *plain[1:]]


def _image_tokens(processor: Any) -> Any:
    @lru_cache(maxsize=4096)
    def count(width: int, height: int) -> int:
        # transformers' own count for serving, which needs no pixels
        found = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return int(found["num_image_tokens"][0])

    return count
