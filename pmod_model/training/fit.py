"""The Trainer of `pmod train`: its data, batches, checkpoints and log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer_callback import ProgressCallback

from pmod_model.data.broken import BrokenRecords
from pmod_model.data.checking import Checked, check_records
from pmod_model.data.collators import Collator, PackedCollator, dummy_image
from pmod_model.data.dataset import ConversationDataset
from pmod_model.data.sampler import ModalityLengthSampler
from pmod_model.inject import find_decoder
from pmod_model.models import DecoderModel
from pmod_model.training.arguments import training_arguments
from pmod_model.training.config import TrainConfig
from pmod_model.training.durable import Durability, DurableTrainer
from pmod_model.training.manifest import sha256_of
from pmod_model.training.metrics import watch_routing
from pmod_model.training.parts import choose_parts
from pmod_model.training.sources import EASY_VQA, Data

# fields that may differ between a run and the one that goes on from it
FREE = {"output", "threads", "workers", "save_every", "keep", "log_every", "report_to"}


class ProgressBar(ProgressCallback):
    """The Trainer's bar, with the loss beside it instead of log lines above it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the last loss."""
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def close(self) -> None:
        """End the bar's line, after an error too."""
        if self.training_bar is not None:
            self.training_bar.close()


class RunTrainer(DurableTrainer):
    """A `DurableTrainer` that takes its records in a given order."""

    order: Sampler[int] | None = None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.order is not None:
            return self.order
        return super()._get_train_sampler(*args, **kwargs)


@dataclass(frozen=True)
class Prepared:
    """What a run trains on: the records that can be used, and what was left out."""

    data: Data
    checked: Checked | None
    broken: BrokenRecords

    @property
    def records(self) -> Sequence[Any]:
        """The records."""
        return self.data.records if self.checked is None else self.checked.records


def prepare(config: TrainConfig, processor: Any, data: Data, broken: BrokenRecords) -> Prepared:
    """Check the records before anything is trained; those of easy-VQA are known to be in order.

    Raises:
        InputError: a record is broken, or with `on_broken` skip, too many are.
    """
    if config.data == EASY_VQA and not config.group_by_modality:
        return Prepared(data, None, broken)
    checked = check_records(
        data.records,
        data.folder,
        processor,
        max_length=config.max_length,
        max_turns=config.turns,
        name=data.name,
        broken=broken,
    )
    return Prepared(data, checked, broken)


def make_trainer(
    config: TrainConfig, model: PreTrainedModel, processor: Any, prepared: Prepared, folder: Path
) -> RunTrainer:
    """The Trainer of a run, which writes its checkpoints into `folder`."""
    dataset = ConversationDataset(
        prepared.records,
        prepared.data.folder,
        processor,
        max_turns=config.turns,
        max_length=config.max_length,
        augment=config.augment,
        seed=config.seed,
        name=prepared.data.name,
        broken=prepared.broken,
    )
    arguments = training_arguments(config, folder)
    settings = config.model_dump(mode="json", exclude=FREE)
    trainer = RunTrainer(
        choose_parts(model, config.trained, config.lora_rank),
        arguments,
        train_dataset=dataset,
        data_collator=_collator(config, model, processor),
        durable=Durability(config=settings, data=fingerprint(config, prepared)),
    )
    if config.group_by_modality and prepared.checked is not None:
        trainer.order = ModalityLengthSampler(
            prepared.checked.lengths,
            prepared.checked.has_images,
            config.batch_size,
            arguments.world_size,
            config.gradient_accumulation,
            config.seed,
            dataset,
        )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar())
    watch_routing(trainer)
    return trainer


def _collator(config: TrainConfig, model: PreTrainedModel, processor: Any) -> Any:
    # a rank without images would leave projector and vision tower out, and the others waiting
    dummy = dummy_image(processor)
    if config.padding_free:
        routed = isinstance(find_decoder(model), DecoderModel)
        return PackedCollator(offsets=routed, dummy=dummy)
    return Collator(processor.tokenizer.pad_token_id or 0, dummy=dummy)


def fingerprint(config: TrainConfig, prepared: Prepared) -> dict[str, Any]:
    """What tells this data from other data: its name, its size, and the digest of its file."""
    facts = {"name": prepared.data.name, "records": len(prepared.records)}
    path = Path(config.data)
    if config.data == EASY_VQA or not path.is_file():
        return facts
    return {**facts, "sha256": sha256_of(path)}
