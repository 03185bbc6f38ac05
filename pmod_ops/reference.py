"""The specification: every op of the package in plain PyTorch. Read this first.

Any device, any floating dtype, differentiable; the gradients of these functions are what the
backward ops must compute. Sums, logits and gates are in float32 (float64 for float64 rows) and each
output element is rounded once. The one exception is RMSNorm, which rounds the normalised row before
it multiplies by the weight, as the norm module of a Llama does.

The equations are those of p-MoD (arXiv:2412.04449): TanhNorm weights, top-k per layer, symmetric
token reweighting. Selection ranks logits rather than weights: tanh saturates, and in bfloat16 it
has so few values that padding and text would tie with vision tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pmod_ops._checks import acc_dtype
from pmod_ops.plan import ALWAYS, PADDING, ROUTABLE, RoutingPlan
from pmod_ops.routing import Layout, Routing


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
    """Score the routable rows, gate them, and keep the k best of each pool."""
    routable = plan.kind == ROUTABLE
    if logits is None:
        logits = torch.where(routable, score(x, router_weight, router_bias), 0)
    weight = gate_scale * activate(logits, plan, activation) + gate_bias
    index, inverse = select(logits.detach(), plan, layer)
    routing = Routing(
        index=index,
        inverse=inverse,
        logits=logits,
        gate=torch.where(routable, weight, 1),
        cu_seqlens=plan.cu_kept(layer),
        kind=plan.kind,
        num_sequences=plan.num_sequences,
        max_kept=plan.max_kept(layer),
    )
    routing = routing.padded() if layout == "padded" else routing
    return (routing, x) if return_x else routing


def score(x: Tensor, weight: Tensor, bias: Tensor | float | None) -> Tensor:
    """Router logits x . w + b of every row, [N]."""
    acc = acc_dtype(x.dtype)
    logits = flat(x).to(acc) @ weight.reshape(-1).to(acc)
    return logits if bias is None else logits + bias


def activate(logits: Tensor, plan: RoutingPlan, activation: str) -> Tensor:
    """phi(logits); softmax runs over the routable rows of each sequence."""
    if activation == "none":
        return logits
    if activation in ("tanh", "sigmoid"):
        return getattr(torch, activation)(logits)
    out = torch.zeros_like(logits)
    bounds = plan.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        rows = start + (plan.kind[start:end] == ROUTABLE).nonzero()[:, 0]
        out = out.index_copy(0, rows, logits[rows].softmax(0))
    return out


def select(logits: Tensor, plan: RoutingPlan, layer: int) -> tuple[Tensor, Tensor]:
    """Kept rows, ascending, and the slot of every row (-1 = not kept).

    A pool keeps its k highest logits; of equal logits the lowest row wins, NaN ranks highest, -0
    equals +0. Rows of kind 2 are always kept.
    """
    candidates = (plan.kind == ROUTABLE).nonzero()[:, 0]
    by_logit = candidates[torch.sort(logits[candidates], descending=True, stable=True).indices]
    pool = pools(plan)[by_logit]
    order = torch.sort(pool, stable=True).indices
    ranked, pool = by_logit[order], pool[order]
    first = torch.searchsorted(pool, torch.arange(plan.num_pools, device=pool.device))
    rank = torch.arange(len(pool), device=pool.device) - first[pool]
    keep = plan.kind == ALWAYS
    keep[ranked[rank < plan.k(layer)[pool]]] = True
    index = keep.nonzero()[:, 0].to(torch.int32)
    inverse = torch.where(keep, keep.cumsum(0) - 1, -1).to(torch.int32)
    return index, inverse


def pools(plan: RoutingPlan) -> Tensor:
    """The pool of every row, int64 [N]."""
    if plan.pool_id is not None:
        return plan.pool_id.long()
    rows = torch.arange(plan.num_rows, device=plan.kind.device)
    return torch.searchsorted(plan.cu_seqlens[1:].long(), rows, right=True)


def gather(
    x: Tensor, routing: Routing, *, layout: Layout | None = None, return_x: bool = False
) -> Any:
    """Copy x[index]; zeros in filler slots."""
    return _result(_take(x, _as(routing, layout)).to(x.dtype), x, routing, layout, return_x)


def gather_rmsnorm(
    x: Tensor,
    routing: Routing,
    norm_weight: Tensor,
    eps: float = 1e-6,
    *,
    layout: Layout | None = None,
    return_x: bool = False,
) -> Any:
    """Normalise x[index]."""
    rows = rmsnorm(_take(x, _as(routing, layout)), norm_weight, eps, x.dtype)
    return _result(rows, x, routing, layout, return_x)


def gather_add_rmsnorm(
    x: Tensor,
    attn_out: Tensor,
    routing: Routing,
    norm_weight: Tensor,
    eps: float = 1e-6,
    *,
    return_x: bool = False,
) -> Any:
    """Residual = x[index] + attn_out; rows = RMSNorm(residual)."""
    kept = _take(x, routing)
    filler = (routing.index < 0)[:, None]
    residual = (kept + flat(attn_out).to(kept.dtype)).to(x.dtype)
    residual = torch.where(filler, torch.zeros_like(residual), residual)
    rows = rmsnorm(residual.to(kept.dtype), norm_weight, eps, x.dtype)
    out = routing.rows(residual), routing.rows(rows)
    return (*out, x) if return_x else out


def rmsnorm(rows: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm of accumulated rows; rounds to `dtype` before and after the multiplication."""
    normed = (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)).to(dtype)
    return (normed.to(rows.dtype) * weight.to(rows.dtype)).to(dtype)


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
    """`route`, then `gather_rmsnorm` (or `gather` when there is no norm weight)."""
    routing = route(
        x,
        router_weight,
        router_bias,
        plan,
        layer,
        gate_scale=gate_scale,
        gate_bias=gate_bias,
        activation=activation,
        logits=logits,
        layout=layout,
    )
    if norm_weight is None:
        rows = routing.rows(_take(x, routing).to(x.dtype))
    else:
        rows = gather_rmsnorm(x, routing, norm_weight, eps)
    return (routing, rows, x) if return_x else (routing, rows)


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
    """Write the kept rows back and weight both kept and skipped routable rows.

    Kept routable: residual + gate * update (update alone if not gate_mlp). Kept other: residual +
    update. Skipped: gate * x (x if not scale_skipped). Padding: x. `finite` becomes False if a row
    other than padding is not finite.
    """
    acc = acc_dtype(x.dtype)
    routable = routing.kind == ROUTABLE
    gate = torch.where(routable, routing.gate, 1)
    slots = (routing.index >= 0).nonzero()[:, 0]
    kept = routing.index[slots].long()
    delta = flat(update)[slots].to(acc)
    if gate_mlp:
        delta = delta * gate[kept, None]
    out = flat(x).index_copy(0, kept, (flat(residual)[slots].to(acc) + delta).to(x.dtype))
    if scale_skipped:
        skipped = (routable & (routing.inverse < 0)).nonzero()[:, 0]
        scaled = (gate[skipped, None] * flat(x)[skipped].to(acc)).to(x.dtype)
        out = out.index_copy(0, skipped, scaled)
    if finite is not None:
        finite.logical_and_(out[routing.kind != PADDING].isfinite().all())
    results: list[Tensor] = [out.view(x.shape)]
    if next_router is not None:
        results.append(torch.where(routable, score(out, *next_router), 0))
    if return_x:
        results.append(x)
    return results[0] if len(results) == 1 else tuple(results)


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
    """`weighted_scatter_add` written into x; returns the next layer's logits, if asked for."""
    with torch.no_grad():
        out = weighted_scatter_add(
            x,
            residual,
            update,
            routing,
            gate_mlp=gate_mlp,
            scale_skipped=scale_skipped,
            next_router=next_router,
            finite=finite,
        )
        y, next_logits = out if next_router is not None else (out, None)
        x.copy_(y)
    return next_logits


def flat(x: Tensor) -> Tensor:
    """[B, S, D] seen as [N, D]."""
    return x.reshape(-1, x.shape[-1])


def _take(x: Tensor, routing: Routing) -> Tensor:
    """x[index] in the accumulate dtype, zeros where index is -1."""
    rows = flat(x)
    slots = (routing.index >= 0).nonzero()[:, 0]
    out = torch.zeros(len(routing.index), rows.shape[1], dtype=acc_dtype(x.dtype), device=x.device)
    return out.index_copy(0, slots, rows[routing.index[slots].long()].to(out.dtype))


def _as(routing: Routing, layout: Layout | None) -> Routing:
    return routing.padded() if layout == "padded" else routing


def _result(
    rows: Tensor, x: Tensor, routing: Routing, layout: Layout | None, return_x: bool
) -> Any:
    out: list[Tensor] = [_as(routing, layout).rows(rows)]
    if layout == "padded":
        mask = routing.padded().mask
        assert mask is not None
        out.append(mask)
    if return_x:
        out.append(x)
    return out[0] if len(out) == 1 else tuple(out)
