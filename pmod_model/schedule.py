"""Progressive ratio decay: the retention ratio of every layer (p-MoD, arXiv:2412.04449).

Pure functions. Layer i of a curve of depth d (0 at the first layer, d at the last):

    shifted cosine   rho(i) = cos(i * pi / d) / 2 + mean
    shifted linear   rho(i) = 1/2 - i / d + mean
    constant         rho(i) = mean

A layer is routed if rho(i) <= max_ratio, with the ratio max(rho(i), min_ratio); a layer above
max_ratio is dense. The authors' code hard-codes d = 31, which fits 32 layers only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from pmod_model.configuration import PModConfig


def shifted_cosine(layer: int, depth: int, mean: float) -> float:
    """Half a cosine period from mean + 1/2 at layer 0 to mean - 1/2 at layer `depth`."""
    return math.cos(layer * math.pi / depth) / 2 + mean


def shifted_linear(layer: int, depth: int, mean: float) -> float:
    """A line from mean + 1/2 at layer 0 to mean - 1/2 at layer `depth`."""
    return (0.5 - layer / depth) + mean


CURVES: dict[str, Callable[[int, int, float], float]] = {
    "shifted_cosine": shifted_cosine,
    "shifted_linear": shifted_linear,
}


def layer_ratios(config: PModConfig, num_layers: int) -> dict[int, float]:
    """Retention ratio of every routed layer, keyed by layer index; dense layers are absent.

    `min_ratio` is the floor of the shifted curves only: constant and listed ratios are meant as
    they are written. `max_ratio` and `layers` apply to every schedule.

    Raises:
        ValueError: a listed schedule has another length than the model has layers, or `layers`
            names a layer that the model does not have.
    """
    if not isinstance(config.schedule, str) and len(config.schedule) != num_layers:
        raise ValueError(
            f"PModConfig: schedule: expected {num_layers} ratios, one per layer,"
            f" got {len(config.schedule)}"
        )
    layers = range(num_layers) if config.layers is None else config.layers
    if layers and layers[-1] >= num_layers:
        raise ValueError(
            f"PModConfig: layers: expected indices 0..{num_layers - 1}, got {layers[-1]}"
        )
    ratios = {layer: _ratio(config, layer, num_layers) for layer in layers}
    return {
        layer: ratio
        for layer, ratio in ratios.items()
        if ratio is not None and ratio <= config.max_ratio
    }


def _ratio(config: PModConfig, layer: int, num_layers: int) -> float | None:
    if not isinstance(config.schedule, str):
        return config.schedule[layer]
    if config.schedule == "constant":
        return config.mean_ratio
    depth = config.decay_depth or max(num_layers - 1, 1)
    # min_ratio <= max_ratio, so the floor cannot lift a ratio over the threshold
    return max(CURVES[config.schedule](layer, depth, config.mean_ratio), config.min_ratio)


def warn_of_other_depth(config: PModConfig, trained: int | None, num_layers: int) -> None:
    """Warn where a checkpoint was trained with another number of layers.

    A curve is stretched over the layers that there are, so each gets another ratio than before.
    """
    if trained not in (None, num_layers) and isinstance(config.schedule, str):
        warnings.warn(
            f"p-MoD: trained with {trained} layers, and this model has {num_layers}: its layers get"
            " other retention ratios than they were trained with",
            stacklevel=3,
        )
