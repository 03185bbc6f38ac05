"""Batches of encoded conversations: padded, or packed into one row without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from pmod_model.data.encoding import IGNORED, IMAGE_INPUTS, stack_images
from pmod_model.data.errors import InputError
from pmod_model.packing import segment_arguments

Features = Sequence[Mapping[str, Tensor]]


def dummy_image(processor: Any) -> dict[str, Tensor]:
    """A grey image for batches without any: input_ids int64 [T], all placeholders, and its pixels.

    With it the vision tower, the projector and the routers get gradients, zeros, in every process
    of a data-parallel group, none of which waits for another then.
    """
    size = processor.image_processor.crop_size
    image = Image.new("RGB", (size["width"], size["height"]), (127, 127, 127))
    inputs = processor(
        text=[processor.image_token], images=[image], add_special_tokens=False, return_tensors="pt"
    )
    ids = inputs["input_ids"][0]
    pixels = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
    return {"input_ids": ids[ids == processor.image_token_id], **pixels}


@dataclass(frozen=True)
class Collator:
    """Pads a list of encoded conversations on the right and stacks their images.

    Returns input_ids, attention_mask, labels int64 [B, S] and, if any has images, pixel_values
    [images, ...] (and image_sizes [images, 2] for LLaVA-NeXT).

    Attributes:
        pad_token_id: fills rows.
        dummy: from `dummy_image`: a batch without images gets it, masked, after its shortest row.

    Raises:
        InputError: the batch has no labels, with which a loss would be 0 / 0.
    """

    pad_token_id: int
    dummy: Mapping[str, Tensor] | None = field(default=None, compare=False)

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """One batch."""
        _check_labels(features)
        images = stack_images(features)
        ids = [feature["input_ids"] for feature in features]
        masks = [torch.ones_like(row) for row in ids]
        if self.dummy is not None and not images:
            run = self.dummy["input_ids"]
            shortest = min(range(len(ids)), key=lambda row: len(ids[row]))
            ids[shortest] = torch.cat((ids[shortest], run))
            masks[shortest] = pad(masks[shortest], (0, len(run)))
            images = stack_images([self.dummy])
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
        }
        length = batch["input_ids"].shape[1]
        labels = [feature["labels"] for feature in features]
        rows = [pad(row, (0, length - len(row)), value=IGNORED) for row in labels]
        return {**batch, "labels": torch.stack(rows), **images}


@dataclass(frozen=True)
class PackedCollator:
    """Puts encoded conversations one after another in a single row, with no padding anywhere.

    Returns input_ids, labels, position_ids int64 [1, N] and the images as `Collator` does.
    Positions start over with each conversation, and its first label is ignored, since the token
    before it is another's. `use_cache` is False, for decoders do not look for sequences where they
    fill a cache. With `offsets`, also cu_seq_lens_q, cu_seq_lens_k int32 [B + 1] and max_length_q,
    max_length_k, which flash-attn and p-MoD read without a look at the positions. A dense LLaVA
    hands those on to its vision tower, whose sequences are images: set `offsets` to False for it.

    Attributes:
        offsets: whether to tell where conversations begin, beside the positions.
        dummy: from `dummy_image`: a batch without images gets it, as a sequence of its own.

    Raises:
        InputError: the batch has no labels.
    """

    offsets: bool = True
    dummy: Mapping[str, Tensor] | None = field(default=None, compare=False)

    def __call__(self, features: Features) -> dict[str, Any]:
        """One batch."""
        _check_labels(features)
        rows = list(features)
        if self.dummy is not None and not any("pixel_values" in row for row in rows):
            rows.append({**self.dummy, "labels": torch.full_like(self.dummy["input_ids"], IGNORED)})
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        labels = torch.cat([row["labels"] for row in rows])
        bounds = pad(lengths.cumsum(0), (1, 0))
        labels[bounds[:-1]] = IGNORED
        batch: dict[str, Any] = {
            "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            "use_cache": False,
        }
        if self.offsets:
            batch |= segment_arguments(bounds.int(), int(lengths.max()))
        return batch | stack_images(rows)


def _check_labels(features: Features) -> None:
    if not any(bool((feature["labels"][1:] != IGNORED).any()) for feature in features):
        expected = "at least one label that is not -100"
        raise InputError("data", "batch", expected, "none", kind="no labels")
