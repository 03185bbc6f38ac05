"""Records that come one after another, of any number: webdataset, streaming, a generator."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pmod_model.data.augment import check_names
from pmod_model.data.broken import BrokenRecords
from pmod_model.data.checking import encode_record
from pmod_model.data.errors import InputError
from pmod_model.data.records import parse_record, record_id

JUDGED = 100  # records after which the share of broken ones says something


class ConversationStream(IterableDataset[dict[str, Tensor]]):
    """Encoded conversations of an iterable of decoded records, as `ConversationDataset` yields.

    A broken record is an error, or left out and counted (each process and worker counts its own).
    Every process should get the same stream, which accelerate deals out, so that what is left out
    leaves each as many batches. A source that is an IterableDataset of torch divides itself among
    the workers of a loader; any other is divided here.

    Args:
        source: decoded records of either form, see `pmod_model.data.records`; told of epochs if it
            has `set_epoch`.
        folder: the image folder; None if no image is a path.
        processor: a LLaVA-style processor.
        max_length: longest sequence in tokens.
        augment: changes of images, from (seed, epoch, number) alone.
        seed: of `augment`.
        name: of the data set, in errors.
        broken: what to do about broken records; None raises. The limit on their share holds from
            the 100th record.

    Raises:
        InputError: an unknown name in `augment`; while iterating, a broken record, too many of
            them, or none at all (a generator that was used up by an epoch before).
    """

    def __init__(
        self,
        source: Iterable[Any],
        folder: Path | None,
        processor: Any,
        *,
        max_length: int = 2048,
        augment: str | Sequence[str] = (),
        seed: int = 0,
        name: str = "data",
        broken: BrokenRecords | None = None,
    ) -> None:
        self.source = source
        self.folder = folder
        self.processor = processor
        self.max_length = max_length
        self.augment = check_names(augment)
        self.seed = seed
        self.name = name
        self.broken = broken or BrokenRecords()
        self.epoch = 0
        self.seen = 0  # in all epochs

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer's loader at the start of an epoch."""
        self.epoch = epoch
        tell: Any = getattr(self.source, "set_epoch", None)
        if tell is not None:
            tell(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Encoded records of this worker."""
        for number, entry in self._entries():
            self.seen += 1
            try:
                encoded = self._encode(entry, number)
            except InputError as error:
                self.broken.add(record_id(entry, number), error)
                if self.seen >= JUDGED:
                    self.broken.check(self.seen, self.name)
                continue
            yield encoded
        self.broken.check(self.seen, self.name)

    def _entries(self) -> Iterator[tuple[int, Any]]:
        worker = get_worker_info()
        divided = isinstance(self.source, IterableDataset)
        step, first = 1, 0
        if worker is not None and not divided:
            step, first = worker.num_workers, worker.id
        empty = True
        for number, entry in zip(count(), self.source):
            empty = False
            if number % step == first:
                yield number, entry
        if empty and (worker is None or not divided):
            expected = "at least one record, in every epoch"
            raise InputError(self.name, "source", expected, "none")

    def _encode(self, entry: Any, number: int) -> dict[str, Tensor]:
        record = parse_record(entry, f"{self.name} record {number}", number)
        return encode_record(
            record,
            record.turns,
            self.folder,
            self.processor,
            max_length=self.max_length,
            augment=self.augment,
            rng=random.Random(f"{self.seed}/{self.epoch}/{number}/images"),
            place=record.place,
        )
