"""pmod::gather_add_rmsnorm: reference.gather_add_rmsnorm.

Forward: one program per slot; the sum is normalised as rounded. Reads 2K rows and writes 2K.
Backward: a fixed number of programs, each with a range of slots, for the gradient of the weight.
The gradient through the norm and those that reached the residual are rounded once. Reads 3K rows
(one of them rows of grad_out, in place) and writes K, and K or 2K more into a grad_x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.launch import LaunchConfig
from pmod_ops._triton.parameter_sum import sum_partials
from pmod_ops._triton.rows import (
    chunk,
    leads_to_one_of,
    load_row,
    load_weight,
    norm_gradient,
    normalise,
    reciprocal_rms,
    rounded_like,
    store_row,
)


@triton.jit(do_not_specialize=["num_rows"])
def gather_add_rmsnorm_kernel(
    x_ptr,
    attn_out_ptr,
    index_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    rstd_ptr,
    num_rows,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per slot."""
    slot = tl.program_id(0)
    row = tl.load(index_ptr + slot)
    if leads_to_one_of(num_rows, row):
        attn_out = load_row(attn_out_ptr, slot, HIDDEN, BLOCK)
        total = load_row(x_ptr, row, HIDDEN, BLOCK) + attn_out
        residual = rounded_like(total, residual_ptr)
        store_row(residual_ptr, slot, residual, HIDDEN, BLOCK)
        weight = load_weight(weight_ptr, HIDDEN, BLOCK)
        rstd = reciprocal_rms(residual, eps, HIDDEN)
        store_row(out_ptr, slot, normalise(residual, rstd, weight, out_ptr), HIDDEN, BLOCK)
        tl.store(rstd_ptr + slot, rstd)
    else:
        zeros = tl.zeros((BLOCK,), tl.float32)
        store_row(residual_ptr, slot, zeros, HIDDEN, BLOCK)
        store_row(out_ptr, slot, zeros, HIDDEN, BLOCK)
        tl.store(rstd_ptr + slot, 0.0)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def gather_add_rmsnorm_backward_kernel(
    grad_x_ptr,
    grad_residual_ptr,
    grad_out_ptr,
    grad_rows_ptr,
    residual_ptr,
    index_ptr,
    weight_ptr,
    rstd_ptr,
    grad_attn_out_ptr,
    partials_ptr,
    num_rows,
    num_slots,
    ACCUMULATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per partial sum. Gradients that are None are not there."""
    weight = load_weight(weight_ptr, HIDDEN, BLOCK)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    begin, end = chunk(num_slots)
    for slot in range(begin, end):
        row = tl.load(index_ptr + slot)
        total = tl.zeros((BLOCK,), tl.float32)
        if leads_to_one_of(num_rows, row):
            if grad_rows_ptr is not None:
                grad = load_row(grad_rows_ptr, slot, HIDDEN, BLOCK)
                residual = load_row(residual_ptr, slot, HIDDEN, BLOCK)
                rstd = tl.load(rstd_ptr + slot)
                of_row, term = norm_gradient(grad, residual, weight, rstd, residual_ptr, HIDDEN)
                of_weight += term
                total += of_row
            if grad_residual_ptr is not None:
                total += load_row(grad_residual_ptr, slot, HIDDEN, BLOCK)
            if grad_out_ptr is not None:
                total += load_row(grad_out_ptr, row, HIDDEN, BLOCK)
            if grad_x_ptr is not None:
                of_x = total
                if ACCUMULATE:
                    of_x += load_row(grad_x_ptr, row, HIDDEN, BLOCK)
                store_row(grad_x_ptr, row, of_x, HIDDEN, BLOCK)
        store_row(grad_attn_out_ptr, slot, total, HIDDEN, BLOCK)
    store_row(partials_ptr, tl.program_id(0), of_weight, HIDDEN, BLOCK)


def launch_config(hidden: int) -> LaunchConfig:
    """Of the forward kernel, which has two rows in registers."""
    return launch.row_config(hidden)


def backward_config(hidden: int) -> LaunchConfig:
    """Of the backward kernel, which has up to four rows, the weight and its sum in registers."""
    return launch.row_config(hidden, elements=8)


def gather_add_rmsnorm(
    x: Tensor, attn_out: Tensor, index: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """pmod::gather_add_rmsnorm."""
    op = "gather_add_rmsnorm"
    x = launch.check_rows(op, "x", x)
    hidden = x.shape[1]
    index = launch.check_numbers(op, "index", index, torch.int32, None, like=x)
    slots = index.shape[0]
    attn_out = launch.check_rows(op, "attn_out", attn_out, like=x, count=slots)
    weight = launch.check_weight(op, "norm_weight", norm_weight, hidden, like=x)
    residual, out = launch.empty(x, slots, hidden), launch.empty(x, slots, hidden)
    rstd = launch.numbers(x, slots)
    if slots:
        config = launch_config(hidden)
        with launch.on_device(x):
            gather_add_rmsnorm_kernel[(slots,)](
                x,
                attn_out,
                index,
                weight,
                residual,
                out,
                rstd,
                x.shape[0],
                eps,
                HIDDEN=hidden,
                BLOCK=config.block,
                **config.options,
            )
    return residual, out, rstd


def gather_add_rmsnorm_backward_(
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
    """pmod::gather_add_rmsnorm_backward_."""
    op = "gather_add_rmsnorm_backward_"
    residual = launch.check_rows(op, "residual", residual)
    slots, hidden = residual.shape
    slot_rows = {"like": residual, "count": slots}
    grad_residual = launch.check_optional_rows(op, "grad_residual", grad_residual, **slot_rows)
    grad_rows = launch.check_optional_rows(op, "grad_rows", grad_rows, **slot_rows)
    grad_out = launch.check_optional_rows(op, "grad_out", grad_out, like=residual)
    rows = torch.iinfo(torch.int32).max if grad_out is None else grad_out.shape[0]
    if grad_x is not None:
        like = residual if grad_out is None else grad_out
        launch.check_rows(op, "grad_x", grad_x, like=like, count=None if like is residual else rows)
        launch.check_mutable(op, "grad_x", grad_x)
        rows = grad_x.shape[0]
    index = launch.check_numbers(op, "index", index, torch.int32, slots, like=residual)
    rstd = launch.check_numbers(op, "rstd", rstd, torch.float32, slots, like=residual)
    weight = launch.check_weight(op, "norm_weight", norm_weight, hidden, like=residual)
    grad_attn_out = launch.empty(residual, slots, hidden)
    partials = launch.numbers(residual, launch.parameter_partials(slots), hidden)
    with launch.on_device(residual):
        if slots:
            config = backward_config(hidden)
            gather_add_rmsnorm_backward_kernel[(partials.shape[0],)](
                grad_x,
                grad_residual,
                grad_out,
                grad_rows,
                residual,
                index,
                weight,
                rstd,
                grad_attn_out,
                partials,
                rows,
                slots,
                ACCUMULATE=accumulate,
                HIDDEN=hidden,
                BLOCK=config.block,
                **config.options,
            )
        return grad_attn_out, sum_partials(partials)


OPS = {
    "gather_add_rmsnorm": gather_add_rmsnorm,
    "gather_add_rmsnorm_backward_": gather_add_rmsnorm_backward_,
}
