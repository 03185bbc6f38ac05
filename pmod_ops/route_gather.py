"""route_gather: route, then gather (and normalise) what was kept, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmod_ops._carry import stand_in
from pmod_ops._checks import acc_dtype, check_bias, check_eps, check_vector
from pmod_ops._library import (
    GradientBuffer,
    autograd,
    chain,
    define,
    fake,
    flat,
    inference,
    receiver,
    refuse_double_backward,
    start_chain,
)
from pmod_ops.gather import gather
from pmod_ops.gather_rmsnorm import gather_rmsnorm
from pmod_ops.plan import RoutingPlan
from pmod_ops.route import (
    SELECT,
    _route_fake,
    _select_fake,
    check_logits,
    fold_router,
    make_routing,
    needs_grad,
    results_with_x,
    route,
    route_arguments,
)
from pmod_ops.routing import Carry, Layout

define(
    f"route_gather(Tensor x, Tensor router_weight, Tensor? router_bias, {SELECT},"
    " Tensor? norm_weight, float eps)"
    " -> (Tensor logits, Tensor gate, Tensor index, Tensor inverse, Tensor rows, Tensor rstd,"
    " Tensor scratch)"
)
define(
    f"select_gather(Tensor x, Tensor logits, {SELECT}, Tensor? norm_weight, float eps)"
    " -> (Tensor gate, Tensor rows, Tensor rstd, Tensor index, Tensor inverse, Tensor scratch)"
)
define(
    "route_gather_backward_(Tensor(a!) grad_x, Tensor? grad_logits, Tensor? grad_gate,"
    " Tensor? grad_rows, Tensor? grad_kept, Tensor x, Tensor router_weight, Tensor logits,"
    " Tensor kind, Tensor cu_seqlens, Tensor index, Tensor inverse, Tensor? norm_weight,"
    " Tensor rstd, float gate_scale, int activation, bool overwrite)"
    " -> (Tensor grad_router_weight, Tensor grad_router_bias, Tensor grad_norm_weight)"
)


@fake("route_gather")
def _route_gather_fake(
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
    sizes = (cu_seqlens, pool_id, k, slot_start, num_slots, max_length)
    *routed, scratch = _route_fake(x, router_weight, router_bias, kind, *sizes)
    return *routed, *_rows_fake(x, num_slots, norm_weight), scratch


def _rows_fake(x: Tensor, num_slots: int, norm_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    rstd_slots = 0 if norm_weight is None else num_slots
    rstd = x.new_empty(rstd_slots, dtype=acc_dtype(x.dtype))
    return x.new_empty(num_slots, x.shape[1]), rstd


@fake("select_gather")
def _select_gather_fake(
    x: Tensor, logits: Tensor, kind: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *select, norm_weight, _eps = rest
    gate, *integers = _select_fake(logits, kind, *select)
    return gate, *_rows_fake(x, integers[0].shape[0], norm_weight), *integers


@fake("route_gather_backward_")
def _route_gather_backward_fake(
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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    acc, hidden = acc_dtype(x.dtype), x.shape[1]
    norm_hidden = 0 if norm_weight is None else hidden
    return (
        x.new_empty(hidden, dtype=acc),
        x.new_empty(1, dtype=acc),
        x.new_empty(norm_hidden, dtype=acc),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, kind, cu_seqlens = inputs[:5]
    gate_scale, _gate_bias, activation, norm_weight, _eps = inputs[10:]
    logits, _gate, index, inverse, _rows, rstd, _scratch = output
    ctx.save_for_backward(x, weight, logits, kind, cu_seqlens, index, inverse, norm_weight, rstd)
    ctx.gate = (gate_scale, activation)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(
    ctx: Any,
    grad_logits: Tensor | None,
    grad_gate: Tensor | None,
    grad_index: None,
    grad_inverse: None,
    grad_rows: Tensor | None,
    grad_rstd: None,
    grad_scratch: None,
    *,
    grad_x: Tensor | None = None,
) -> Any:
    if grad_logits is None and grad_gate is None and grad_rows is None:
        return (grad_x,) + (None,) * 14
    return _run_backward(ctx, grad_x, (grad_logits, grad_gate, grad_rows, None), False)


def _run_backward(
    ctx: Any, grad_x: Tensor | None, grads: tuple[Tensor | None, ...], overwrite: bool
) -> Any:
    x, weight, *saved = ctx.saved_tensors
    norm_weight = saved[5]
    buffer = GradientBuffer(grad_x, x, ctx)
    grad_weight, grad_bias, grad_norm_weight = torch.ops.pmod.route_gather_backward_(
        buffer.rows, *grads, flat(x), weight, *saved, *ctx.gate, overwrite
    )
    grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    grad_norm = None if norm_weight is None else grad_norm_weight.to(norm_weight.dtype)
    routed = (buffer.release(), grad_weight.to(weight.dtype), grad_bias)
    return routed + (None,) * 10 + (grad_norm, None)


autograd("route_gather", _setup, _backward)
_route_gather_chain = chain("route_gather", _setup, _backward)
_route_gather = inference("route_gather")


def _select_gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, logits, kind, cu_seqlens, *_rest, gate_scale, _bias, activation, norm_weight, _eps = inputs
    _gate, _rows, rstd, index, _inverse, _scratch = output
    ctx.save_for_backward(x, logits, kind, cu_seqlens, index, norm_weight, rstd)
    ctx.gate = (gate_scale, activation)


def _select_gather_backward(
    ctx: Any,
    grad_gate: Tensor | None,
    grad_rows: Tensor | None,
    *others: None,
) -> Any:
    x, logits, kind, cu_seqlens, index, norm_weight, rstd = ctx.saved_tensors
    grad_x = grad_logits = grad_norm = None
    if grad_gate is not None:
        rows = (logits, kind, cu_seqlens)
        grad_logits = torch.ops.pmod.select_backward(grad_gate, *rows, *ctx.gate)
    if grad_rows is not None:
        grad_x = torch.zeros_like(x)
        if norm_weight is None:
            torch.ops.pmod.gather_backward_(grad_x, grad_rows, index, False)
        else:
            grad_norm = torch.ops.pmod.gather_rmsnorm_backward_(
                grad_x, grad_rows, x, index, norm_weight, rstd, False
            ).to(norm_weight.dtype)
    return grad_x, grad_logits, *(None,) * 10, grad_norm, None


autograd("select_gather", _select_gather_setup, _select_gather_backward)
_select_gather = inference("select_gather")


class _Carried(torch.autograd.Function):
    """The op, x, and the stand-ins of a `Carry`, whose gradients end here."""

    updates_buffer = True

    @staticmethod
    def forward(x: Tensor, *args: Any) -> Any:
        out = torch.ops.pmod.route_gather(flat(x), *args)
        kept = stand_in(x, out[2].shape[0], x.shape[-1])
        return *out, x.view_as(x), kept, stand_in(x, *x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.feeds = receiver(inputs[0])
        _setup(ctx, inputs, output[:7])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_double_backward("route_gather")
        logits, gate, _index, _inverse, rows, _rstd, _scratch, grad_x, kept, skipped = grads
        if all(g is None for g in (logits, gate, rows, kept, skipped)):
            return (grad_x,) + (None,) * 14
        of_x, *others = _run_backward(ctx, skipped, (logits, gate, rows, kept), True)
        if grad_x is not None:
            of_x.add_(grad_x)
        return (of_x, *others)


def route_gather(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | float | None,
    plan: RoutingPlan,
    layer: int,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    gate_scale: float = 0.2,
    gate_bias: float = 1.0,
    activation: str = "tanh",
    logits: Tensor | None = None,
    layout: Layout = "packed",
    return_x: bool = False,
) -> Any:
    """Choose the rows `layer` processes, and return them, normalised if there is a norm weight.

    Equal to `route` followed by `gather_rmsnorm` (by `gather` without `norm_weight`); see there
    for the equations, the tie rule and the rounding. In training, if x goes on to
    `gather_add_rmsnorm` and `weighted_scatter_add` as returned, every row of its gradient is
    written once. That gradient goes past the returned x: ask for that of the x passed in.

    Args:
        x: [N, D] or [B, S, D], fp32, bf16, fp16 or fp64, un-normalised; made contiguous if it is
            not.
        router_weight: [D] or [1, D], in the dtype of x or fp32.
        router_bias: one element, a number, or None.
        plan: of the same N rows, on the device of x.
        layer: absolute index of a layer of the plan.
        norm_weight: [D], in the dtype of x or fp32; None gathers the rows unchanged.
        eps: of the norm, >= 0.
        gate_scale: of the gate, see `route`.
        gate_bias: of the gate.
        activation: of the gate.
        logits: [N] to use instead of scoring x, see `route`.
        layout: "packed" or "padded", see `Routing`.
        return_x: also return x, for the next reader of x.

    Returns:
        (routing, rows): rows [K, D] in the dtype of x, [B, max_kept, D] if padded; then x if
        `return_x`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, the plan, the layer or an option does not fit.
    """
    op = "route_gather"
    gate = {"gate_scale": gate_scale, "gate_bias": gate_bias, "activation": activation}
    if logits is not None and return_x and needs_grad(x, logits, norm_weight):
        routing = route(
            x, router_weight, router_bias, plan, layer, logits=logits, layout=layout, **gate
        )
        if norm_weight is None:
            return routing, *gather(x, routing, return_x=True)
        return routing, *gather_rmsnorm(x, routing, norm_weight, eps, return_x=True)
    sizes, cu_kept = route_arguments(op, x, plan, layer, layout=layout, **gate)
    check_eps(op, eps)
    norm = None if norm_weight is None else check_vector(op, "norm_weight", norm_weight, x)
    if logits is not None:
        check_logits(op, logits, x)
        weights, rows, _rstd, index, inverse, _scratch = _select_gather(
            flat(x), logits, *sizes, norm, eps
        )
        routing = make_routing(plan, layer, layout, cu_kept, logits, weights, index, inverse)
        return results_with_x(routing, routing.rows(rows), x if return_x else None)
    weight = check_vector(op, "router_weight", router_weight, x)
    bias = check_bias(op, "router_bias", router_bias, x)
    router = carry = None
    arguments = (weight, bias, *sizes, norm, eps)
    if not (return_x and needs_grad(x, weight, bias, norm)):
        *routed, rows, _rstd, _scratch = _route_gather(flat(x), *arguments)
    elif torch.compiler.is_compiling():
        *routed, rows, _rstd, _scratch, x = _route_gather_chain(x, *arguments)
    else:
        *routed, rows, _rstd, _scratch, x, kept, skipped = _Carried.apply(x, *arguments)
        scores, gates, index, inverse = routed
        carry = Carry(kept, skipped, index, inverse, start_chain(x), x._version)
        router = fold_router(x, weight, bias, scores, gates, gate_scale, activation)
    routing = make_routing(plan, layer, layout, cu_kept, *routed, router=router, carry=carry)
    return results_with_x(routing, routing.rows(rows), x if return_x else None)
