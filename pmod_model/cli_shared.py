"""Options that several commands have, and what they are turned into."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from pmod_model.configuration import PModConfig
    from pmod_model.training.sources import Source

EASY_VQA_IMAGE = "easy-vqa:"

ImageFolder = Annotated[str | None, typer.Option(help="Folder of the images that the json names.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch.")]
BatchSize = Annotated[int, typer.Option(help="Conversations or questions at a time.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer in tokens.")]
Run = Annotated[Path, typer.Option(help="Run folder, made by pmod train.")]


def quiet(threads: int = 0) -> None:
    """Leave one progress bar at a time: silence those of loading and saving weights."""
    if threads < 0:
        raise typer.BadParameter(f"expected an integer >= 0, got {threads}", param_hint="--threads")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)


def assignments(given: Sequence[str], option: str) -> dict[str, Any]:
    """Values by name from field=value; a value that is not JSON is text."""
    values: dict[str, Any] = {}
    for setting in given:
        name, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"expected field=value, got {setting!r}", param_hint=option)
        try:
            values[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            values[name.strip()] = value
    return values


def pmod_config(settings: Sequence[str]) -> PModConfig:
    """Settings from field=value."""
    from pmod_model.configuration import PModConfig

    try:
        return PModConfig(**assignments(settings, "--pmod"))
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error), param_hint="--pmod") from None


def data_source(data: str, image_folder: str | None) -> Source:
    """Where records come from."""
    from pmod_model.training.sources import Source

    return Source(data, image_folder)


def find_image(name: str, place: str) -> Image:
    """The image file of this name, or easy-vqa:N. `place` is named in errors."""
    from pmod_model.data.easyvqa import easy_vqa_records
    from pmod_model.data.errors import InputError
    from pmod_model.data.images import open_image, resolve_image

    if not name.startswith(EASY_VQA_IMAGE):
        return open_image(Path(name), place)
    number = name.removeprefix(EASY_VQA_IMAGE)
    if not number.isdecimal():
        raise InputError(place, "--image", "easy-vqa:NUMBER", name)
    _, folder = easy_vqa_records("test")
    return open_image(resolve_image(folder, f"{number}.png", place), place)
