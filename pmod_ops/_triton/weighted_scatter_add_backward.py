"""pmod::weighted_scatter_add_backward: the gradient of reference.weighted_scatter_add.

One visit per row of the gradient; kept rows go to their slot, others to the gradient of x. With a
router, whose gate weighted the skipped rows, their gradient goes on to the logit, and from there to
x and the router; then a fixed number of programs have a range of rows each, else there is one
program per row. Reads 2N rows (those of update only where the gate needs them) and writes N, and K
more each for the gradient of the residual and for zeros in kept rows of grad_x, where asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.gate import SOFTMAX, gate_slope
from pmod_ops._triton.launch import LaunchConfig
from pmod_ops._triton.parameter_sum import sum_partials, sum_values
from pmod_ops._triton.rows import (
    ROUTABLE,
    chunk,
    leads_to_one_of,
    load_raw,
    load_row_if,
    load_weight,
    store_row,
    store_row_if,
)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def weighted_scatter_add_backward_kernel(
    grad_out_ptr,
    x_ptr,
    update_ptr,
    gate_ptr,
    inverse_ptr,
    kind_ptr,
    router_weight_ptr,
    logits_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    grad_update_ptr,
    grad_gate_ptr,
    grad_logits_ptr,
    partials_ptr,
    num_rows,
    num_slots,
    gate_scale,
    ACTIVATION: tl.constexpr,
    GATE_MLP: tl.constexpr,
    SCALE_SKIPPED: tl.constexpr,
    ZERO_KEPT: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per partial sum of the router; if that is None, one per row."""
    begin = tl.program_id(0)
    end = begin + 1
    if router_weight_ptr is not None:
        router = load_weight(router_weight_ptr, HIDDEN, BLOCK)
        of_router = tl.zeros((BLOCK,), tl.float32)
        begin, end = chunk(num_rows)
    for row in range(begin, end):
        slot = tl.load(inverse_ptr + row)
        routable = tl.load(kind_ptr + row) == ROUTABLE
        kept = leads_to_one_of(num_slots, slot)
        gated = routable & kept & GATE_MLP
        scaled = routable & (kept == 0) & SCALE_SKIPPED
        gate = tl.load(gate_ptr + row, mask=gated | scaled, other=1.0)
        grad = load_raw(grad_out_ptr, row, True, HIDDEN, BLOCK)
        wide = grad.to(tl.float32)
        update = load_row_if(update_ptr, slot, gated, HIDDEN, BLOCK)
        x = load_row_if(x_ptr, row, scaled, HIDDEN, BLOCK)
        of_gate = tl.sum(wide * tl.where(kept, update, x), axis=0)
        weighted = gate * wide
        if router_weight_ptr is not None:
            # the gradient of a skipped row's gate goes on
            slope = gate_slope(tl.load(logits_ptr + row), gate_scale, ACTIVATION)
            of_logit = tl.where(scaled, slope * of_gate, 0.0)
            of_gate = tl.where(scaled, 0.0, of_gate)
            weighted = tl.where(scaled, weighted + of_logit * router, weighted)
            of_router += of_logit * x
            tl.store(grad_logits_ptr + row, of_logit)
        tl.store(grad_gate_ptr + row, tl.where(gated | scaled, of_gate, 0.0))
        # that of a row that was copied is copied bit by bit
        out = tl.where(gated | scaled, weighted.to(grad.dtype), grad)
        store_row_if(grad_update_ptr, slot, out, kept, HIDDEN, BLOCK)
        if grad_residual_ptr is not None:
            store_row_if(grad_residual_ptr, slot, grad, kept, HIDDEN, BLOCK)
        if ZERO_KEPT:
            out = tl.where(kept, tl.zeros_like(out), out)
            store_row(grad_x_ptr, row, out, HIDDEN, BLOCK)
        else:
            store_row_if(grad_x_ptr, row, out, kept == 0, HIDDEN, BLOCK)
    if router_weight_ptr is not None:
        store_row(partials_ptr, tl.program_id(0), of_router, HIDDEN, BLOCK)


@triton.jit(do_not_specialize=["num_rows"])
def filler_backward_kernel(
    index_ptr,
    inverse_ptr,
    grad_update_ptr,
    grad_residual_ptr,
    num_rows,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per slot: zeros in the gradients of those that hold no row."""
    slot = tl.program_id(0)
    row = tl.load(index_ptr + slot)
    present = leads_to_one_of(num_rows, row)
    holds_none = tl.load(inverse_ptr + row, mask=present, other=-1) != slot
    zeros = tl.zeros((BLOCK,), tl.float32)
    store_row_if(grad_update_ptr, slot, zeros, holds_none, HIDDEN, BLOCK)
    if grad_residual_ptr is not None:
        store_row_if(grad_residual_ptr, slot, zeros, holds_none, HIDDEN, BLOCK)


def launch_config(hidden: int) -> LaunchConfig:
    """Without a router: two rows in registers."""
    return launch.row_config(hidden)


def router_config(hidden: int) -> LaunchConfig:
    """With one: its weight and its sum, too."""
    return launch.row_config(hidden, elements=8)


def weighted_scatter_add_backward(
    grad_out: Tensor,
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    inverse: Tensor,
    index: Tensor,
    kind: Tensor,
    gate_mlp: bool,
    scale_skipped: bool,
    router_weight: Tensor | None,
    logits: Tensor | None,
    gate_scale: float,
    activation: int,
    write_residual: bool,
    zero_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pmod::weighted_scatter_add_backward."""
    op = "weighted_scatter_add_backward"
    x = launch.check_rows(op, "x", x)
    count, hidden = x.shape
    update = launch.check_rows(op, "update", update, like=x)
    slots = update.shape[0]
    gate, inverse, index, kind = launch.check_maps(op, gate, inverse, index, kind, slots, like=x)
    grad_out = launch.check_rows(op, "grad_out", grad_out, like=x, count=count)
    launch.check_activation(op, activation)
    if (router_weight is None) != (logits is None) or activation == SOFTMAX.value:
        given = (router_weight is not None, logits is not None, activation)
        expected = "logits beside it, and a gate per row"
        launch.fail(op, "router_weight", expected, f"weight, logits, activation: {given}")
    weight = launch.check_optional_weight(op, "router_weight", router_weight, hidden, like=x)
    logits = launch.check_optional_numbers(op, "logits", logits, torch.float32, count, like=x)
    grad_x, grad_update = launch.empty(x, count, hidden), launch.empty(x, slots, hidden)
    residual = launch.empty(x, slots if write_residual else 0, hidden)
    grad_gate = launch.numbers(x, count)
    grad_logits = launch.numbers(x, count if router_weight is not None else 0)
    to_residual = residual if write_residual else None
    folded = weight is not None
    programs = launch.parameter_partials(count) if folded else count
    partials = launch.numbers(x, programs if folded else 0, hidden)
    with launch.on_device(x):
        clear_filler(index, inverse, grad_update, to_residual)
        if count:
            config = router_config(hidden) if folded else launch_config(hidden)
            weighted_scatter_add_backward_kernel[(programs,)](
                grad_out,
                x,
                update,
                gate,
                inverse,
                kind,
                weight,
                logits,
                grad_x,
                to_residual,
                grad_update,
                grad_gate,
                grad_logits,
                partials,
                count,
                slots,
                gate_scale,
                ACTIVATION=activation,
                GATE_MLP=gate_mlp,
                SCALE_SKIPPED=scale_skipped,
                ZERO_KEPT=zero_kept,
                HIDDEN=hidden,
                BLOCK=config.block,
                **config.options,
            )
        if folded:
            sums = sum_partials(partials), sum_values(grad_logits)
        else:
            sums = launch.numbers(x, 0), launch.numbers(x, 0)
    return grad_x, residual, grad_update, grad_gate, *sums


def clear_filler(
    index: Tensor, inverse: Tensor, grad_update: Tensor, grad_residual: Tensor | None
) -> None:
    """Launches filler_backward_kernel."""
    slots, hidden = grad_update.shape
    if slots == 0:
        return
    config = launch_config(hidden)
    filler_backward_kernel[(slots,)](
        index,
        inverse,
        grad_update,
        grad_residual,
        inverse.shape[0],
        HIDDEN=hidden,
        BLOCK=config.block,
        **config.options,
    )
