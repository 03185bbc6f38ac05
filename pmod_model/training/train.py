"""`pmod train`: one p-MoD or dense LLaVA, trained with the Hugging Face Trainer."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

from pmod_model.configuration import PModConfig
from pmod_model.data.collators import Collator
from pmod_model.data.dataset import ConversationDataset
from pmod_model.data.errors import InputError
from pmod_model.data.processor import build_processor
from pmod_model.schedule import layer_ratios
from pmod_model.training.models import build_model, load_for_training
from pmod_model.training.preset import Preset
from pmod_model.training.run_folder import new_run_folder, write_run
from pmod_model.training.sources import Data, Source

PLACE = "train"


@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what, for how long.

    Attributes:
        output: the run folder to make.
        source: the data.
        pmod: settings of p-MoD; None trains the dense twin.
        model: checkpoint to start from; None builds `preset` from scratch.
        preset: sizes of a from-scratch model.
        steps: optimiser steps.
        batch_size: conversations a step.
        turns: turns taken from each conversation, drawn anew each epoch; 0 = all, in order.
        max_length: longest conversation in tokens.
        learning_rate: peak; linear warm-up over 5 % of the steps, then a cosine to zero.
        seed: of weights, order and turns.
        threads: CPU threads; 0 leaves it to torch.
        overwrite: whether a pmod run at `output` may be replaced.
    """

    output: Path
    source: Source = field(default_factory=Source)
    pmod: PModConfig | None = field(default_factory=PModConfig)
    model: Path | None = None
    preset: Preset = field(default_factory=Preset)
    steps: int = 400
    batch_size: int = 16
    turns: int = 6
    max_length: int = 2048
    learning_rate: float = 1e-3
    seed: int = 0
    threads: int = 0
    overwrite: bool = False

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: names the option.
        """
        least = {"steps": 1, "batch_size": 1, "turns": 0, "max_length": 1, "seed": 0, "threads": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value < minimum:
                raise InputError(PLACE, _option(name), f"an integer >= {minimum}", value)
        if not 0 < self.learning_rate < 1:
            raise InputError(PLACE, "--learning-rate", "a number in (0, 1)", self.learning_rate)
        sizes = self.preset
        for name in ("image_size", "patch_size", "hidden_size", "layers"):
            if getattr(sizes, name) < 1:
                raise InputError(PLACE, _option(name), "an integer >= 1", getattr(sizes, name))
        if sizes.image_size % sizes.patch_size:
            expected = f"a divisor of --image-size {sizes.image_size}"
            raise InputError(PLACE, "--patch-size", expected, sizes.patch_size)
        if sizes.hidden_size % 32:
            raise InputError(PLACE, "--hidden-size", "a multiple of 32", sizes.hidden_size)


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


def train(options: TrainOptions) -> dict[str, Any]:
    """Train, and leave model, processor and `run.json` in `options.output`.

    Returns:
        The facts of the run, as in `run.json`.

    Raises:
        InputError: an option or the data is not usable, or `output` holds something else; nothing
            is written then.
    """
    options.check()
    with new_run_folder(options.output, options.overwrite, PLACE) as folder:
        if options.threads:
            torch.set_num_threads(options.threads)
        data = options.source.load("train")
        set_seed(options.seed)
        if options.model is None:
            processor = build_processor(
                data.records, options.preset.image_size, options.preset.patch_size
            )
            model = build_model(options.preset, processor, options.pmod)
        else:
            model, processor = load_for_training(options.model, options.pmod, PLACE)
        facts = {**_facts(options, model, data), **_fit(options, model, processor, data, folder)}
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_run(folder, facts)
    return facts


def _fit(
    options: TrainOptions, model: PreTrainedModel, processor: Any, data: Data, folder: Path
) -> dict[str, Any]:
    dataset = ConversationDataset(
        data.records,
        data.folder,
        processor,
        max_turns=options.turns,
        max_length=options.max_length,
        seed=options.seed,
        name=data.name,
    )
    trainer = Trainer(
        model,
        _arguments(options, folder),
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.pad_token_id or 0),
    )
    bar = ProgressBar()
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(bar)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = trainer.train()
    finally:
        bar.close()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    if not torch.tensor(result.training_loss).isfinite():
        got = result.training_loss
        raise InputError(PLACE, "loss", "a finite number", got, "lower --learning-rate")
    losses = [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row]
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "losses": losses}


def _arguments(options: TrainOptions, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        weight_decay=0.01,
        adam_beta2=0.98,  # a run of some hundred steps is too short for the memory of 0.999
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=max(1, options.steps // 60),
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,  # the ops have CPU kernels only
    )


def _facts(options: TrainOptions, model: PreTrainedModel, data: Data) -> dict[str, Any]:
    text = model.config.get_text_config()
    pmod = getattr(model.config, "pmod", None)
    ratios = (
        {} if pmod is None else layer_ratios(PModConfig.from_dict(pmod), text.num_hidden_layers)
    )
    return {
        "model": "dense" if pmod is None else "p-MoD",
        "parameters": sum(_sizes(model)),
        "layers": text.num_hidden_layers,
        "pmod": pmod,
        "ratios": {str(layer): ratio for layer, ratio in ratios.items()},
        "source": options.source.to_dict(),
        "data": data.name,
        "records": len(data.records),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "turns": options.turns,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _sizes(model: PreTrainedModel) -> list[int]:
    tensors: list[Tensor] = list(model.parameters())
    return [tensor.numel() for tensor in tensors]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
