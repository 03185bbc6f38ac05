"""TRL's SFTTrainer, unchanged: conversations with images, full weights and LoRA."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training import tiny_llava as tiny
from training.trainer_runs import checkpointing

from pmod_model import record_routing

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is optional"),
    # PEFT still asks transformers for the old name of activation checkpointing
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # where TRL reports nothing to its authors


def conversations() -> Any:
    """easy-VQA as messages and images, the columns that TRL expects."""
    from datasets import Dataset

    records, folder = tiny.records()
    rows = {"messages": [], "images": []}
    for record in records[:8]:
        messages = []
        for turn in record.turns[:2]:
            messages.append({"role": "user", "content": turn.text})
            messages.append({"role": "assistant", "content": turn.answer})
        rows["messages"].append(messages)
        rows["images"].append([Image.open(folder / record.images[0]).convert("RGB")])
    return Dataset.from_dict(rows)


def make_trainer(folder: Path, **options: Any) -> Any:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    fields = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "max_length": None,  # so that no image is cut
        **checkpointing(use_reentrant=False),
        **options.pop("fields", {}),
    }
    return SFTTrainer(
        tiny.make_model(),
        SFTConfig(str(folder), **fields),
        train_dataset=conversations(),
        processing_class=tiny.processor(),
        **options,
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_sft_trains_routers(reentrant: bool, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, fields={"bf16": True, **checkpointing(use_reentrant=reentrant)}
    )
    before = routers(trainer.model)
    with record_routing(trainer.model) as records:
        trainer.train()
    assert {tuple(record.kept) for record in records} == {(0, 1, 2)}
    assert all(record.target_mask.sum() == 2 * tiny.IMAGE_TOKENS for record in records)
    after = routers(trainer.model)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)


def test_sft_with_lora_trains_routers_whole(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is optional")
    lora = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["mod_router", "multi_modal_projector"],
    )
    trainer = make_trainer(tmp_path, peft_config=lora)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        trained = any(part in name for part in ("lora_", "modules_to_save"))
        assert parameter.requires_grad == trained, name
        assert torch.equal(parameter, before[name]) != trained, name


def routers(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if "mod_router" in name
    }
