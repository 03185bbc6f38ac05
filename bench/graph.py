"""The backward pass of an op by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from inputs import Rows
from torch import Tensor

Pick = Callable[[Rows], Sequence[Tensor]]


def backward(forward: Callable[[Rows], Any], leaves: Pick, upstream: Pick) -> Callable[[Rows], Any]:
    """Gradients of `leaves`; the first call on a copy makes its graph, which later ones reuse."""
    graphs: dict[int, Any] = {}

    def call(rows: Rows) -> tuple[Tensor, ...]:
        if id(rows) not in graphs:
            graphs[id(rows)] = forward(rows)
        outputs = graphs[id(rows)]
        return torch.autograd.grad(outputs, leaves(rows), upstream(rows), retain_graph=True)

    return call


def require_grad(*tensors: Tensor) -> None:
    """Make leaves of them."""
    for tensor in tensors:
        tensor.requires_grad_()
