"""The next layer's router scores, handed over at inference.

The op that writes the rows of a routed layer can score them for the next one while they are in
registers. A routed layer right after another thus does without the pass that scores its input.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

RouterParameters = tuple[Tensor, Tensor | None]


class HandOver:
    """Carries scores from a layer to the next within one forward pass; never kept on a module.

    Scores belong to three tensors: the rows, the router's weight and its bias. Only a layer that
    has these very tensors, unchanged, takes them; any other scores its input itself. So whatever
    happens between two layers (a hook, a move to another device, another adapter) may cost a pass
    but cannot make scores wrong. Only a change that autograd would not notice either, one through
    `.data`, goes unnoticed.

    Nothing is handed over where gradients are recorded, since these scores have none; nor under
    `inference_mode`, whose tensors do not count their changes; nor under `torch.compile`, which
    cannot trace the comparison and may compile each layer by itself.

    Args:
        layers: the layers of the decoder, by index; none = nothing is handed over.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        self._layers = layers
        self._given: tuple[Tensor, list[tuple[weakref.ref[Tensor], int]]] | None = None

    def next_router(self, layer: int, x: Tensor) -> RouterParameters | None:
        """Weight and bias of the layer after `layer`, to score rows like x [B, S, D] with.

        None if that layer has no router or scores for itself.
        """
        if torch.compiler.is_compiling() or not _enabled() or layer + 1 >= len(self._layers):
            return None
        router: Any = getattr(self._layers[layer + 1], "mod_router", None)
        if router is None or not _within_reach(router, x):
            return None
        weight, bias = router(x)
        fits = _fits(weight, (1, x.shape[-1]), x) and (bias is None or _fits(bias, (1,), x))
        return (weight, bias) if fits else None

    def give(self, logits: Tensor, rows: Tensor, router: RouterParameters) -> None:
        """Leave the `logits` of `rows`, scored with `router`, for the next layer."""
        # weak, so that no hidden states live longer for it
        marks = [(weakref.ref(t), t._version) for t in (rows, *router) if t is not None]
        self._given = logits, marks

    def take(self, rows: Tensor, router: RouterParameters) -> Tensor | None:
        """The logits of `rows`, if the layer before left them. They can be taken once."""
        if torch.compiler.is_compiling():
            return None
        given, self._given = self._given, None
        if given is None or not _enabled():
            return None
        logits, marks = given
        tensors = [t for t in (rows, *router) if t is not None]
        same = len(marks) == len(tensors) and all(
            reference() is tensor and version == tensor._version
            for (reference, version), tensor in zip(marks, tensors, strict=True)
        )
        return logits if same else None


def _enabled() -> bool:
    return not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _within_reach(router: nn.Module, x: Tensor) -> bool:
    """Whether the parameters are there although it is not their layer's turn.

    Offloading, sharding and quantisation keep them elsewhere or in another form until then, and to
    call the module early would set them in motion.
    """
    if any(hasattr(module, "_hf_hook") for module in router.modules()):
        return False
    return all(
        # one of ZeRO-3 has an id; its ranks must call modules in one order
        type(parameter) is nn.Parameter
        and not hasattr(parameter, "ds_id")
        and _present(parameter, x)
        for parameter in router.parameters()
    )


def _present(tensor: Tensor, x: Tensor) -> bool:
    # a sharded tensor that was given back has its shape and no storage
    return tensor.device == x.device and tensor.untyped_storage().nbytes() > 0


def _fits(tensor: Any, shape: tuple[int, ...], x: Tensor) -> bool:
    """Whether the op takes this weight or bias for `x`, and changes of it are counted."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.shape == shape
        and tensor.dtype in (x.dtype, torch.float32)
        and _present(tensor, x)
        and not tensor.is_inference()
    )
