"""route: score, gate and select (p-MoD, arXiv:2412.04449: TanhNorm, section 3.2; PRD, section 3.4).

`pmod::route` scores and selects; `pmod::select` starts from logits that are already there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pmod_ops._checks import (
    acc_dtype,
    check_bias,
    check_rows,
    check_tensor,
    check_vector,
    fail,
)
from pmod_ops._library import (
    GradientBuffer,
    autograd,
    chain,
    chain_mark,
    define,
    fake,
    flat,
    inference,
    start_chain,
)
from pmod_ops.plan import RoutingPlan, check_plan
from pmod_ops.routing import Carry, Layout, RouterGradient, Routing

ACTIVATIONS = ("none", "tanh", "sigmoid", "softmax")  # the integers the kernels know, in order

# What pmod::select, and the ops that contain it, take after the logits.
SELECT = (
    "Tensor kind, Tensor cu_seqlens, Tensor? pool_id, Tensor k, Tensor slot_start,"
    " SymInt num_slots, SymInt max_length, float gate_scale, float gate_bias, int activation"
)
_GATE_BACKWARD = "Tensor logits, Tensor kind, Tensor cu_seqlens, float gate_scale, int activation"
define(
    f"route(Tensor x, Tensor router_weight, Tensor? router_bias, {SELECT})"
    " -> (Tensor logits, Tensor gate, Tensor index, Tensor inverse, Tensor scratch)"
)
define(
    "route_backward_(Tensor(a!) grad_x, Tensor? grad_logits, Tensor? grad_gate, Tensor x,"
    f" Tensor router_weight, {_GATE_BACKWARD})"
    " -> (Tensor grad_router_weight, Tensor grad_router_bias)"
)
define(
    f"select(Tensor logits, {SELECT})"
    " -> (Tensor gate, Tensor index, Tensor inverse, Tensor scratch)"
)
define(f"select_backward(Tensor grad_gate, {_GATE_BACKWARD}) -> Tensor")


def scratch_bytes(rows: int, sequences: int, pools: int, max_length: int) -> int:
    """Bytes of device memory that a selection on a GPU needs beside its outputs.

    Sequences of up to 16,384 rows need none. Others: a counter for each digit, and a state, of
    every pool, and a count for each part of a sequence (csrc/cuda/select_long.cu).
    """
    if max_length <= 16384:
        return 0
    return 4 * (256 * pools + 16) + 16 * pools + 4 * (rows // 2048 + sequences)


@fake("route")
def _route_fake(
    x: Tensor, router_weight: Tensor, router_bias: Tensor | None, kind: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = kind.new_empty(kind.shape, dtype=acc_dtype(x.dtype))
    return logits, *_select_fake(logits, kind, *rest)


@fake("select")
def _select_fake(
    logits: Tensor,
    kind: Tensor,
    cu_seqlens: Tensor,
    pool_id: Tensor | None,
    k: Tensor,
    slot_start: Tensor,
    num_slots: int,
    max_length: int,
    *gate: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = kind.new_empty(num_slots, dtype=torch.int32)
    inverse = kind.new_empty(kind.shape, dtype=torch.int32)
    scratch = 0
    if kind.device.type == "cuda":
        sequences, pools = slot_start.shape[0], k.shape[0]
        scratch = scratch_bytes(kind.shape[0], sequences, pools, max_length)
    return logits.new_empty(logits.shape), index, inverse, kind.new_empty(scratch)


@fake("route_backward_")
def _route_backward_fake(
    grad_x: Tensor,
    grad_logits: Tensor | None,
    grad_gate: Tensor | None,
    x: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=acc), x.new_empty(1, dtype=acc)


@fake("select_backward")
def _select_backward_fake(grad_gate: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, kind, cu_seqlens, *_, gate_scale, _gate_bias, activation = inputs
    logits, _gate, _index, _inverse, _scratch = output
    ctx.save_for_backward(x, weight, logits, kind, cu_seqlens)
    ctx.gate = (gate_scale, activation)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(
    ctx: Any,
    grad_logits: Tensor | None,
    grad_gate: Tensor | None,
    grad_index: None,
    grad_inverse: None,
    grad_scratch: None,
    *,
    grad_x: Tensor | None = None,
) -> Any:
    x, weight, logits, kind, cu_seqlens = ctx.saved_tensors
    if grad_logits is None and grad_gate is None:
        return (grad_x,) + (None,) * 12
    buffer = GradientBuffer(grad_x, x, ctx)
    grad_weight, grad_bias = torch.ops.pmod.route_backward_(
        buffer.rows, grad_logits, grad_gate, flat(x), weight, logits, kind, cu_seqlens, *ctx.gate
    )
    grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return (buffer.release(), grad_weight.to(weight.dtype), grad_bias) + (None,) * 10


autograd("route", _setup, _backward)
_route_chain = chain("route", _setup, _backward)
_route = inference("route")


def _select_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, kind, cu_seqlens, *_, gate_scale, _gate_bias, activation = inputs
    ctx.save_for_backward(logits, kind, cu_seqlens)
    ctx.gate = (gate_scale, activation)


def _select_grad(ctx: Any, grad_gate: Tensor | None, *integers: None) -> Any:
    if grad_gate is None:
        return (None,) * 11
    grad_logits = torch.ops.pmod.select_backward(grad_gate, *ctx.saved_tensors, *ctx.gate)
    return (grad_logits,) + (None,) * 10


autograd("select", _select_setup, _select_grad)
_select = inference("select")


def route(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | float | None,
    plan: RoutingPlan,
    layer: int,
    *,
    gate_scale: float = 0.2,
    gate_bias: float = 1.0,
    activation: str = "tanh",
    logits: Tensor | None = None,
    layout: Layout = "packed",
    return_x: bool = False,
) -> Any:
    """Choose the rows that `layer` processes, and the weight of every routable row.

    `logits = x @ router_weight + router_bias; gate = gate_scale * activation(logits) + gate_bias`;
    each pool keeps its k highest logits. Of equal logits the lowest row wins; NaN ranks highest,
    so that it shows; -0 equals +0; -inf is legal and lowest. The choice itself has no gradient.

    Args:
        x: [N, D] or [B, S, D], fp32, bf16, fp16 or fp64, un-normalised; made contiguous if it is
            not.
        router_weight: [D] or [1, D], in the dtype of x or fp32.
        router_bias: one element, a number, or None.
        plan: of the same N rows, on the device of x.
        layer: absolute index of a layer of the plan.
        gate_scale: of the gate; 0.2 in the paper's TanhNorm.
        gate_bias: of the gate; 1 in the paper's TanhNorm.
        activation: "tanh", "sigmoid", "softmax" (over the routable rows of a sequence) or "none".
        logits: fp32 [N] (fp64 for fp64 rows) to use instead of scoring x, e.g. those that
            `weighted_scatter_add(next_router=...)` returned; the router arguments are then unused.
        layout: "packed" or "padded", see `Routing`.
        return_x: also return x, for the next reader of x.

    Returns:
        A `Routing`; with `return_x`, the tuple (routing, x).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, the plan, the layer or an option does not fit.
    """
    op = "route"
    sizes, cu_kept = route_arguments(op, x, plan, layer, gate_scale, gate_bias, activation, layout)
    if logits is not None:
        check_logits(op, logits, x)
        gate, index, inverse, _scratch = _select(logits, *sizes)
        routing = make_routing(plan, layer, layout, cu_kept, logits, gate, index, inverse)
        return results_with_x(routing, x if return_x else None)
    weight = check_vector(op, "router_weight", router_weight, x)
    bias = check_bias(op, "router_bias", router_bias, x)
    router = None
    if return_x and needs_grad(x, weight, bias):
        *routed, _scratch, x = _route_chain(x, weight, bias, *sizes)
        router = fold_router(x, weight, bias, routed[0], routed[1], gate_scale, activation)
    else:
        *routed, _scratch = _route(flat(x), weight, bias, *sizes)
    routing = make_routing(plan, layer, layout, cu_kept, *routed, router=router)
    return results_with_x(routing, x if return_x else None)


def route_arguments(
    op: str,
    x: Tensor,
    plan: RoutingPlan,
    layer: int,
    gate_scale: float,
    gate_bias: float,
    activation: str,
    layout: Layout,
) -> tuple[tuple[Any, ...], Tensor]:
    """Check what route and route_gather share.

    Returns what `pmod::select` takes after logits, and the offsets of the kept rows.
    """
    check_rows(op, "x", x)
    check_plan(op, plan, x)
    for name, number in (("gate_scale", gate_scale), ("gate_bias", gate_bias)):
        if not (isinstance(number, (int, float)) and math.isfinite(number)):
            fail(op, name, "a finite number", number)
    if activation not in ACTIVATIONS:
        fail(op, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    if layer not in plan.layers:
        fail(op, "layer", f"one of {list(plan.layers)}", layer)
    if layout not in ("packed", "padded"):
        fail(op, "layout", "'packed' or 'padded'", repr(layout))
    k, cu_kept, padded_start = plan.parts(layer)
    packed = layout == "packed"
    sizes = (
        plan.kind,
        plan.cu_seqlens,
        plan.pool_id,
        k,
        cu_kept.narrow(0, 0, plan.num_sequences) if packed else padded_start,
        plan.num_slots(layer, layout),
        plan.max_length,
        float(gate_scale),
        float(gate_bias),
        ACTIVATIONS.index(activation),
    )
    return sizes, cu_kept


def check_logits(op: str, logits: Any, x: Tensor) -> None:
    """Scores of the N rows of x, in the type that scores have."""
    rows = x.numel() // x.shape[-1]
    check_tensor(op, "logits", logits, shape=(rows,), like=x, dtypes=(acc_dtype(x.dtype),))


def make_routing(
    plan: RoutingPlan,
    layer: int,
    layout: Layout,
    cu_kept: Tensor,
    logits: Tensor,
    gate: Tensor,
    index: Tensor,
    inverse: Tensor,
    router: RouterGradient | None = None,
    carry: Carry | None = None,
) -> Routing:
    """Put the outputs of the op together with what the plan knows of the layer."""
    return Routing(
        index=index,
        inverse=inverse,
        logits=logits,
        gate=gate,
        cu_seqlens=cu_kept,
        kind=plan.kind,
        num_sequences=plan.num_sequences,
        max_kept=plan.max_kept(layer),
        layout=layout,
        router=router,
        carry=carry,
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fold_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    gate: Tensor,
    gate_scale: float,
    activation: str,
) -> RouterGradient | None:
    """What weighted_scatter_add needs to finish the gradient of a row it visits anyway.

    A softmax gate couples the rows of a sequence, so its gradient takes a pass of its own.
    """
    if activation == "softmax" or torch.compiler.is_compiling():
        return None
    kind = ACTIVATIONS.index(activation)
    mark = chain_mark(x) or start_chain(x)
    scores = logits.detach()
    return RouterGradient(weight, bias, scores, gate, float(gate_scale), kind, mark, x._version)


def results_with_x(routing: Routing, *tensors: Tensor | None) -> Any:
    """The routing alone, or with the tensors that are there."""
    present = [t for t in tensors if t is not None]
    return (routing, *present) if present else routing
