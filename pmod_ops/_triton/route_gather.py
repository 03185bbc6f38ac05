"""pmod::route_gather and pmod::select_gather: reference.route_gather.

From the kernels of the ops that they join; the backward is in readers_backward.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.gather import copy_rows
from pmod_ops._triton.gather_rmsnorm import normalise_rows
from pmod_ops._triton.logit_gradient import logit_gradient
from pmod_ops._triton.plan import Plan, check_gate, check_logits, check_plan
from pmod_ops._triton.readers_backward import Gathered, readers_backward
from pmod_ops._triton.route import score, select_rows


def gather_rows(
    op: str, x: Tensor, index: Tensor, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Rows and 1 / rms: normalised if there is a weight, else copied, and no rms."""
    if norm_weight is None:
        return copy_rows(x, index), launch.numbers(x, 0)
    return normalise_rows(op, x, index, norm_weight, eps)


def route_gather(
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
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """pmod::route_gather."""
    op = "route_gather"
    x = launch.check_rows(op, "x", x)
    plan = Plan(kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length)
    plan = check_plan(op, plan, x.shape[0], like=x)
    gate = check_gate(op, gate_scale, gate_bias, activation)
    with launch.on_device(x):
        logits = score(op, x, router_weight, router_bias, plan.kind)
        selected = select_rows(logits, plan, gate)
        rows, rstd = gather_rows(op, x, selected.index, norm_weight, eps)
    return logits, *selected[:3], rows, rstd, selected.scratch


def select_gather(
    x: Tensor,
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
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """pmod::select_gather."""
    op = "select_gather"
    x = launch.check_rows(op, "x", x)
    logits = check_logits(op, logits, x.shape[0], like=x)
    plan = Plan(kind, cu_seqlens, pool_id, k, slot_start, num_slots, max_length)
    plan = check_plan(op, plan, x.shape[0], like=x)
    gate = check_gate(op, gate_scale, gate_bias, activation)
    with launch.on_device(x):
        selected = select_rows(logits, plan, gate)
        rows, rstd = gather_rows(op, x, selected.index, norm_weight, eps)
    return selected.gate, rows, rstd, *selected[1:]


def route_gather_backward_(
    grad_x: Tensor,
    grad_logits: Tensor | None,
    grad_gate: Tensor | None,
    grad_rows: Tensor | None,
    grad_kept: Tensor | None,
    x: Tensor,
    router_weight: Tensor,
    logits: Tensor,
    kind: Tensor,
    cu_seqlens: Tensor,
    index: Tensor,
    inverse: Tensor,
    norm_weight: Tensor | None,
    rstd: Tensor,
    gate_scale: float,
    activation: int,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """pmod::route_gather_backward_."""
    op = "route_gather_backward_"
    x = launch.check_rows(op, "x", x)
    count, hidden = x.shape
    launch.check_mutable(op, "grad_x", grad_x, like=x)
    index = launch.check_numbers(op, "index", index, torch.int32, None, like=x)
    slots = index.shape[0]
    rstd_slots = 0 if norm_weight is None else slots
    gathered = Gathered(
        launch.check_optional_rows(op, "grad_rows", grad_rows, like=x, count=slots),
        launch.check_optional_rows(op, "grad_kept", grad_kept, like=x, count=slots),
        launch.check_numbers(op, "inverse", inverse, torch.int32, count, like=x),
        slots,
        launch.check_optional_weight(op, "norm_weight", norm_weight, hidden, like=x),
        launch.check_numbers(op, "rstd", rstd, torch.float32, rstd_slots, like=x),
        overwrite,
    )
    weight = launch.check_weight(op, "router_weight", router_weight, hidden, like=x)
    logits = check_logits(op, logits, count, like=x)
    gate = check_gate(op, gate_scale, 0.0, activation)
    with launch.on_device(x):
        z = logit_gradient(op, grad_logits, grad_gate, logits, kind, cu_seqlens, gate)
        return readers_backward(grad_x, x, z, weight, gathered)


OPS = {
    "route_gather": route_gather,
    "route_gather_backward_": route_gather_backward_,
    "select_gather": select_gather,
}
