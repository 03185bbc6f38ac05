"""Records as a torch data set."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pmod_model.data.augment import check_names
from pmod_model.data.broken import KINDS, BrokenRecords
from pmod_model.data.checking import encode_record, images_first
from pmod_model.data.errors import InputError
from pmod_model.data.reading import id_at
from pmod_model.data.records import Record
from pmod_model.data.turns import Turn

TRIES = 64
logger = logging.getLogger(__name__)


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Encoded conversations: input_ids, labels int64 [S] and pixel_values [images, 3, H, W].

    With `max_turns`, a record yields that many of its turns, chosen and ordered anew in each epoch
    from (seed, epoch, index) alone: the same in every process and after a restart. Its image comes
    before the first of them, whichever turn held the marker. A record with several images yields
    all its turns in their order, since each image belongs to a turn.

    A record that breaks although `check_records` found it in order (its file is gone by now) is an
    error, or, under the policy "skip", replaced by another one with images, or without like it,
    chosen from (seed, epoch, index): so the number of batches stays.

    Args:
        records: what to learn.
        folder: the image folder; None if no image is a path.
        processor: a LLaVA-style processor.
        max_turns: turns per record and epoch; 0 keeps all, in their order, as a record with several
            images always does.
        max_length: longest sequence in tokens; a longer one is an error, since cutting it could cut
            an image.
        augment: changes of images, see `pmod_model.data.augment`, as the turns from (seed, epoch,
            index) alone.
        seed: of the choice of turns, of `augment` and of replacements.
        name: of the data set, in errors.
        broken: what to do about records that break later; None raises.

    Raises:
        InputError: an unknown name in `augment`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        folder: Path | None,
        processor: Any,
        *,
        max_turns: int = 0,
        max_length: int = 2048,
        augment: str | Sequence[str] = (),
        seed: int = 0,
        name: str = "data",
        broken: BrokenRecords | None = None,
    ) -> None:
        self.records = records
        self.folder = folder
        self.processor = processor
        self.max_turns = max_turns
        self.max_length = max_length
        self.augment = check_names(augment)
        self.seed = seed
        self.name = name
        self.broken = broken or BrokenRecords()
        # shared with the workers of a loader: the epoch of those that live on, and what they found
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._replaced = torch.zeros(len(records), dtype=torch.uint8).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that turns, changes of images and replacements are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer's loader at the start of an epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Record `index`, encoded; raises InputError if it is broken."""
        try:
            return self._encode(index)
        except InputError as error:
            if self.broken.policy == "error":
                raise
            return self._replacement(index, error)

    def replaced(self) -> dict[str, list[str]]:
        """Ids of the records that were replaced in this process and its workers, by kind."""
        found: dict[str, list[str]] = defaultdict(list)
        for index in self._replaced.nonzero()[:, 0].tolist():
            found[KINDS[int(self._replaced[index]) - 1]].append(id_at(self.records, index))
        return dict(found)

    def report(self) -> dict[str, Any]:
        """What was left out at the start, and what was replaced since, as JSON values."""
        return {**self.broken.to_dict(), "replaced": self.replaced()}

    def _encode(self, index: int) -> dict[str, Tensor]:
        record = self.records[index]
        place = record.place or f"{self.name} record {index} (id {record.id!r})"
        return encode_record(
            record,
            self._turns(record, index),
            self.folder,
            self.processor,
            max_length=self.max_length,
            augment=self.augment,
            rng=random.Random(f"{self.seed}/{self.epoch}/{index}/images"),
            place=place,
        )

    def _turns(self, record: Record, index: int) -> Sequence[Turn]:
        # images belong to their turns in order, so several cannot be drawn from
        if not self.max_turns or len(record.images) > 1:
            return record.turns
        turns = list(record.turns)
        random.Random(f"{self.seed}/{self.epoch}/{index}").shuffle(turns)
        return images_first(record, turns)[: self.max_turns]

    def _replacement(self, index: int, error: InputError) -> dict[str, Tensor]:
        if not self._replaced[index]:
            self._replaced[index] = KINDS.index(error.kind) + 1
            logger.warning("%s; another record takes its place", error)
        count, total = int(self._replaced.count_nonzero()), len(self)
        if count > self.broken.max_share * total:
            expected = f"at most {self.broken.max_share:.1%} records that break during a run"
            got = f"{count} of {total}, ids {list(self.replaced().values())}"
            raise InputError(self.name, "records", expected, got, f"the last: {error}")
        rng = random.Random(f"{self.seed}/{self.epoch}/{index}/replacement")
        modality = self._modality(index)
        for other in rng.sample(range(total), min(total, TRIES)):
            if other == index or (modality is not None and self._modality(other) != modality):
                continue
            try:
                return self._encode(other)
            except InputError:
                continue
        raise error

    def _modality(self, index: int) -> bool | None:
        """Whether the record has images; None if it cannot be read."""
        try:
            return bool(self.records[index].images)
        except InputError:
            return None
