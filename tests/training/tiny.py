"""A tiny p-MoD LLaVA with dropout, data from (seed, epoch, index), and a run of some steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from pmod_model import PModConfig, inject_pmod
from pmod_model.training.durable import Durability, DurableTrainer

IMAGE = 60
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def make_model() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        attention_dropout=0.1,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    inject_pmod(model, PModConfig(schedule=[1.0, 0.5]))
    return model


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """`sample` says which item of which epoch a batch is made of."""

    def __init__(self, count: int = 6) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        words = torch.randint(1, 50, (3,), generator=generator)
        ids = torch.cat((words[:1], torch.full((4,), IMAGE), words[1:]))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(ids == IMAGE, -100),
            "pixel_values": torch.randn(3, 28, 28, generator=generator),
            "sample": torch.tensor([self.epoch, index]),
        }


class Recorder(DurableTrainer):
    """Keeps the samples that it trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, int]] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.seen += [tuple(row) for row in inputs.pop("sample").tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def make_trainer(folder: Path, steps: int = 4, durable: Any = None, **fields: Any) -> Recorder:
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        **fields,
    }
    trainer = Recorder(
        make_model(),
        TrainingArguments(str(folder), **arguments),
        train_dataset=Samples(),
        eval_dataset=Samples(2),
        durable=durable or Durability(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: Any) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]


def weights(trainer: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """A nested state as {path: leaf}."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, item in items for k, v in leaves(item, f"{name}.{key}").items()}
