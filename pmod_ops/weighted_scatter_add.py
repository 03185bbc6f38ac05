"""weighted_scatter_add: put the processed rows back, weighted, and weight those that were skipped.

p-MoD (arXiv:2412.04449): TanhNorm weights the MLP branch of kept tokens (section 3.2); symmetric
token reweighting (STRing, section 3.3) gives skipped tokens the same kind of weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmod_ops._carry import carry_of, rows_of_residual
from pmod_ops._checks import (
    acc_dtype,
    check_bias,
    check_routing,
    check_rows,
    check_slots,
    check_tensor,
    check_vector,
)
from pmod_ops._library import (
    autograd,
    chain_mark,
    define,
    fake,
    flat,
    hand_over,
    inference,
    receiver,
    refuse_double_backward,
)
from pmod_ops.gather import results
from pmod_ops.route import needs_grad
from pmod_ops.routing import RouterGradient, Routing

_REST = (
    "Tensor residual, Tensor update, Tensor gate, Tensor inverse, Tensor index, Tensor kind,"
    " bool gate_mlp, bool scale_skipped, Tensor? next_weight, Tensor? next_bias, bool check_finite"
)
define(
    f"weighted_scatter_add(Tensor x, {_REST}) -> (Tensor out, Tensor next_logits, Tensor finite)"
)
define(f"weighted_scatter_add_(Tensor(a!) x, {_REST}) -> (Tensor next_logits, Tensor finite)")
define(
    "weighted_scatter_add_backward(Tensor grad_out, Tensor x, Tensor update, Tensor gate,"
    " Tensor inverse, Tensor index, Tensor kind, bool gate_mlp, bool scale_skipped,"
    " Tensor? router_weight, Tensor? logits, float gate_scale, int activation,"
    " bool write_residual, bool zero_kept)"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_update, Tensor grad_gate,"
    " Tensor grad_router_weight, Tensor grad_router_bias)"
)


@fake("weighted_scatter_add")
def _weighted_scatter_add_fake(
    x: Tensor, residual: Tensor, update: Tensor, gate: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_weighted_scatter_add_inplace_fake(
        x, residual, update, gate, *rest
    )


@fake("weighted_scatter_add_")
def _weighted_scatter_add_inplace_fake(
    x: Tensor, residual: Tensor, update: Tensor, gate: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    next_weight, _next_bias, check_finite = rest[5:]
    rows = 0 if next_weight is None else x.shape[0]
    next_logits = gate.new_empty(rows, dtype=acc_dtype(x.dtype))
    return next_logits, x.new_empty(int(check_finite), dtype=torch.bool)


@fake("weighted_scatter_add_backward")
def _weighted_scatter_add_backward_fake(
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
) -> tuple[Tensor, ...]:
    hidden, one = (0, 0) if router_weight is None else (x.shape[1], 1)
    acc = acc_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        update.new_empty(update.shape if write_residual else (0, update.shape[1])),
        update.new_empty(update.shape),
        gate.new_empty(gate.shape),
        x.new_empty(hidden, dtype=acc),
        x.new_empty(one, dtype=acc),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _residual, *rows, gate_mlp, scale_skipped, next_weight, _bias, _check_finite = inputs
    ctx.save_for_backward(x, *rows)
    ctx.flags = (gate_mlp, scale_skipped)
    ctx.scores_next = next_weight is not None


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_next_logits: Tensor | None, grad_finite: None
) -> Any:
    if ctx.scores_next:
        raise RuntimeError("pmod_ops.weighted_scatter_add: next_router has no gradient")
    if grad_out is None:
        return (None,) * 12
    grad_x, grad_residual, grad_update, grad_gate, _, _ = (
        torch.ops.pmod.weighted_scatter_add_backward(
            grad_out, *ctx.saved_tensors, *ctx.flags, *_NO_ROUTER, True, True
        )
    )
    return (grad_x, grad_residual, grad_update, grad_gate) + (None,) * 8


_NO_ROUTER = (None, None, 0.0, 0)
autograd("weighted_scatter_add", _setup, _backward)
_weighted_scatter_add = inference("weighted_scatter_add")


class _Chain(torch.autograd.Function):
    """The last reader of x: starts the gradient buffer, and finishes the router of skipped rows.

    Skipped routable rows count as gated by act(x . router_weight + router_bias) computed here, so
    their gate gets no gradient and x, weight and bias get it directly. With the stand-in `skipped`
    the gradient of x goes there, kept rows unwritten; with `of_residual` that of the residual goes
    there, as the incoming gradient itself.
    """

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor,
        update: Tensor,
        gate: Tensor,
        router_weight: Tensor | None,
        router_bias: Tensor | None,
        skipped: Tensor | None,
        of_residual: Tensor | None,
        logits: Tensor | None,
        inverse: Tensor,
        index: Tensor,
        kind: Tensor,
        flags: tuple[bool, bool],
        router_gate: tuple[float, int],
        check_finite: bool,
    ) -> Any:
        out, _, finite = torch.ops.pmod.weighted_scatter_add(
            flat(x), residual, update, gate, inverse, index, kind, *flags, None, None, check_finite
        )
        return out.view(x.shape), x.view_as(x), finite

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, _residual, update, gate, weight, bias, skipped, of_residual, *rest = inputs
        logits, *maps, ctx.flags, ctx.router_gate, _check_finite = rest
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, update, gate, weight, logits, *maps)
        ctx.feeds = receiver(x if skipped is None else skipped)
        ctx.carried = (skipped is not None, of_residual is not None)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_double_backward("weighted_scatter_add")
        grad_out, grad_x_out, _ = grads
        if grad_out is None:
            return (grad_x_out,) + (None,) * 14
        x, update, gate, weight, logits, *maps = ctx.saved_tensors
        skipped, of_residual = ctx.carried
        grad_out = flat(grad_out)
        router = (weight, logits, *ctx.router_gate)
        # detect_anomaly looks for NaN in rows that nobody reads, too
        anomaly = torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
        zero_kept = not skipped or anomaly
        grad_x, grad_residual, grad_update, grad_gate, grad_weight, grad_bias = (
            torch.ops.pmod.weighted_scatter_add_backward(
                *(grad_out, flat(x), update, gate, *maps, *ctx.flags),
                *(*router, not of_residual, zero_kept),
            )
        )
        given = [
            grad_x_out,
            None if of_residual else grad_residual,
            grad_update,
            grad_gate,
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            None,
            grad_out if of_residual else None,
        ]
        grad_x = grad_x.view(x.shape)
        if skipped:
            given[6] = hand_over(grad_x, ctx.feeds)
        else:
            given[0] = hand_over(grad_x if grad_x_out is None else grad_x + grad_x_out, ctx.feeds)
        return (*given, *(None,) * 7)


def weighted_scatter_add(
    x: Tensor,
    residual: Tensor,
    update: Tensor,
    routing: Routing,
    *,
    gate_mlp: bool = True,
    scale_skipped: bool = True,
    next_router: tuple[Tensor, Tensor | float | None] | None = None,
    finite: Tensor | None = None,
    return_x: bool = False,
) -> Any:
    """Write the output of a routed layer.

    A kept routable row becomes `residual + gate * update`, another kept row `residual + update`, a
    skipped routable row `gate * x`, padding stays x. Each row is rounded once. No two slots hold
    the same row, so nothing is ever added atomically and the result is deterministic.

    Args:
        x: [N, D] or [B, S, D], the input of the layer; made contiguous if it is not.
        residual: [K, D], or [B, max_kept, D] for a padded routing: x[index] plus attention. As
            `gather_add_rmsnorm` returned it in a chained layer, its gradient goes straight to that
            op: a hook put on it later, or `autograd.grad` for it, sees what others give it only.
        update: like residual: the MLP output. Under autocast both may have any float dtype.
        routing: of the same N rows.
        gate_mlp: multiply `update` of routable rows by the gate.
        scale_skipped: multiply skipped routable rows by the gate (STRing).
        next_router: (weight, bias) of the next routed layer: also score the rows just written. For
            inference only.
        finite: bool [1], set to False if a row of out other than padding holds an infinity or NaN,
            else left as it is: one flag for many layers, read when the caller likes.
        return_x: also return x, for the next reader of x.

    Returns:
        out, like x; then fp32 logits [N] (fp64 for fp64 rows; 0 on rows that are not routable) if
        `next_router`; then x if `return_x`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or the routing does not fit x, or `next_router` under
            autograd.
    """
    op = "weighted_scatter_add"
    given = residual
    residual, update = _check(op, x, residual, update, routing, finite)
    weight, bias = _check_next_router(op, next_router, x)
    tracked = needs_grad(x, residual, update, routing.gate)
    if next_router is not None and (tracked or needs_grad(weight, bias)):
        raise ValueError(
            f"pmod_ops.{op}: next_router: expected None where gradients are recorded, got a router;"
            " score the next layer in its own route, or use torch.no_grad()"
        )
    flags = (gate_mlp, scale_skipped)
    if tracked and (return_x or routing.router is not None or routing.carry is not None):
        of_residual = rows_of_residual(given, routing)
        out, chained, found = _weighted_scatter_add_chain(
            x, residual, update, routing, of_residual, flags, finite is not None
        )
        _note(finite, found)
        return results(out, chained if return_x else None)
    maps = (routing.gate, routing.inverse, routing.index, routing.kind)
    out, next_logits, found = _weighted_scatter_add(
        flat(x), residual, update, *maps, *flags, weight, bias, finite is not None
    )
    _note(finite, found)
    scored = None if next_router is None else next_logits
    return results(out.view(x.shape), scored, x if return_x else None)


def weighted_scatter_add_(
    x: Tensor,
    residual: Tensor,
    update: Tensor,
    routing: Routing,
    *,
    gate_mlp: bool = True,
    scale_skipped: bool = True,
    next_router: tuple[Tensor, Tensor | float | None] | None = None,
    finite: Tensor | None = None,
) -> Tensor | None:
    """`weighted_scatter_add` written into x: no rows are allocated. Inference only.

    Args:
        x: [N, D] or [B, S, D]; overwritten. A copy is made and written back if it is not
            contiguous.
        residual: see `weighted_scatter_add`, as are the arguments below.
        update: like residual.
        routing: of the same N rows.
        gate_mlp: multiply `update` of routable rows by the gate.
        scale_skipped: multiply skipped routable rows by the gate.
        next_router: (weight, bias) of the next routed layer.
        finite: bool [1], see `weighted_scatter_add`.

    Returns:
        The next layer's logits [N] if `next_router`, else None.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: as `weighted_scatter_add`; a tensor needs a gradient; residual or update shares
            memory with x.
    """
    op = "weighted_scatter_add_"
    residual, update = _check(op, x, residual, update, routing, finite)
    weight, bias = _check_next_router(op, next_router, x)
    if needs_grad(x, residual, update, routing.gate, weight, bias):
        raise ValueError(
            f"pmod_ops.{op}: x: expected tensors that need no gradient, got some that do; "
            "use torch.no_grad() or weighted_scatter_add"
        )
    for name, rows in (("residual", residual), ("update", update)):
        if _same_storage(rows, x):
            raise ValueError(
                f"pmod_ops.{op}: {name}: expected memory of its own, got memory of x; pass a copy"
            )
    target = x.contiguous()
    maps = (routing.gate, routing.inverse, routing.index, routing.kind)
    next_logits, found = torch.ops.pmod.weighted_scatter_add_(
        *(flat(target), residual, update, *maps, gate_mlp, scale_skipped, weight, bias),
        finite is not None,
    )
    _note(finite, found)
    if target is not x:
        x.copy_(target)
    elif not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)  # or autograd would not notice the change
    return None if next_router is None else next_logits


def _weighted_scatter_add_chain(
    x: Tensor,
    residual: Tensor,
    update: Tensor,
    routing: Routing,
    of_residual: Tensor | None,
    flags: tuple[bool, bool],
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    router: RouterGradient | None = routing.router
    if router is not None:
        same_x = chain_mark(x) is router.chain and x._version == router.version
        if not same_x or router.gate is not routing.gate:
            router = None
    carry = carry_of(routing, x)
    return _Chain.apply(
        x,
        residual,
        update,
        routing.gate,
        None if router is None else router.weight,
        None if router is None else router.bias,
        None if carry is None else carry.skipped,
        of_residual,
        None if router is None else router.logits,
        routing.inverse,
        routing.index,
        routing.kind,
        flags,
        (0.0, 0) if router is None else (router.gate_scale, router.activation),
        check_finite,
    )


def _note(finite: Tensor | None, found: Tensor) -> None:
    if finite is not None:
        finite.logical_and_(found)


def _check(
    op: str, x: Tensor, residual: Tensor, update: Tensor, routing: Routing, finite: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_rows(op, "x", x)
    check_routing(op, routing, x)
    gate, dtypes = routing.gate, (acc_dtype(x.dtype),)
    check_tensor(op, "routing.gate", gate, shape=routing.inverse.shape, dtypes=dtypes, like=x)
    if finite is not None:
        check_tensor(op, "finite", finite, shape=(1,), dtypes=(torch.bool,), like=x)
    return (
        check_slots(op, "residual", residual, routing, x),
        check_slots(op, "update", update, routing, x),
    )


def _check_next_router(
    op: str, next_router: tuple[Tensor, Tensor | float | None] | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if next_router is None:
        return None, None
    if not (isinstance(next_router, tuple) and len(next_router) == 2):
        raise TypeError(
            f"pmod_ops.{op}: next_router: expected a tuple (weight, bias), got {next_router!r}"
        )
    weight, bias = next_router
    return (
        check_vector(op, "next_router[0]", weight, x),
        check_bias(op, "next_router[1]", bias, x),
    )


def _same_storage(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling() or a.numel() == 0 or b.numel() == 0:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
