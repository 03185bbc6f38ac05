"""Builds and loads the models that the commands work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from pmod_model.configuration import PModConfig
from pmod_model.data.errors import InputError
from pmod_model.llava import PModLlavaConfig, PModLlavaForConditionalGeneration
from pmod_model.llava_next import PModLlavaNextConfig, PModLlavaNextForConditionalGeneration
from pmod_model.loading import load_pretrained
from pmod_model.training.preset import Preset

# what becomes of a dense LLaVA
OWN_TYPES: dict[str, tuple[Any, Any]] = {
    "llava": (PModLlavaConfig, PModLlavaForConditionalGeneration),
    "llava_next": (PModLlavaNextConfig, PModLlavaNextForConditionalGeneration),
}
SHOWN = 20


def build_model(preset: Preset, processor: Any, pmod: PModConfig | None) -> PreTrainedModel:
    """A from-scratch model for `processor`'s vocabulary: p-MoD, or dense if `pmod` is None.

    Under one seed both start from the same weights; the routers of p-MoD start at zero.
    """
    if pmod is None:
        return LlavaForConditionalGeneration(
            preset.llava_config(processor.tokenizer, processor.image_token_id)
        )
    fields = preset.config(processor.tokenizer, processor.image_token_id)
    return PModLlavaForConditionalGeneration(PModLlavaConfig(pmod=pmod, **fields))


def load_for_training(
    folder: Path, pmod: PModConfig | None, place: str
) -> tuple[PreTrainedModel, Any]:
    """A LLaVA checkpoint and its processor: dense as it is, or with routers.

    Args:
        folder: checkpoint of a LLaVA, or of a p-MoD model, which keeps its own settings.
        pmod: settings of the routers that a LLaVA gets; None trains it dense.
        place: named in errors.

    Raises:
        InputError: `folder` holds no model, or a p-MoD model although `pmod` is None.
    """
    config, processor = _read(folder, place)
    if getattr(config, "pmod", None) is not None and pmod is None:
        got = "a p-MoD model"
        raise InputError(place, f"--model {str(folder)!r}", "a dense model with --dense", got)
    # a half-precision checkpoint is trained in float32: there is no loss scaling here
    return _load(folder, config, place, pmod=pmod, dtype=torch.float32), processor


def load_model(folder: Path, place: str) -> tuple[PreTrainedModel, Any]:
    """A trained model, p-MoD or dense, in evaluation mode, and its processor.

    Raises:
        InputError: `folder` holds no model.
    """
    config, processor = _read(folder, place)
    return _load(folder, config, place).eval(), processor


def _load(
    folder: Path, config: Any, place: str, *, pmod: PModConfig | None = None, **options: Any
) -> PreTrainedModel:
    """The model in `folder`, complete; only the routers that `pmod` adds may be missing."""
    try:
        if getattr(config, "pmod", None) is not None:
            return load_pretrained(folder, **options)
        if pmod is not None and config.model_type not in OWN_TYPES:
            return load_pretrained(folder, pmod=pmod, **options)
        loader: Any = AutoModelForImageTextToText
        if pmod is not None:
            config_class, loader = OWN_TYPES[config.model_type]
            options["config"] = config_class(pmod=pmod, **config.to_dict())
        model, info = loader.from_pretrained(folder, output_loading_info=True, **options)
    except (SafetensorError, RuntimeError) as error:
        got = str(error).splitlines()[0]
        raise InputError(place, f"--model {str(folder)!r}", "complete weights", got) from None
    missing = [key for key in info["missing_keys"] if ".mod_router." not in key]
    for keys, what in ((missing, "without"), (info["unexpected_keys"], "with surplus")):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            got = f"weights {what} {', '.join(sorted(keys)[:SHOWN])}{more}"
            raise InputError(place, f"--model {str(folder)!r}", "complete weights", got)
    return model


def _read(folder: Path, place: str) -> tuple[Any, Any]:
    argument = f"--model {str(folder)!r}"
    if not (folder / "config.json").is_file():
        got = "no folder" if not folder.is_dir() else "no config.json in it"
        raise InputError(place, argument, "a folder with a saved model", got)
    if not any(folder.glob("*.safetensors")):
        raise InputError(place, argument, "weights in .safetensors files", "none")
    try:
        config, processor = (
            AutoConfig.from_pretrained(folder),
            AutoProcessor.from_pretrained(folder),
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(place, argument, "a model and processor of transformers", error) from None
    if not hasattr(processor, "image_processor"):
        got = f"a {type(processor).__name__}"
        raise InputError(place, argument, "a processor of images and text", got)
    return config, processor
