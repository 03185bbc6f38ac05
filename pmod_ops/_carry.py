"""Short cuts for gradients between the ops of one routed layer: see `Carry`.

Autograd asks every reader of x for a dense gradient and adds them up. Within a layer less will do:
which rows each reader owns is known. Stand-ins make that visible to autograd, so that a gradient
goes where it is needed, is summed with any other that gets there, and is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmod_ops._library import chain_mark
from pmod_ops.routing import Carry, Routing


def stand_in(x: Tensor, *shape: int) -> Tensor:
    """A tensor of that shape without memory: only its gradient is of use."""
    return torch.empty_strided(shape, (0,) * len(shape), dtype=x.dtype, device=x.device)


def carry_of(routing: Routing, x: Tensor) -> Carry | None:
    """The carry of `routing`, if gradients are recorded and may take it.

    x and the selection must be what came with it, unchanged, and nobody may watch the gradient of
    x, which goes past it.
    """
    carry = routing.carry
    if carry is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    same = chain_mark(x) is carry.chain and x._version == carry.version
    same &= routing.index is carry.index and routing.inverse is carry.inverse
    return carry if same and not _watched(x) else None


def mark_residual(residual: Tensor, rows: Tensor, routing: Routing) -> None:
    """Note that the gradient of `residual` may be given as that of `rows` [N, D] at its index."""
    mark = (rows, routing.index, routing.inverse, residual._version)
    residual._pmod_rows = mark  # pyright: ignore[reportAttributeAccessIssue]


def rows_of_residual(residual: Tensor, routing: Routing) -> Tensor | None:
    """The stand-in noted for `residual`, if it is untouched and nobody watches its gradient."""
    if torch.compiler.is_compiling():
        return None
    rows, index, inverse, version = getattr(residual, "_pmod_rows", (None,) * 4)
    same = index is routing.index and inverse is routing.inverse and residual._version == version
    return rows if same and not _watched(residual) else None


def _watched(tensor: Tensor) -> bool:
    return tensor.retains_grad or bool(tensor._backward_hooks)
