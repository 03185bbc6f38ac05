"""gather_add_rmsnorm: kept rows plus attention, and the RMSNorm of the sum, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmod_ops._carry import carry_of, mark_residual, stand_in
from pmod_ops._checks import (
    acc_dtype,
    check_eps,
    check_routing,
    check_rows,
    check_slots,
    check_vector,
)
from pmod_ops._library import (
    GradientBuffer,
    autograd,
    chain,
    define,
    fake,
    flat,
    inference,
    refuse_double_backward,
)
from pmod_ops.gather import results
from pmod_ops.route import needs_grad
from pmod_ops.routing import Routing

define(
    "gather_add_rmsnorm(Tensor x, Tensor attn_out, Tensor index, Tensor norm_weight, float eps)"
    " -> (Tensor residual, Tensor rows, Tensor rstd)"
)
define(
    "gather_add_rmsnorm_backward_(Tensor(a!)? grad_x, Tensor? grad_residual, Tensor? grad_out,"
    " Tensor? grad_rows, Tensor residual, Tensor index, Tensor norm_weight, Tensor rstd,"
    " bool accumulate)"
    " -> (Tensor grad_attn_out, Tensor grad_norm_weight)"
)


@fake("gather_add_rmsnorm")
def _gather_add_rmsnorm_fake(
    x: Tensor, attn_out: Tensor, index: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (index.shape[0], x.shape[1])
    rstd = x.new_empty(index.shape[0], dtype=acc_dtype(x.dtype))
    return x.new_empty(shape), x.new_empty(shape), rstd


@fake("gather_add_rmsnorm_backward_")
def _gather_add_rmsnorm_backward_fake(
    grad_x: Tensor | None,
    grad_residual: Tensor | None,
    grad_out: Tensor | None,
    grad_rows: Tensor | None,
    residual: Tensor,
    index: Tensor,
    norm_weight: Tensor,
    rstd: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    grad_weight = residual.new_empty(residual.shape[1], dtype=acc_dtype(residual.dtype))
    return residual.new_empty(residual.shape), grad_weight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _attn_out, index, norm_weight, _eps = inputs
    residual, _rows, rstd = output
    ctx.save_for_backward(x, residual, index, norm_weight, rstd)


def _backward(
    ctx: Any,
    grad_residual: Tensor | None,
    grad_rows: Tensor | None,
    grad_rstd: Tensor | None,
    *,
    grad_x: Tensor | None = None,
) -> Any:
    x, residual, index, norm_weight, rstd = ctx.saved_tensors
    if grad_residual is None and grad_rows is None:
        return grad_x, None, None, None, None
    buffer = GradientBuffer(grad_x, x, ctx)
    grad_attn_out, grad_norm_weight = torch.ops.pmod.gather_add_rmsnorm_backward_(
        buffer.rows,
        grad_residual,
        None,
        grad_rows,
        residual,
        index,
        norm_weight,
        rstd,
        buffer.accumulate,
    )
    return buffer.release(), grad_attn_out, None, grad_norm_weight.to(norm_weight.dtype), None


autograd("gather_add_rmsnorm", _setup, _backward)
_gather_add_rmsnorm_chain = chain("gather_add_rmsnorm", _setup, _backward)
_gather_add_rmsnorm = inference("gather_add_rmsnorm")


class _Carried(torch.autograd.Function):
    """The op for the x of a `Carry`: the kept rows' gradient goes to its stand-in, not to x.

    The last output stands for the rows of the residual in [N, D], see `mark_residual`.
    """

    @staticmethod
    def forward(x: Tensor, kept: Tensor, *args: Any) -> Any:
        out = torch.ops.pmod.gather_add_rmsnorm(flat(x), *args)
        return *out, stand_in(x, x.numel() // x.shape[-1], x.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _x, _kept, _attn_out, index, norm_weight, _eps = inputs
        residual, _rows, rstd, _of_residual = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(residual, index, norm_weight, rstd)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_double_backward("gather_add_rmsnorm")
        grad_residual, grad_rows, _grad_rstd, grad_out = grads
        if grad_residual is None and grad_rows is None and grad_out is None:
            return (None,) * 6
        residual, index, norm_weight, rstd = ctx.saved_tensors
        grad_attn_out, grad_weight = torch.ops.pmod.gather_add_rmsnorm_backward_(
            None, grad_residual, grad_out, grad_rows, residual, index, norm_weight, rstd, False
        )
        grad_weight = grad_weight.to(norm_weight.dtype)
        return None, grad_attn_out, grad_attn_out, None, grad_weight, None


def gather_add_rmsnorm(
    x: Tensor,
    attn_out: Tensor,
    routing: Routing,
    norm_weight: Tensor,
    eps: float = 1e-6,
    *,
    return_x: bool = False,
) -> Any:
    """Add the attention output to the kept rows and normalise: the middle of a pre-norm layer.

    `residual = x[routing.index] + attn_out; rows = RMSNorm(residual)`. The residual is rounded
    once, and normalised as rounded. Both are zero in filler slots, whatever `attn_out` holds there.

    Args:
        x: [N, D] or [B, S, D], fp32, bf16, fp16 or fp64; made contiguous if it is not.
        attn_out: [K, D], or [B, max_kept, D] for a padded routing, in the dtype of x (any float
            dtype under autocast).
        routing: of the same N rows.
        norm_weight: [D], in the dtype of x or fp32.
        eps: added to the mean square, >= 0.
        return_x: also return x, for the next reader of x.

    Returns:
        residual and rows, both like `attn_out` in the dtype of x; then x if `return_x`. For the x
        that `route_gather` returned, gradients go past x and residual, see `weighted_scatter_add`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, eps or the routing does not fit x.
    """
    op = "gather_add_rmsnorm"
    check_rows(op, "x", x)
    check_routing(op, routing, x)
    check_eps(op, eps)
    weight = check_vector(op, "norm_weight", norm_weight, x)
    attn = check_slots(op, "attn_out", attn_out, routing, x)
    arguments = (attn, routing.index, weight, eps)
    carry, of_residual = carry_of(routing, x), None
    if carry is not None:
        residual, rows, _rstd, of_residual = _Carried.apply(x, carry.kept, *arguments)
    elif return_x and needs_grad(x, attn, weight):
        residual, rows, _rstd, x = _gather_add_rmsnorm_chain(x, *arguments)
    else:
        residual, rows, _rstd = _gather_add_rmsnorm(flat(x), *arguments)
    residual, rows = residual.view(attn_out.shape), rows.view(attn_out.shape)
    if of_residual is not None:
        mark_residual(residual, of_residual, routing)
    return results(residual, rows, x if return_x else None)
