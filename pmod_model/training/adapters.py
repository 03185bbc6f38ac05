"""Load LoRA adapters of p-MoD models, and refuse those that are not complete.

PEFT saves what `LoraConfig.modules_to_save` names beside the low-rank matrices: here the routers
(`mod_router`) and the projector (`multi_modal_projector`). Without them it loads an adapter all the
same, and the model answers with untrained ones.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pmod_model.data.errors import InputError
from pmod_model.router import Router

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHOWN = 5
PLACE = "adapter"


def load_adapter(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> Any:
    """The `PeftModel` of a p-MoD model and an adapter saved with `save_pretrained`.

    Args:
        model: the model that the adapter was trained on, with the weights it had then.
        folder: holds adapter_config.json and adapter_model.safetensors.
        is_trainable: whether training goes on; otherwise the adapter is frozen.

    Raises:
        InputError: a file is missing or damaged, tensors are missing or surplus, or neither the
            model nor the adapter has trained routers. If tensors are missing or surplus, `model`
            has an untrained adapter in it by then; load it anew.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            hint = "save one with model.save_pretrained(folder)"
            raise InputError(PLACE, str(folder), f"a folder with {name}", "none in it", hint)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise InputError(PLACE, str(folder / WEIGHTS), "whole tensors", error) from None
    _check_routers(model, weights.keys(), folder)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    loaded = get_peft_model(model, config)
    _check_keys(loaded, weights.keys(), folder)
    set_peft_model_state_dict(loaded, weights)
    return loaded.train(is_trainable)


def _check_routers(model: PreTrainedModel, saved: Set[str], folder: Path) -> None:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers or any(".mod_router." in key for key in saved):
        return
    if not any(bool(parameter.any()) for router in routers for parameter in router.parameters()):
        hint = 'train with LoraConfig(modules_to_save=["mod_router"])'
        expected = "routers in it, because those of the model are untrained"
        raise InputError(PLACE, str(folder / WEIGHTS), expected, "none", hint)


def _check_keys(loaded: Any, saved: Set[str], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(loaded))
    for keys, what in ((expected - saved, "without"), (saved - expected, "with surplus")):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            got = f"one {what} {', '.join(sorted(keys)[:SHOWN])}{more}"
            raise InputError(PLACE, str(folder / WEIGHTS), f"what {CONFIG} names", got)
