"""LoRA and QLoRA: routers and projector are trained, saved and found again, or missed by name.

Adapters without projector or router are a common loss: LLaVA#1373, LLaVA#1592, LLaVA#784.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import tiny_llava as tiny
from training.ranks import environment
from training.trainer_runs import arguments, checkpointing
from transformers import BitsAndBytesConfig, Trainer

from pmod_model import load_pretrained
from pmod_model.data.errors import InputError
from pmod_model.training.adapters import load_adapter

peft = pytest.importorskip("peft", reason="PEFT is optional")
WEIGHTS = "adapter_model.safetensors"
SAVED = ["mod_router", "multi_modal_projector"]
# PEFT still asks transformers for the old name of activation checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def with_lora(model: Any, saved: list[str] = SAVED) -> Any:
    lora = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)", modules_to_save=saved
    )
    return peft.get_peft_model(model, lora)


def train(model: Any, folder: Path, **options: Any) -> None:
    trainer = Trainer(
        model,
        arguments(
            folder, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, **options
        ),
        train_dataset=tiny.dataset(),
        data_collator=tiny.collator(),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    # take off the autocast that accelerate put around its forward pass
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or "modules_to_save" in name
        assert parameter.requires_grad == trained, name
        assert torch.equal(parameter, before[name]) != trained, name


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**tiny.image_batch([0, 1])).logits


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """A model, an adapter trained on it, and the logits of both together."""
    tiny.make_model().save_pretrained(tmp_path / "model")
    model = with_lora(load_pretrained(tmp_path / "model"))
    train(model, tmp_path / "run", bf16=True, **checkpointing(use_reentrant=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter", logits(model)


def test_another_process_computes_the_same(
    adapter: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    worker = Path(__file__).with_name("adapters_worker.py")
    command = [sys.executable, str(worker), str(adapter[0]), str(adapter[1])]
    run = subprocess.run(
        [*command, str(tmp_path / "logits.safetensors")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], adapter[2])


@pytest.mark.parametrize("missing", [*SAVED, "lora_B"])
def test_missing_tensors_are_named(adapter: tuple[Path, Path, torch.Tensor], missing: str) -> None:
    weights = load_file(adapter[1] / WEIGHTS)
    kept = {name: value for name, value in weights.items() if missing not in name}
    assert len(kept) < len(weights)
    save_file(kept, adapter[1] / WEIGHTS)
    with pytest.raises(InputError, match=rf"expected what adapter_config.json names.*{missing}"):
        load_adapter(load_pretrained(adapter[0]), adapter[1])


def test_broken_folders_are_refused(adapter: tuple[Path, Path, torch.Tensor]) -> None:
    base, folder, _ = adapter
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="expected whole tensors"):
        load_adapter(load_pretrained(base), folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"expected a folder with {WEIGHTS}"):
        load_adapter(load_pretrained(base), folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"expected a folder with adapter_config\.json"):
        load_adapter(load_pretrained(base), folder)


def test_untrained_routers_need_trained_ones(tmp_path: Path) -> None:
    model = tiny.make_model()
    for name, parameter in model.named_parameters():
        if "mod_router" in name:
            parameter.data.zero_()
    model.save_pretrained(tmp_path / "model")
    with_lora(model, ["multi_modal_projector"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"expected routers in it.*modules_to_save"):
        load_adapter(load_pretrained(tmp_path / "model"), tmp_path / "adapter")
    # trained ones of the model itself will do
    load_adapter(tiny.make_model(), tmp_path / "adapter")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is optional"
)
def test_qlora_trains_over_weights_of_four_bits(tmp_path: Path) -> None:
    # its kernels for CPUs want rows and columns in multiples of 64
    sizes = replace(tiny.SIZES, hidden_size=256)
    tiny.make_model(sizes=sizes).save_pretrained(tmp_path / "model")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        # what is trained whole, and the tower, stay as they are
        llm_int8_skip_modules=["lm_head", "model.multi_modal_projector", "model.vision_tower"],
    )
    options: dict[str, Any] = {"quantization_config": four_bits, "dtype": torch.bfloat16}
    base: Any = load_pretrained(tmp_path / "model", **options)
    layer = base.model.language_model.layers[1]
    assert layer.mlp.up_proj.weight.dtype == torch.uint8
    assert layer.mod_router.weight.dtype == torch.bfloat16
    prepared = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = with_lora(prepared)
    train(model, tmp_path / "run", bf16=True, **checkpointing(use_reentrant=False))
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(saved["modules_to_save"]) == set(SAVED)
    again: Any = peft.prepare_model_for_kbit_training(
        load_pretrained(tmp_path / "model", **options), use_gradient_checkpointing=False
    )
    assert torch.equal(logits(load_adapter(again, tmp_path / "adapter")), logits(model))
