"""The Hugging Face Trainer over a tiny p-MoD LLaVA: its arguments, and the gradients of a step."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training import tiny_llava as tiny
from transformers import Trainer, TrainingArguments

RATE = 64.0  # so large that weights lose no digits of the gradients that are taken off them
LABELS = (1, 2, 5, 20, 50, 100, 150, 200)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet: dict[str, Any] = {
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "optim": "adamw_torch",
        "logging_steps": 1,
    }
    return TrainingArguments(str(folder), **{**quiet, **options})


def samples_of_many_lengths() -> list[dict[str, Tensor]]:
    """One image each; from one label to 200."""
    generator = torch.Generator().manual_seed(3)
    token, size = tiny.processor().image_token_id, len(tiny.processor().tokenizer)
    samples = []
    for number, pixels in zip(LABELS, tiny.image_batch(range(8))["pixel_values"], strict=True):
        prompt = torch.tensor([3, *[token] * tiny.IMAGE_TOKENS, 4])
        answer = torch.randint(6, size, (number,), generator=generator)
        ids = torch.cat((prompt, answer))
        labels = torch.cat((torch.full_like(prompt, tiny.IGNORED), answer))
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels[None]})
    return samples


def checkpointing(*, use_reentrant: bool) -> dict[str, Any]:
    """Arguments that turn checkpointing on, by their name in this release of transformers."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


def gradients_of_a_step(
    model: Any, folder: Path, batch: int, accumulation: int, **options: Any
) -> dict[str, Tensor]:
    """What one step of plain SGD over eight samples subtracts from the weights."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(
        model,
        arguments(
            folder,
            **{
                "max_steps": 1,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "max_grad_norm": 0.0,
                "optim": "sgd",
                "learning_rate": RATE,
                "lr_scheduler_type": "constant",
                **options,
            },
        ),
        train_dataset=samples_of_many_lengths(),  # type: ignore[arg-type]
        data_collator=tiny.collator(),
    )
    trainer.train()
    spread = trainer.is_deepspeed_enabled
    trained = trainer.model_wrapped if spread else trainer.model
    state = trainer.accelerator.get_state_dict(trained) or {}  # whole on the first rank at least
    return {name: (before[name] - state[name]) / RATE for name in before if name in state}


def check_whole_batch(found: dict[str, Tensor], folder: Path) -> None:
    """The gradients are those of one batch of all samples.

    Float32 sums over up to 218 tokens come in another order where batches have another shape.
    """
    model = tiny.freeze_vision(tiny.make_model())
    whole = gradients_of_a_step(model, folder, batch=8, accumulation=1)
    scale = max(float(gradient.abs().max()) for gradient in whole.values())
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * scale, name
