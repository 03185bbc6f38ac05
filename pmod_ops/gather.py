"""gather: kept rows, unchanged (p-MoD, arXiv:2412.04449, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmod_ops._checks import check_routing, check_rows, fail
from pmod_ops._library import (
    GradientBuffer,
    autograd,
    chain,
    define,
    fake,
    flat,
    inference,
)
from pmod_ops.routing import Layout, Routing

define("gather(Tensor x, Tensor index) -> Tensor")
define("gather_backward_(Tensor(a!) grad_x, Tensor grad_rows, Tensor index, bool accumulate) -> ()")


@fake("gather")
def _gather_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


@fake("gather_backward_")
def _gather_backward_fake(
    grad_x: Tensor, grad_rows: Tensor, index: Tensor, accumulate: bool
) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_rows: Tensor | None, *, grad_x: Tensor | None = None) -> Any:
    x, index = ctx.saved_tensors
    if grad_rows is None:
        return grad_x, None
    buffer = GradientBuffer(grad_x, x, ctx)
    torch.ops.pmod.gather_backward_(buffer.rows, grad_rows, index, buffer.accumulate)
    return buffer.release(), None


autograd("gather", _setup, _backward)
_gather_chain = chain("gather", _setup, _backward)
_gather = inference("gather")


def gather(
    x: Tensor, routing: Routing, *, layout: Layout | None = None, return_x: bool = False
) -> Any:
    """Copy the kept rows: `x[routing.index]`.

    Args:
        x: [N, D] or [B, S, D], fp32, bf16, fp16 or fp64; made contiguous if it is not.
        routing: of the same N rows.
        layout: "padded" gives right-aligned [B, max_kept, D], zeros in filler slots, and its mask;
            None keeps the layout of the routing.
        return_x: also return x, for the next reader of x (one gradient buffer for all readers).

    Returns:
        rows [K, D] in the dtype of x ([B, max_kept, D] if the routing is padded); then the mask
        bool [B, max_kept] if `layout="padded"`; then x if `return_x`.

    Raises:
        TypeError: x is not a tensor or of an unsupported dtype.
        ValueError: the routing was made for another number of rows or another device, or the
            layout is unknown.
    """
    check_rows("gather", "x", x)
    check_routing("gather", routing, x)
    routing, mask = as_layout("gather", routing, layout)
    if return_x and x.requires_grad:
        rows, x = _gather_chain(x, routing.index)
    else:
        rows = _gather(flat(x), routing.index)
    return results(routing.rows(rows), mask, x if return_x else None)


def as_layout(op: str, routing: Routing, layout: Layout | None) -> tuple[Routing, Tensor | None]:
    """The routing in the layout asked for, and the mask that goes with an explicit "padded"."""
    if layout is None or (layout == "packed" and routing.layout == "packed"):
        return routing, None
    if layout == "padded":
        routing = routing.padded()
        return routing, routing.mask
    return fail(op, "layout", f"None or 'padded' for {routing.layout} rows", repr(layout))


def results(*tensors: Tensor | None) -> Any:
    """One tensor, or the tuple of those that are there."""
    present = tuple(t for t in tensors if t is not None)
    return present[0] if len(present) == 1 else present
