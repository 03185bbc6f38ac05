"""What p-MoD adds to a model: the retention schedule, the gate, and which tokens compete."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Curve = Literal["shifted_cosine", "shifted_linear", "constant"]
Activation = Literal["tanh", "sigmoid", "softmax", "none"]
TargetTokens = Literal["vision", "vision_high_res", "all"]
Pool = Literal["sequence", "image", "frame"]


@dataclass(frozen=True)
class PModConfig:
    """Settings of p-MoD (arXiv:2412.04449), immutable and validated, equal after a JSON round trip.

    Attributes:
        schedule: how the retention ratio falls with depth: one of the curves, or a list with an
            entry per layer, a ratio in [0, 1] or None (dense). See `pmod_model.schedule`.
        mean_ratio: mean of the curve before max and min apply; the ratio itself if constant.
        max_ratio: a layer whose ratio is above it stays dense, without a router. A threshold, not a
            clamp.
        min_ratio: floor of the shifted curves.
        decay_depth: layer index at which a shifted curve ends; None = the last layer.
        gate_activation: phi in gate = gate_scale * phi(logit) + gate_bias.
        gate_scale: see `gate_activation`, >= 0.
        gate_bias: see `gate_activation`.
        router_bias: whether the router has a bias.
        gate_attention: weight the attention branch of kept tokens (no kernel serves it yet).
        gate_mlp: weight the MLP branch of kept tokens.
        scale_skipped: weight the hidden state of skipped tokens.
        target_tokens: tokens that may be skipped: those of images, those of their high-resolution
            part, or all.
        pool: the tokens that share one budget: those of a sequence, of an image, or of a view
            ("frame"), of which an image of LLaVA-NeXT has two, its base view and its map.
        layers: indices of the layers that may be routed; None = every layer.

    Raises:
        ValueError: a field is unknown or its value out of range; the message names it.
        TypeError: a value has the wrong type.
    """

    schedule: Curve | Sequence[float | None] = "shifted_cosine"
    mean_ratio: float = 0.5
    max_ratio: float = 0.85
    min_ratio: float = 0.15
    decay_depth: int | None = None
    gate_activation: Activation = "tanh"
    gate_scale: float = 0.2
    gate_bias: float = 1.0
    router_bias: bool = True
    gate_attention: bool = False
    gate_mlp: bool = True
    scale_skipped: bool = True
    target_tokens: TargetTokens = "vision"
    pool: Pool = "sequence"
    layers: Sequence[int] | None = None

    def __new__(cls, *_args: Any, **values: Any) -> PModConfig:
        """Refuse an unknown field, with a suggestion that `__init__` would not make."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f'; did you mean "{close[0]}"?' if close else f"; fields: {', '.join(known)}"
                raise ValueError(f'PModConfig: unknown field "{name}"{hint}')
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            _choice("schedule", self.schedule, get_args(Curve))
        else:
            object.__setattr__(self, "schedule", _ratio_list(self.schedule))
        for name in ("mean_ratio", "max_ratio", "min_ratio"):
            object.__setattr__(self, name, _ratio(name, getattr(self, name)))
        if self.max_ratio < self.min_ratio:
            raise ValueError(
                "PModConfig: max_ratio: expected at least min_ratio,"
                f" got max_ratio {self.max_ratio} < min_ratio {self.min_ratio}"
            )
        if self.decay_depth is not None:
            _integer("decay_depth", self.decay_depth, at_least=1)
        _choice("gate_activation", self.gate_activation, get_args(Activation))
        for name in ("gate_scale", "gate_bias"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.gate_scale < 0:
            raise ValueError(
                f"PModConfig: gate_scale: expected a number >= 0, got {self.gate_scale}"
            )
        for name in ("router_bias", "gate_attention", "gate_mlp", "scale_skipped"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"PModConfig: {name}: expected true or false, got {getattr(self, name)!r}"
                )
        _choice("target_tokens", self.target_tokens, get_args(TargetTokens))
        _choice("pool", self.pool, get_args(Pool))
        if self.layers is not None:
            object.__setattr__(self, "layers", _layer_list(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = asdict(self)
        for name in ("schedule", "layers"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PModConfig:
        """The inverse of `to_dict`; missing fields take their defaults."""
        if not isinstance(values, Mapping):
            raise TypeError(
                f"PModConfig: expected a mapping of fields, got {type(values).__name__}"
            )
        return cls(**values)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"PModConfig: {name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"PModConfig: {name}: expected a finite number, got {value}")
    return float(value)


def _ratio(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"PModConfig: {name}: expected a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"PModConfig: {name}: expected a number in [0, 1], got {value}")
    return float(value)


def _integer(name: str, value: Any, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"PModConfig: {name}: expected an integer >= {at_least}, got {value!r}")
    if value < at_least:
        raise ValueError(f"PModConfig: {name}: expected an integer >= {at_least}, got {value}")
    return value


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        wanted = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"PModConfig: {name}: expected one of {wanted}, got {value!r}")


def _ratio_list(values: Any) -> tuple[float | None, ...]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            "PModConfig: schedule: expected the name of a curve or a list of ratios,"
            f" got {values!r}"
        )
    return tuple(
        None if value is None else _ratio(f"schedule[{i}]", value) for i, value in enumerate(values)
    )


def _layer_list(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"PModConfig: layers: expected a list of layer indices, got {values!r}")
    layers = tuple(_integer(f"layers[{i}]", value, at_least=0) for i, value in enumerate(values))
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"PModConfig: layers: expected ascending indices, got {list(layers)}")
    return layers
