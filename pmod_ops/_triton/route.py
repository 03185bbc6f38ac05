"""pmod::route and pmod::select: reference.route.

Scores: one program per row; rows that are not routable are not read. Reads V rows. Selection is in
select.py and select_long.py, the backward in logit_gradient.py and readers_backward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.launch import LaunchConfig
from pmod_ops._triton.logit_gradient import logit_gradient
from pmod_ops._triton.plan import (
    Gate,
    Plan,
    Selected,
    check_gate,
    check_logits,
    check_plan,
    empty_selection,
)
from pmod_ops._triton.readers_backward import readers_backward
from pmod_ops._triton.rows import ROUTABLE, dot, load_row, load_weight
from pmod_ops._triton.select import fits, select_short
from pmod_ops._triton.select_long import select_long


@triton.jit
def score_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    kind_ptr,
    logits_ptr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: x . w + b if it is routable, else 0."""
    row = tl.program_id(0)
    logit = tl.full((), 0.0, tl.float32)
    if tl.load(kind_ptr + row) == ROUTABLE:
        weight = load_weight(weight_ptr, HIDDEN, BLOCK)
        logit = dot(load_row(x_ptr, row, HIDDEN, BLOCK), weight)
        if bias_ptr is not None:
            logit += tl.load(bias_ptr).to(tl.float32)
    tl.store(logits_ptr + row, logit)


def launch_config(hidden: int) -> LaunchConfig:
    """Of score_kernel. Like that of weighted_scatter_add, see `rows.dot`."""
    return launch.row_config(hidden)


def score(
    op: str, x: Tensor, router_weight: Tensor, router_bias: Tensor | None, kind: Tensor
) -> Tensor:
    """Logits of checked rows of checked kinds."""
    rows, hidden = x.shape
    weight = launch.check_weight(op, "router_weight", router_weight, hidden, like=x)
    bias = launch.check_optional_weight(op, "router_bias", router_bias, 1, like=x)
    logits = launch.numbers(x, rows)
    if rows:
        config = launch_config(hidden)
        score_kernel[(rows,)](
            x,
            weight,
            bias,
            kind,
            logits,
            HIDDEN=hidden,
            BLOCK=config.block,
            **config.options,
        )
    return logits


def select_rows(logits: Tensor, plan: Plan, gate: Gate) -> Selected:
    """Gates and kept rows, of checked arguments."""
    out = empty_selection(logits, plan)
    if plan.slot_start.shape[0] == 0:
        out.index.fill_(-1)
    elif fits(plan):
        select_short(logits, plan, gate, out)
    else:
        select_long(logits, plan, gate, out)
    return out


def route(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    kind: Tensor,
    cu_seqlens: Tensor,
    pool_id: Tensor | None,
    k: Tensor,
    slot_start: Tensor,
    num_slots: int,
    max_length: int,
    gate_scale: float,
    gate_bias: float,
    activation: int,
) -> tuple[Tensor, ...]:
    """pmod::route."""
    op = "route"
    x = launch.check_rows(op, "x", x)
    plan = Plan(kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length)
    plan = check_plan(op, plan, x.shape[0], like=x)
    gate = check_gate(op, gate_scale, gate_bias, activation)
    with launch.on_device(x):
        logits = score(op, x, router_weight, router_bias, plan.kind)
        return logits, *select_rows(logits, plan, gate)


def route_backward_(
    grad_x: Tensor,
    grad_logits: Tensor | None,
    grad_gate: Tensor | None,
    x: Tensor,
    router_weight: Tensor,
    logits: Tensor,
    kind: Tensor,
    cu_seqlens: Tensor,
    gate_scale: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """pmod::route_backward_."""
    op = "route_backward_"
    x = launch.check_rows(op, "x", x)
    launch.check_mutable(op, "grad_x", grad_x, like=x)
    logits = check_logits(op, logits, x.shape[0], like=x)
    weight = launch.check_weight(op, "router_weight", router_weight, x.shape[1], like=x)
    gate = check_gate(op, gate_scale, 0.0, activation)
    with launch.on_device(x):
        z = logit_gradient(op, grad_logits, grad_gate, logits, kind, cu_seqlens, gate)
        of_weight, of_bias, _none = readers_backward(grad_x, x, z, weight)
        return of_weight, of_bias


def select(
    logits: Tensor,
    kind: Tensor,
    cu_seqlens: Tensor,
    pool_id: Tensor | None,
    k: Tensor,
    slot_start: Tensor,
    num_slots: int,
    max_length: int,
    gate_scale: float,
    gate_bias: float,
    activation: int,
) -> tuple[Tensor, ...]:
    """pmod::select."""
    op = "select"
    logits = check_logits(op, logits)
    plan = Plan(kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length)
    plan = check_plan(op, plan, logits.shape[0], like=logits)
    gate = check_gate(op, gate_scale, gate_bias, activation)
    with launch.on_device(logits):
        return tuple(select_rows(logits, plan, gate))


def select_backward(
    grad_gate: Tensor,
    logits: Tensor,
    kind: Tensor,
    cu_seqlens: Tensor,
    gate_scale: float,
    activation: int,
) -> Tensor:
    """pmod::select_backward."""
    op = "select_backward"
    logits = check_logits(op, logits)
    gate = check_gate(op, gate_scale, 0.0, activation)
    with launch.on_device(logits):
        return logit_gradient(op, None, grad_gate, logits, kind, cu_seqlens, gate)


OPS = {
    "route": route,
    "route_backward_": route_backward_,
    "select": select,
    "select_backward": select_backward,
}
