"""Run a trained model at other retention ratios: compute is a choice at inference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from pmod_model.configuration import PModConfig
from pmod_model.inject import find_decoder
from pmod_model.models import DecoderModel
from pmod_model.schedule import layer_ratios

FIELDS = ("schedule", "mean_ratio", "max_ratio", "min_ratio", "decay_depth")


def set_ratios(model: PreTrainedModel, **fields: Any) -> dict[int, float]:
    """Give the routed layers of a p-MoD model the ratios of another schedule, in place.

    A layer without a router stays dense, whatever the schedule says of it. A layer with a router
    that the schedule wants dense keeps every token, weighted by its gate as before. The config of
    the model then lists the ratios, so it can be saved.

    Args:
        model: a p-MoD model.
        fields: fields of `PModConfig` that make the schedule: `schedule`, `mean_ratio`,
            `max_ratio`, `min_ratio`, `decay_depth`; the others stay as they are.

    Returns:
        The new ratio of every routed layer.

    Raises:
        ValueError: the model has no routers, or a field is unknown or out of range.

    Example:
        set_ratios(model, mean_ratio=0.3)
    """
    decoder: Any = find_decoder(model)
    if not isinstance(decoder, DecoderModel):
        got = type(model).__name__
        raise ValueError(f"set_ratios: model: expected a p-MoD model, got {got}")
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        expected = ", ".join(FIELDS)
        raise ValueError(f"set_ratios: {unknown[0]}: expected a field of {expected}")
    before: PModConfig = decoder.pmod_config
    layers: Any = decoder.layers
    wanted = layer_ratios(replace(before, **fields), len(layers))
    ratios = {layer: wanted.get(layer, 1.0) for layer in decoder.pmod_ratios}
    listed = [ratios.get(layer) for layer in range(len(layers))]
    after = replace(before, schedule=listed, max_ratio=1.0, layers=None)
    for module in model.modules():
        if hasattr(module, "pmod_config"):
            module.pmod_config = after  # type: ignore[assignment]
    decoder.pmod_ratios = ratios
    model.config.pmod = after.to_dict()
    return ratios
