"""A trial run at injection time: does a routed layer that keeps everything equal the original?

It catches backbones that look like pre-norm blocks and are not, before they give wrong answers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pmod_model.context import RoutingContext
from pmod_model.layer import RoutedLayer
from pmod_ops import RoutingPlan

TOKENS = 4


@dataclass(frozen=True, eq=False)
class Trial:
    """What the original layer `index` makes of `x` and the arguments that its model gives it."""

    index: int
    x: Tensor
    arguments: dict[str, Any]
    expected: Any


class _Captured(Exception):
    """Raised by the hook to leave the model once the first layer's arguments are known."""


def trial_inputs(decoder: nn.Module, layers: Sequence[Any], routed: Collection[int]) -> list[Trial]:
    """Run one layer of every class that will be routed, as it is now.

    Nothing is run where parameters have no values yet (a checkpoint is being loaded).
    """
    like = layers[0].input_layernorm.weight
    if like.is_meta or like.numel() == 0:
        return []
    x = torch.randn(1, TOKENS, like.shape[0], generator=torch.Generator().manual_seed(0))
    # small, so that the branches outweigh the residual stream they are added to
    x = (x * 0.01).to(like.device, like.dtype)
    arguments = _layer_arguments(decoder, layers[0], x)
    first_of_class = {type(layers[index]): index for index in sorted(routed, reverse=True)}
    trials = []
    for index in first_of_class.values():
        with _evaluating(layers[index]):
            trials.append(Trial(index, x, arguments, layers[index](x, **arguments)))
    return trials


def check_layers(layers: Sequence[Any], trials: Sequence[Trial]) -> int | None:
    """The index of a layer that differs from its original when it keeps every token, or None."""
    for trial in trials:
        layer: RoutedLayer = layers[trial.index]
        x = trial.x
        keep_all = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        plan = RoutingPlan.from_mask(keep_all, None, {layer.self_attn.layer_idx: 1.0})
        arguments = {
            name: value
            for name, value in trial.arguments.items()
            if name not in ("attention_mask", "position_ids")
        }
        if not isinstance(trial.expected, Tensor):
            return trial.index
        with _evaluating(layer):
            got = layer.route_tokens(x, RoutingContext(plan, None), **arguments)
        branch, expected = (got - x).double(), (trial.expected - x).double()
        tolerance = max(1e-5, 8 * torch.finfo(x.dtype).eps)
        if (branch - expected).abs().max() > tolerance * expected.abs().max():
            return trial.index
    return None


def _layer_arguments(decoder: nn.Module, layer: nn.Module, x: Tensor) -> dict[str, Any]:
    captured: dict[str, Any] = {}

    def capture(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        captured.update(kwargs)
        raise _Captured

    handle = layer.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad():
            decoder(inputs_embeds=x, use_cache=False)
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured


@contextmanager
def _evaluating(layer: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and the training mode as it was afterwards."""
    training = layer.training
    with torch.no_grad():
        layer.eval()
        yield
        layer.train(training)
