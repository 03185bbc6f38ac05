"""The Hugging Face Trainer, unchanged: which parameters train, checkpointing, bf16, loss weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import tiny_llava as tiny
from training.ranks import needs_deepspeed, run_torchrun
from training.trainer_runs import (
    arguments,
    check_whole_batch,
    checkpointing,
    gradients_of_a_step,
)
from transformers import Trainer

STAGES = {
    "all": (".",),
    "recipe": ("language_model", "lm_head", "projector"),
    "projector": ("projector",),
    "projector and routers": ("projector", "mod_router"),
}
UNUSED = ("vision_tower.head", "vision_tower.post_layernorm")  # LLaVA reads the last layer itself


def train(model: Any, folder: Path, **options: Any) -> list[float]:
    trainer = Trainer(
        model,
        arguments(folder, max_steps=3, per_device_train_batch_size=2, **options),
        train_dataset=tiny.dataset(),
        data_collator=tiny.collator(),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_frozen_trains(stage: str, tmp_path: Path) -> None:
    model = tiny.make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in STAGES[stage]) or stage == "all")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, tmp_path, learning_rate=1e-2, weight_decay=0.0)
    assert all(0 < loss < 10 for loss in losses)
    for name, parameter in model.named_parameters():
        still = torch.equal(parameter, before[name])
        trains = parameter.requires_grad and not any(part in name for part in UNUSED)
        # R = 1 and R = 0: the gate of one is 1 + 0.2 tanh all the same, so every router learns
        assert still != trains, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_changes_no_loss(reentrant: bool, bf16: bool, tmp_path: Path) -> None:
    def losses(**options: Any) -> list[float]:
        model = tiny.freeze_vision(tiny.make_model())
        return train(model, tmp_path, bf16=bf16, learning_rate=1e-3, seed=1, **options)

    plain = losses()
    again = losses(**checkpointing(use_reentrant=reentrant))
    assert again == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_accumulation_weighs_by_labels(batch: int, tmp_path: Path) -> None:
    """As HF#34191, HF#35438, unsloth-zoo#1023."""
    model = tiny.freeze_vision(tiny.make_model())
    found = gradients_of_a_step(model, tmp_path, batch, 8 // batch)
    check_whole_batch(found, tmp_path)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_ranks_weigh_by_labels(engine: str, tmp_path: Path) -> None:
    run_torchrun(tmp_path, f"accumulate-{engine}")
    check_whole_batch(load_file(tmp_path / "gradients.safetensors"), tmp_path)
