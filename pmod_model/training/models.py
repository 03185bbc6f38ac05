"""Builds and loads the models that the commands work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from pmod_model.loading import load_pretrained
from pmod_model.training.preset import Preset


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
    if getattr(config, "pmod", None) is not None:
        if pmod is None:
            got = "a p-MoD model"
            raise InputError(place, f"--model {str(folder)!r}", "a dense model with --dense", got)
        return load_pretrained(folder), processor
    if pmod is None:
        return AutoModelForImageTextToText.from_pretrained(folder), processor
    if config.model_type == "llava":
        fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        own = PModLlavaConfig(pmod=pmod, **fields)
        return PModLlavaForConditionalGeneration.from_pretrained(folder, config=own), processor
    return load_pretrained(folder, pmod=pmod), processor


def load_model(folder: Path, place: str) -> tuple[PreTrainedModel, Any]:
    """A trained model, p-MoD or dense, in evaluation mode, and its processor.

    Raises:
        InputError: `folder` holds no model.
    """
    config, processor = _read(folder, place)
    if getattr(config, "pmod", None) is not None:
        return load_pretrained(folder).eval(), processor
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), processor


def _read(folder: Path, place: str) -> tuple[Any, Any]:
    argument = f"--model {str(folder)!r}"
    if not (folder / "config.json").is_file():
        got = "no folder" if not folder.is_dir() else "no config.json in it"
        raise InputError(place, argument, "a folder with a saved model", got)
    if not any(folder.glob("*.safetensors")):
        raise InputError(place, argument, "weights in .safetensors files", "none")
    try:
        return AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(place, argument, "a model and processor of transformers", error) from None
