"""LoRA on the backbone and a trained copy of the routers (PEFT's modules_to_save)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft", reason="PEFT is optional")

IMAGE = 120


# PEFT still asks transformers for the old name of activation checkpointing
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_routers_in_modules_to_save_train_and_come_back(
    make_llava: Callable[..., Any], one_image_each: dict[str, Tensor], tmp_path: Path
) -> None:
    labels = one_image_each["input_ids"].masked_fill(one_image_each["input_ids"] == IMAGE, -100)
    options = {"max_new_tokens": 6, "do_sample": False}
    lora = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|down_proj)",
        modules_to_save=["mod_router"],
    )
    model = peft.get_peft_model(make_llava(), lora)
    model(**one_image_each, labels=labels).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads
    assert all(grad is not None for grad in grads.values())
    routers = [grad for name, grad in grads.items() if "mod_router.modules_to_save" in name]
    assert any(grad.any() for grad in routers)

    before = model(**one_image_each).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mod_router.modules_to_save" in name:
                parameter.normal_()
    trained = model(**one_image_each).logits
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(model(**one_image_each).logits, before)

    tokens = model.eval().generate(**one_image_each, **options)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_llava(), tmp_path).eval()
    assert torch.equal(again(**one_image_each).logits, trained)
    assert torch.equal(again.generate(**one_image_each, **options), tokens)
