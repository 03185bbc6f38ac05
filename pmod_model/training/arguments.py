"""From a `TrainConfig` to the arguments of the Hugging Face Trainer."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from pmod_model.training.config import CONFIGS, TrainConfig

ENTRIES = 60
ZERO = ("zero1", "zero2", "zero3")
LOG_OF_EPOCHS = 10


def training_arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    """Arguments that write checkpoints into `folder`; whatever has a GPU trains on it."""
    on_gpu = torch.cuda.is_available()
    usual = LOG_OF_EPOCHS if config.steps is None else max(1, config.steps // ENTRIES)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs or 1.0,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=_warmup(config),
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.precision == "bfloat16",
        use_cpu=not on_gpu,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        include_num_input_tokens_seen="all" if config.padding_free else "non_padding",
        logging_steps=config.log_every or usual,
        report_to=list(config.report_to),
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep,
        deepspeed=_deepspeed(config.deepspeed),
        **_checkpointing(config),
    )


def _warmup(config: TrainConfig) -> float:
    """Steps, at least one; a share below one, which the Trainer takes as such, of epochs."""
    if config.steps is None:
        return config.warmup
    return max(1, int(config.steps * config.warmup))


def _checkpointing(config: TrainConfig) -> dict[str, Any]:
    # releases before 5.20 know the older name only, later ones warn of it
    known = {field.name for field in fields(TrainingArguments)}
    kind = "activation" if "activation_checkpointing" in known else "gradient"
    if not config.gradient_checkpointing:
        return {}
    return {
        f"{kind}_checkpointing": True,
        f"{kind}_checkpointing_kwargs": {"use_reentrant": False},
    }


def _deepspeed(name: str | None) -> str | None:
    return str(CONFIGS / f"{name}.json") if name in ZERO else name
