"""Which parameters of a vision-language model a run trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pmod_model.data.errors import InputError
from pmod_model.inject import find_decoder
from pmod_model.models import DecoderModel

PLACE = "train"
PROJECTOR = "multi_modal_projector"


def choose_parts(model: PreTrainedModel, trained: str, lora_rank: int) -> Any:
    """Freeze what is not trained.

    Args:
        model: a LLaVA-style model.
        trained: "everything"; "language", all but the vision tower, as in the paper (section 4.1);
            "projector" alone, LLaVA's first stage; or "lora", adapters on the linear layers of the
            decoder, with the projector, the image newline and the routers trained as they are.
        lora_rank: rank of the adapters.

    Returns:
        `model`, or a `PeftModel` around it.

    Raises:
        InputError: the model has no such part, or PEFT is not installed.
    """
    if trained == "everything":
        return model
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if trained != "lora":
        wanted = PROJECTOR if trained == "projector" else "vision_tower"
        if wanted not in names:
            got = f"a {type(model).__name__} without {wanted}"
            raise InputError(PLACE, f"--trained {trained}", "a LLaVA", got)
        for name, parameter in model.named_parameters():
            inside = f"{wanted}." in name
            parameter.requires_grad_(inside if trained == "projector" else not inside)
        return model
    return _with_adapters(model, names, lora_rank)


def _with_adapters(model: PreTrainedModel, names: set[str], rank: int) -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        hint = "pip install peft"
        raise InputError(PLACE, "--trained lora", "PEFT installed", "none", hint) from None
    decoder: Any = find_decoder(model)
    path = next(name for name, module in model.named_modules() if module is decoder)
    linear = sorted(
        f"{path}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    )
    whole = [PROJECTOR] if PROJECTOR in names else []
    if isinstance(decoder, DecoderModel):
        whole.append("mod_router")
    adapters = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=linear, modules_to_save=whole
    )
    adapted = peft.get_peft_model(model, adapters)
    for name, parameter in adapted.named_parameters():
        if name.endswith("image_newline"):
            parameter.requires_grad_(True)
    return adapted


def merged(model: Any) -> PreTrainedModel:
    """The model with its adapters, if it has any, added to its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
