"""gather_rmsnorm: RMSNorm of the kept rows; the un-normalised rows are never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmod_ops._checks import acc_dtype, check_eps, check_routing, check_rows, check_vector
from pmod_ops._library import GradientBuffer, autograd, chain, define, fake, flat, inference
from pmod_ops.gather import as_layout, results
from pmod_ops.routing import Layout, Routing

define(
    "gather_rmsnorm(Tensor x, Tensor index, Tensor norm_weight, float eps)"
    " -> (Tensor rows, Tensor rstd)"
)
define(
    "gather_rmsnorm_backward_(Tensor(a!) grad_x, Tensor grad_rows, Tensor x, Tensor index,"
    " Tensor norm_weight, Tensor rstd, bool accumulate) -> Tensor"
)


@fake("gather_rmsnorm")
def _gather_rmsnorm_fake(
    x: Tensor, index: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    slots = index.shape[0]
    return x.new_empty(slots, x.shape[1]), x.new_empty(slots, dtype=acc_dtype(x.dtype))


@fake("gather_rmsnorm_backward_")
def _gather_rmsnorm_backward_fake(
    grad_x: Tensor,
    grad_rows: Tensor,
    x: Tensor,
    index: Tensor,
    norm_weight: Tensor,
    rstd: Tensor,
    accumulate: bool,
) -> Tensor:
    return x.new_empty(x.shape[1], dtype=acc_dtype(x.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, index, norm_weight, _eps = inputs
    _rows, rstd = output
    ctx.save_for_backward(x, index, norm_weight, rstd)


def _backward(
    ctx: Any, grad_rows: Tensor | None, grad_rstd: Tensor | None, *, grad_x: Tensor | None = None
) -> Any:
    x, index, norm_weight, rstd = ctx.saved_tensors
    if grad_rows is None:
        return grad_x, None, None, None
    buffer = GradientBuffer(grad_x, x, ctx)
    grad_norm_weight = torch.ops.pmod.gather_rmsnorm_backward_(
        buffer.rows, grad_rows, flat(x), index, norm_weight, rstd, buffer.accumulate
    )
    return buffer.release(), None, grad_norm_weight.to(norm_weight.dtype), None


autograd("gather_rmsnorm", _setup, _backward)
_gather_rmsnorm_chain = chain("gather_rmsnorm", _setup, _backward)
_gather_rmsnorm = inference("gather_rmsnorm")


def gather_rmsnorm(
    x: Tensor,
    routing: Routing,
    norm_weight: Tensor,
    eps: float = 1e-6,
    *,
    layout: Layout | None = None,
    return_x: bool = False,
) -> Any:
    """Normalise the kept rows: `RMSNorm(x[routing.index])`.

    The row is normalised in float32, rounded to the dtype of x, multiplied by the weight and
    rounded again, as transformers' LlamaRMSNorm does for a weight of the dtype of x.

    Args:
        x: [N, D] or [B, S, D], fp32, bf16, fp16 or fp64; made contiguous if it is not.
        routing: of the same N rows.
        norm_weight: [D], in the dtype of x or fp32.
        eps: added to the mean square, >= 0.
        layout: "padded" gives right-aligned [B, max_kept, D], zeros in filler slots, and its mask;
            None keeps the layout of the routing.
        return_x: also return x, for the next reader of x.

    Returns:
        rows [K, D] in the dtype of x ([B, max_kept, D] if the routing is padded); then the mask if
        `layout="padded"`; then x if `return_x`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, eps or the routing does not fit x.
    """
    check_rows("gather_rmsnorm", "x", x)
    check_routing("gather_rmsnorm", routing, x)
    check_eps("gather_rmsnorm", eps)
    weight = check_vector("gather_rmsnorm", "norm_weight", norm_weight, x)
    routing, mask = as_layout("gather_rmsnorm", routing, layout)
    if return_x and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        rows, _rstd, x = _gather_rmsnorm_chain(x, routing.index, weight, eps)
    else:
        rows, _rstd = _gather_rmsnorm(flat(x), routing.index, weight, eps)
    return results(routing.rows(rows), mask, x if return_x else None)
