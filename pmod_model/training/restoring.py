"""What the Trainer does not restore by itself: weights that are saved under other names, epochs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from pmod_model.data.errors import InputError

SHOWN = 20


def load_weights(model: Any, folder: Path, place: str) -> bool:
    """Load the safetensors files of a checkpoint into `model`, every tensor of it, in place.

    `save_pretrained` renames the weights of some models (LLaVA's are on disk as
    `language_model.model...`), and the Trainer, which looks for the names in memory, then loads
    none of them and only logs so.

    Returns:
        False, and nothing is loaded, if the checkpoint is not made of plain weights of a
        `PreTrainedModel` (adapters, sharded optimisers), or its saved form is more than a renaming.

    Raises:
        InputError: a tensor is missing, surplus or of another shape; lists them.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths or not isinstance(model, PreTrainedModel):
        return False
    names = _names_on_disk(model)
    if names is None:
        return False
    loaded: dict[str, Tensor] = {}
    for path in paths:
        loaded.update((names.get(name, name), tensor) for name, tensor in load_file(path).items())
    present = model.state_dict()
    filled = {present[name].data_ptr() for name in loaded if name in present}
    missing = [n for n, t in present.items() if n not in loaded and t.data_ptr() not in filled]
    missing = sorted(set(missing) - set(model._keys_to_ignore_on_save or ()))
    surplus = sorted(set(loaded) - set(present))
    shapes = [n for n in loaded if n in present and loaded[n].shape != present[n].shape]
    for wrong, what in ((missing, "without"), (surplus, "with surplus"), (shapes, "misshapen")):
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            got = f"weights {what} {', '.join(wrong[:SHOWN])}{more}"
            raise InputError(place, f"resume from {folder}", "the weights of this model", got)
    model.load_state_dict(loaded, strict=False)
    return True


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the data set and every sampler below a loader which epoch begins."""
    parts, waiting = [], [loader.dataset, getattr(loader, "batch_sampler", None)]
    while waiting:
        part = waiting.pop()
        if part is None or any(part is other for other in parts):
            continue
        parts.append(part)
        waiting += [getattr(part, "batch_sampler", None), getattr(part, "sampler", None)]
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the generators of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _names_on_disk(model: PreTrainedModel) -> dict[str, str] | None:
    """{name on disk: name in memory}, or None if saving changes more than names."""
    present = model.state_dict()
    saved = revert_weight_conversion(model, dict(present))
    in_memory = {id(tensor): name for name, tensor in present.items()}
    if len(saved) != len(present) or any(id(tensor) not in in_memory for tensor in saved.values()):
        return None
    return {name: in_memory[id(tensor)] for name, tensor in saved.items()}
