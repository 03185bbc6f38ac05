"""Two ranks on gloo train as one does, whatever spreads the model, and images may be on one only.

Ranks that disagree about which parameters have a gradient hang or abort: LLaVA#1746,
ms-swift#9655, Qwen3-VL#126, torchtitan#4777, and with unused parameters pytorch#43259.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import tiny_llava as tiny
from training.ranks import needs_deepspeed, run_torchrun
from training.ranks_tasks import logits, norms, unfused
from training.trainer_runs import check_whole_batch

from pmod_model import load_pretrained


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "fsdp2",
        pytest.param("zero1", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("zero2", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("zero3", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_two_ranks_train_as_one(engine: str, tmp_path: Path) -> None:
    tiny.make_model(pmod=None).save_pretrained(tmp_path / "plain")
    log = run_torchrun(tmp_path, engine)
    assert "rank 0 agrees" in log
    assert "rank 1 agrees" in log
    if engine == "ddp":  # a step of the Trainer, see test_accumulation_weighs_by_labels
        check_whole_batch(load_file(tmp_path / "gradients.safetensors"), tmp_path)
    model = load_pretrained(tmp_path / "whole")
    if engine == "zero3":
        for norm in norms(model):
            norm.register_forward_hook(unfused)
        spread = load_file(tmp_path / "spread.safetensors")["logits"]
        assert torch.equal(logits(model, tiny.image_batch([0, 1])), spread)
    saved = load_file(tmp_path / "logits.safetensors")["logits"]
    assert torch.equal(logits(model, tiny.image_batch([0, 1])), saved)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_in_bfloat16(stage: int, tmp_path: Path) -> None:
    log = run_torchrun(tmp_path, f"zero{stage}-bf16")
    assert "rank 0 agrees" in log
    assert "rank 1 agrees" in log
