"""The forward glue by this package, in the forms that inference can use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inputs import EPS, Problem, Rows
from torch import Tensor

from pmod_ops import (
    route_gather,
    weighted_scatter_add,
    weighted_scatter_add_,
)
from pmod_ops.testing import LAYER


def chained(problem: Problem) -> Callable[[Rows], Any]:
    """One routed layer of a forward pass: the scores came from the layer before."""
    p, router = problem, (problem.weight, problem.bias)

    def ours(rows: Rows) -> tuple[Tensor, ...]:
        routing, kept = route_gather(
            rows.x, *router, p.plan, LAYER, p.norm_weight, EPS, logits=p.logits
        )
        out, _ = weighted_scatter_add(
            rows.x, rows.residual, rows.update, routing, next_router=router
        )
        return routing.index, kept, out.flatten(0, 1)

    return ours


def in_place(problem: Problem) -> Callable[[Rows], Any]:
    """The same, into the input: no rows are allocated for the output."""
    p, router = problem, (problem.weight, problem.bias)

    def ours(rows: Rows) -> tuple[Tensor, ...]:
        routing, kept = route_gather(
            rows.scratch, *router, p.plan, LAYER, p.norm_weight, EPS, logits=p.logits
        )
        weighted_scatter_add_(rows.scratch, rows.residual, rows.update, routing, next_router=router)
        return routing.index, kept, rows.scratch.flatten(0, 1)

    return ours


def scored_apart(problem: Problem) -> Callable[[Rows], Any]:
    """Each layer scores its own input, in a pass of its own."""
    p = problem

    def ours(rows: Rows) -> tuple[Tensor, ...]:
        routing, kept = route_gather(rows.x, p.weight, p.bias, p.plan, LAYER, p.norm_weight, EPS)
        out = weighted_scatter_add(rows.x, rows.residual, rows.update, routing)
        return routing.index, kept, out.flatten(0, 1)

    return ours
