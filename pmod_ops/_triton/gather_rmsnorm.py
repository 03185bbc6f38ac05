"""pmod::gather_rmsnorm: reference.gather_rmsnorm.

Forward: one program per slot, with the row in registers. Reads K rows and writes K. Backward: a
fixed number of programs, each with a range of slots, for the gradient of the weight. Reads 2K rows
(K more where it adds) and writes K.
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
    store_row,
)


@triton.jit(do_not_specialize=["num_rows"])
def gather_rmsnorm_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
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
        x = load_row(x_ptr, row, HIDDEN, BLOCK)
        weight = load_weight(weight_ptr, HIDDEN, BLOCK)
        rstd = reciprocal_rms(x, eps, HIDDEN)
        store_row(out_ptr, slot, normalise(x, rstd, weight, out_ptr), HIDDEN, BLOCK)
        tl.store(rstd_ptr + slot, rstd)
    else:
        store_row(out_ptr, slot, tl.zeros((BLOCK,), tl.float32), HIDDEN, BLOCK)
        tl.store(rstd_ptr + slot, 0.0)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def gather_rmsnorm_backward_kernel(
    grad_x_ptr,
    grad_rows_ptr,
    x_ptr,
    index_ptr,
    weight_ptr,
    rstd_ptr,
    partials_ptr,
    num_rows,
    num_slots,
    ACCUMULATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per partial sum."""
    weight = load_weight(weight_ptr, HIDDEN, BLOCK)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    begin, end = chunk(num_slots)
    for slot in range(begin, end):
        row = tl.load(index_ptr + slot)
        if leads_to_one_of(num_rows, row):
            grad = load_row(grad_rows_ptr, slot, HIDDEN, BLOCK)
            x = load_row(x_ptr, row, HIDDEN, BLOCK)
            rstd = tl.load(rstd_ptr + slot)
            of_x, term = norm_gradient(grad, x, weight, rstd, grad_x_ptr, HIDDEN)
            of_weight += term
            if ACCUMULATE:
                of_x += load_row(grad_x_ptr, row, HIDDEN, BLOCK)
            store_row(grad_x_ptr, row, of_x, HIDDEN, BLOCK)
    store_row(partials_ptr, tl.program_id(0), of_weight, HIDDEN, BLOCK)


def launch_config(hidden: int) -> LaunchConfig:
    """Of the forward kernel, which has a row in registers."""
    return launch.row_config(hidden)


def backward_config(hidden: int) -> LaunchConfig:
    """Of the backward kernel, which has two rows, the weight and its sum in registers."""
    return launch.row_config(hidden, elements=8)


def normalise_rows(
    op: str, x: Tensor, index: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x[index], and 1 / rms; x and index are checked."""
    hidden, slots = x.shape[1], index.shape[0]
    weight = launch.check_weight(op, "norm_weight", norm_weight, hidden, like=x)
    out, rstd = launch.empty(x, slots, hidden), launch.numbers(x, slots)
    if slots:
        config = launch_config(hidden)
        gather_rmsnorm_kernel[(slots,)](
            x,
            index,
            weight,
            out,
            rstd,
            x.shape[0],
            eps,
            HIDDEN=hidden,
            BLOCK=config.block,
            **config.options,
        )
    return out, rstd


def gather_rmsnorm(
    x: Tensor, index: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """pmod::gather_rmsnorm."""
    op = "gather_rmsnorm"
    x = launch.check_rows(op, "x", x)
    index = launch.check_numbers(op, "index", index, torch.int32, None, like=x)
    with launch.on_device(x):
        return normalise_rows(op, x, index, norm_weight, eps)


def gather_rmsnorm_backward_(
    grad_x: Tensor,
    grad_rows: Tensor,
    x: Tensor,
    index: Tensor,
    norm_weight: Tensor,
    rstd: Tensor,
    accumulate: bool,
) -> Tensor:
    """pmod::gather_rmsnorm_backward_."""
    op = "gather_rmsnorm_backward_"
    x = launch.check_rows(op, "x", x)
    hidden = x.shape[1]
    index = launch.check_numbers(op, "index", index, torch.int32, None, like=x)
    slots = index.shape[0]
    grad_rows = launch.check_rows(op, "grad_rows", grad_rows, like=x, count=slots)
    rstd = launch.check_numbers(op, "rstd", rstd, torch.float32, slots, like=x)
    launch.check_mutable(op, "grad_x", grad_x, like=x)
    weight = launch.check_weight(op, "norm_weight", norm_weight, hidden, like=x)
    partials = launch.numbers(x, launch.parameter_partials(slots), hidden)
    with launch.on_device(x):
        if slots:
            config = backward_config(hidden)
            gather_rmsnorm_backward_kernel[(partials.shape[0],)](
                grad_x,
                grad_rows,
                x,
                index,
                weight,
                rstd,
                partials,
                x.shape[0],
                slots,
                ACCUMULATE=accumulate,
                HIDDEN=hidden,
                BLOCK=config.block,
                **config.options,
            )
        return sum_partials(partials)


OPS = {"gather_rmsnorm": gather_rmsnorm, "gather_rmsnorm_backward_": gather_rmsnorm_backward_}
