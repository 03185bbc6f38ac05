"""The backward of what reads x: reference.route, gather_rmsnorm and route_gather.

The gradient of the gathered row, if it was kept, of its logit, and what came to it another way, go
to the gradient of x with one rounding. A fixed number of programs, each with a range of rows of x,
for the gradients of the router's weight and the norm's. Reads 3K rows (2K without grad_kept; K more
where it adds) and writes K; of the rows that were not kept, reads 2 and writes 1 where their logit
has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.launch import LaunchConfig
from pmod_ops._triton.parameter_sum import sum_partials, sum_values
from pmod_ops._triton.rows import (
    chunk,
    leads_to_one_of,
    load_row,
    load_row_if,
    load_weight,
    norm_gradient,
    store_row,
)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def readers_backward_kernel(
    grad_x_ptr,
    grad_rows_ptr,
    grad_kept_ptr,
    x_ptr,
    grad_logits_ptr,
    inverse_ptr,
    router_weight_ptr,
    norm_weight_ptr,
    rstd_ptr,
    router_partials_ptr,
    norm_partials_ptr,
    num_rows,
    num_slots,
    OVERWRITE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per partial sum. Gradients, the map and the norm that are None are not there."""
    router_sum = tl.zeros((BLOCK,), tl.float32)
    norm_sum = tl.zeros((BLOCK,), tl.float32)
    begin, end = chunk(num_rows)
    for row in range(begin, end):
        z = tl.load(grad_logits_ptr + row)
        slot = tl.full((), -1, tl.int32)
        if inverse_ptr is not None:
            slot = tl.load(inverse_ptr + row)
        kept = leads_to_one_of(num_slots, slot)
        visited = z != 0.0
        if OVERWRITE or grad_rows_ptr is not None or grad_kept_ptr is not None:
            visited = visited | kept
        if visited:
            total = tl.zeros((BLOCK,), tl.float32)
            if norm_weight_ptr is not None:  # noqa: SIM102 - known when it is compiled, kept is not
                if kept:
                    grad = load_row(grad_rows_ptr, slot, HIDDEN, BLOCK)
                    x = load_row(x_ptr, row, HIDDEN, BLOCK)
                    weight = load_weight(norm_weight_ptr, HIDDEN, BLOCK)
                    rstd = tl.load(rstd_ptr + slot)
                    total, term = norm_gradient(grad, x, weight, rstd, x_ptr, HIDDEN)
                    norm_sum += term
            written = (kept & OVERWRITE) == 0
            total += load_row_if(grad_x_ptr, row, written, HIDDEN, BLOCK)
            if grad_rows_ptr is not None and norm_weight_ptr is None:
                total += load_row_if(grad_rows_ptr, slot, kept, HIDDEN, BLOCK)
            if grad_kept_ptr is not None:
                total += load_row_if(grad_kept_ptr, slot, kept, HIDDEN, BLOCK)
            if z != 0.0:
                router_sum += z * load_row(x_ptr, row, HIDDEN, BLOCK)
                total += z * load_weight(router_weight_ptr, HIDDEN, BLOCK)
            store_row(grad_x_ptr, row, total, HIDDEN, BLOCK)
    store_row(router_partials_ptr, tl.program_id(0), router_sum, HIDDEN, BLOCK)
    if norm_weight_ptr is not None:
        store_row(norm_partials_ptr, tl.program_id(0), norm_sum, HIDDEN, BLOCK)


class Gathered(NamedTuple):
    """Gradients of gathered rows, and where these are; checked.

    Attributes:
        grad_rows: of the rows as gathered, or None.
        grad_kept: that reached the kept rows another way, or None.
        inverse: slot of every row.
        slots: how many there are.
        norm_weight: None: the rows were copied.
        rstd: of every slot, with a norm weight.
        overwrite: kept rows of the gradient of x hold nothing yet.
    """

    grad_rows: Tensor | None = None
    grad_kept: Tensor | None = None
    inverse: Tensor | None = None
    slots: int = 0
    norm_weight: Tensor | None = None
    rstd: Tensor | None = None
    overwrite: bool = False


def launch_config(hidden: int) -> LaunchConfig:
    """Two sums, and up to five rows and weights in registers."""
    return launch.row_config(hidden, elements=8)


def readers_backward(
    grad_x: Tensor, x: Tensor, z: Tensor, router_weight: Tensor, gathered: Gathered | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of router weight, router bias and norm weight, which is empty without a norm.

    `z` is the gradient of the logits; without `gathered`, nothing else reads x. Arguments are
    checked.
    """
    gathered = gathered or Gathered()
    rows, hidden = x.shape
    normed = gathered.norm_weight is not None
    parts = launch.parameter_partials(rows)
    of_router = launch.numbers(x, parts, hidden)
    of_norm = launch.numbers(x, parts, hidden if normed else 0)
    if rows:
        # a norm without a gradient of its rows is none
        norm_weight = None if gathered.grad_rows is None else gathered.norm_weight
        if norm_weight is None:
            of_norm.zero_()
        config = launch_config(hidden)
        readers_backward_kernel[(parts,)](
            grad_x,
            gathered.grad_rows,
            gathered.grad_kept,
            x,
            z,
            gathered.inverse,
            router_weight,
            norm_weight,
            gathered.rstd,
            of_router,
            of_norm,
            rows,
            gathered.slots,
            OVERWRITE=gathered.overwrite,
            HIDDEN=hidden,
            BLOCK=config.block,
            **config.options,
        )
    of_norm_weight = sum_partials(of_norm) if normed else launch.numbers(x, 0)
    return sum_partials(of_router), sum_values(z), of_norm_weight
