"""An order of records in which a batch holds one modality and similar lengths."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from pmod_model.data.errors import InputError


class ModalityLengthSampler(Sampler[int]):
    """Indices by modality and length, as LLaVA's `group_by_modality_length`.

    Each run of world_size * batch_size * accumulation indices is one step of the optimiser: a
    mega-batch, drawn from the records with images or from those without, longest first. What is
    left over of either at the end of an epoch makes the last, mixed steps. The order depends on
    (seed, epoch) alone, and its length is a multiple of world_size * batch_size, for which the
    first of the left-over indices are repeated; so accelerate, which deals batch_size indices to
    one process after another, gives each the same number of batches.

    Args:
        lengths: tokens of each record.
        has_images: whether each record has images.
        batch_size: records a process takes at once.
        world_size: processes.
        accumulation: batches a process takes in one step.
        seed: of the order.
        dataset: told of epochs, if it has `set_epoch`; accelerate tells either a sampler or a data
            set.

    Raises:
        InputError: no records, lists of different lengths, or a number below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_images: Sequence[bool],
        batch_size: int,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        dataset: Any = None,
    ) -> None:
        if not lengths or len(lengths) != len(has_images):
            got = f"{len(lengths)} and {len(has_images)}"
            expected = "one length and one modality for each of at least one record"
            raise InputError("data", "lengths, has_images", expected, got)
        sizes = {
            "batch_size": batch_size,
            "world_size": world_size,
            "accumulation": accumulation,
        }
        for name, value in sizes.items():
            if value < 1:
                raise InputError("data", name, "an integer >= 1", value)
        self.lengths = torch.tensor(lengths)
        self.has_images = torch.tensor(has_images, dtype=torch.bool)
        self.batch = world_size * batch_size
        self.mega_batch = self.batch * accumulation
        self.seed = seed
        self.dataset = dataset
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch) * self.batch

    def __iter__(self) -> Iterator[int]:
        """Indices of one epoch."""
        number = random.Random(f"{self.seed}/{self.epoch}/order").getrandbits(63)
        generator = torch.Generator().manual_seed(number)
        whole: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for modality in (True, False):
            indices = (self.has_images == modality).nonzero()[:, 0]
            indices = indices[torch.randperm(len(indices), generator=generator)]
            for group in indices.split(self.mega_batch):
                (whole if len(group) == self.mega_batch else rest).append(group)
        order = torch.randperm(len(whole), generator=generator).tolist()
        groups = [self._longest_first(whole[i]) for i in order]
        # not sorted as one: what can stay with its modality does
        groups += [self._longest_first(group) for group in rest]
        indices = torch.cat(groups)
        repeated = indices[-sum(map(len, rest)) :] if rest else indices
        missing = len(self) - len(indices)
        fill = repeated.repeat(-(-missing // len(repeated)))[:missing]
        yield from torch.cat((indices, fill)).tolist()

    def _longest_first(self, group: torch.Tensor) -> torch.Tensor:
        return group[self.lengths[group].argsort(descending=True, stable=True)]
