"""pmod::gather: reference.gather. Bitwise copies; sums round once.

One program per slot. No two slots hold the same row, so backward writes rows of the gradient of x
without atomics. Reads K rows and writes K; backward reads K (2K where it adds) and writes K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.launch import LaunchConfig
from pmod_ops._triton.rows import (
    leads_to_one_of,
    load_raw,
    store_row,
    store_row_if,
)


@triton.jit(do_not_specialize=["num_rows"])
def gather_kernel(x_ptr, index_ptr, out_ptr, num_rows, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """One program per slot."""
    slot = tl.program_id(0)
    row = tl.load(index_ptr + slot)
    present = leads_to_one_of(num_rows, row)
    store_row(out_ptr, slot, load_raw(x_ptr, row, present, HIDDEN, BLOCK), HIDDEN, BLOCK)


@triton.jit(do_not_specialize=["num_rows"])
def gather_backward_kernel(
    grad_x_ptr,
    grad_rows_ptr,
    index_ptr,
    num_rows,
    ACCUMULATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per slot."""
    slot = tl.program_id(0)
    row = tl.load(index_ptr + slot)
    present = leads_to_one_of(num_rows, row)
    grad = load_raw(grad_rows_ptr, slot, present, HIDDEN, BLOCK)
    if ACCUMULATE:
        before = load_raw(grad_x_ptr, row, present, HIDDEN, BLOCK)
        total = before.to(tl.float32) + grad.to(tl.float32)
        store_row_if(grad_x_ptr, row, total, present, HIDDEN, BLOCK)
    else:
        store_row_if(grad_x_ptr, row, grad, present, HIDDEN, BLOCK)


def launch_config(hidden: int) -> LaunchConfig:
    """Of both kernels, which have a row or two in registers."""
    return launch.row_config(hidden)


def copy_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], zeros where the index leads nowhere; checked arguments."""
    hidden, slots = x.shape[1], index.shape[0]
    out = launch.empty(x, slots, hidden)
    if slots:
        config = launch_config(hidden)
        gather_kernel[(slots,)](
            x,
            index,
            out,
            x.shape[0],
            HIDDEN=hidden,
            BLOCK=config.block,
            **config.options,
        )
    return out


def gather(x: Tensor, index: Tensor) -> Tensor:
    """pmod::gather."""
    op = "gather"
    x = launch.check_rows(op, "x", x)
    index = launch.check_numbers(op, "index", index, torch.int32, None, like=x)
    with launch.on_device(x):
        return copy_rows(x, index)


def gather_backward_(grad_x: Tensor, grad_rows: Tensor, index: Tensor, accumulate: bool) -> None:
    """pmod::gather_backward_."""
    op = "gather_backward_"
    launch.check_mutable(op, "grad_x", grad_x)
    index = launch.check_numbers(op, "index", index, torch.int32, None, like=grad_x)
    slots = index.shape[0]
    grad_rows = launch.check_rows(op, "grad_rows", grad_rows, like=grad_x, count=slots)
    if slots == 0:
        return
    config = launch_config(grad_x.shape[1])
    with launch.on_device(grad_x):
        gather_backward_kernel[(slots,)](
            grad_x,
            grad_rows,
            index,
            grad_x.shape[0],
            ACCUMULATE=accumulate,
            HIDDEN=grad_x.shape[1],
            BLOCK=config.block,
            **config.options,
        )


OPS = {"gather": gather, "gather_backward_": gather_backward_}
