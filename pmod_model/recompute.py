"""Gradient checkpointing that saves what a layer selected, and computes only the rest again.

A checkpointed layer runs twice. The second run needs the same tokens as the first: scoring and
selecting again would cost time, and might choose others where arithmetic is not repeatable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pmod_ops import gather, gather_rmsnorm  # noqa: F401  (registers the ops used below)

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

ROUTE_GATHER = torch.ops.pmod.route_gather.default
Selection = tuple[Tensor, ...]


class SavesSelection(_Base):
    """Mixed into models: their routed layers save the selection when they are checkpointed."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for module in self.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if hasattr(module, "mod_router") and function is not None:
                module._gradient_checkpointing_func = saving_selection(function)  # type: ignore[assignment]


def saving_selection(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint` that saves selections; as it is if it is reentrant or has contexts of its own.

    Reentrant checkpointing knows no contexts: it selects again, from the same numbers.
    """
    options = checkpoint.keywords if isinstance(checkpoint, partial) else {}
    if options.get("use_reentrant") is not False or "context_fn" in options:
        return checkpoint
    return partial(checkpoint, context_fn=selection_contexts)


def selection_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """For `context_fn` of torch's checkpoint: contexts of the first run and of the second."""
    saved: list[Selection] = []
    return _Save(saved), _Reuse(saved)


class _Save(TorchDispatchMode):
    def __init__(self, saved: list[Selection]) -> None:
        super().__init__()
        self.saved = saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is ROUTE_GATHER:
            logits, gate, index, inverse, _rows, _rstd, scratch = out
            self.saved.append((logits, gate, index, inverse, scratch))
        return out


class _Reuse(TorchDispatchMode):
    def __init__(self, saved: list[Selection]) -> None:
        super().__init__()
        self.saved = saved
        self.rest: Iterator[Selection] = iter(())

    def __enter__(self) -> Any:
        self.rest = iter(self.saved)  # a graph that is retained runs the layer once more
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not ROUTE_GATHER:
            return func(*args, **(kwargs or {}))
        logits, gate, index, inverse, scratch = next(self.rest)
        x, norm_weight, eps = args[0], args[-2], args[-1]
        if norm_weight is None:
            rows = torch.ops.pmod.gather(x, index)
            rstd = x.new_empty(0, dtype=logits.dtype)
        else:
            rows, rstd = torch.ops.pmod.gather_rmsnorm(x, index, norm_weight, eps)
        return logits, gate, index, inverse, rows, rstd, scratch
