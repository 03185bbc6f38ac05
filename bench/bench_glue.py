"""All a routed layer adds around attention and MLP: route, gather, input norm, scatter back.

Forward moves 2N + 3K rows: K rows gathered and K written, then the N - K skipped rows, residual and
update read and N written; the scores come from the layer before. Training scores x itself (V) and
goes back: N + K + (N - K) read and N + K written by the scatter (the kept rows of the gradient of x
are not written yet), 2K read and K written by the norm. Together V + 5N + 7K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cells import BF16, Cell, glue_cells, growth_cells, over
from inputs import EPS, Problem, Rows
from ours import chained, in_place, scored_apart
from peers import forward_peer, glue_peers, memcpy
from slot import once_per_shape
from timing import Contest, Measure
from torch import Tensor

from pmod_ops import route_gather, weighted_scatter_add
from pmod_ops.testing import LAYER

GROWTH = (576, 2304, 9216, 36864, 147456)
WARM = [c for c in glue_cells("glue-warm") if c.headline and c.geometry == "llava15"]
WARM = [c for c in WARM if c.batch == 1]
# Backward passes over the largest shapes take seconds: the other types and widths do one ratio.
TRAINING = [c for c in glue_cells("glue-training") if c.headline or c.ratio == 0.5]


def share(cell: Cell) -> float:
    """Of the budget: the cells of the tables get all of it."""
    return 1.0 if cell.headline else 0.2


def forward(cell: Cell) -> Contest:
    problem, moved = Problem(cell), cell.moved(n=2, k=3)
    peers = {n: forward_peer(f, problem) for n, f in glue_peers(problem, training=False).items()}
    forms = {"in_place": in_place(problem), "scored_apart": scored_apart(problem)}
    return Contest(
        problem.copies("x", "residual", "update", "scratch", moved=moved),
        chained(problem),
        {**forms, **peers, "memcpy": memcpy},
        moved,
    )


forward_cold = once_per_shape(forward)


@once_per_shape
def forward_warm(cell: Cell) -> Contest:
    contest = forward(cell)
    contest.copies = contest.copies[:1]
    return contest


@once_per_shape
def growth(cell: Cell) -> Contest:
    problem, moved = Problem(cell), cell.moved(n=2, k=3)
    copies = problem.copies("x", "residual", "update", moved=moved)
    return Contest(copies, chained(problem), {"memcpy": memcpy}, moved)


@once_per_shape
def training(cell: Cell) -> Contest:
    problem, moved = Problem(cell), cell.moved(v=1, n=5, k=7)
    p, copies = (
        problem,
        problem.copies("x", "residual", "update", "grad_rows", "grad_out", moved=moved),
    )
    parameters = [t.requires_grad_() for t in (p.weight, p.bias, p.norm_weight)]
    for rows in copies:
        for leaf in (rows.x, rows.residual, rows.update):
            leaf.requires_grad_()

    def ours(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        routing, kept, x = route_gather(
            rows.x, p.weight, p.bias, p.plan, LAYER, p.norm_weight, EPS, return_x=True
        )
        out = weighted_scatter_add(x, rows.residual, rows.update, routing)
        return routing.index, kept, out.flatten(0, 1)

    def with_backward(glue: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
        def both(rows: Rows) -> tuple[Tensor, ...]:
            kept, gathered, out = glue(rows)
            leaves = (rows.x, *parameters, rows.residual, rows.update)
            upstream = (rows.grad_rows, rows.grad_out)
            gradients = torch.autograd.grad((gathered, out), leaves, upstream)
            return kept, gathered.detach(), out.detach(), *gradients

        return both

    peers = {n: forward_peer(f, p) for n, f in glue_peers(problem, training=True).items()}
    timed: dict[str, Callable[[Rows], Any]] = {n: with_backward(f) for n, f in peers.items()}
    return Contest(copies, with_backward(ours), {**timed, "memcpy": memcpy}, moved, grad=True)


@over(glue_cells("glue-forward"))
def bench_forward(measure: Measure, cell: Cell) -> None:
    measure(cell, forward_cold(cell), share(cell))


@over(WARM)
def bench_warm(measure: Measure, cell: Cell) -> None:
    measure(cell, forward_warm(cell), 0.2)


@over(growth_cells("glue-growth", GROWTH, 1024, BF16))
def bench_growth(measure: Measure, cell: Cell) -> None:
    measure(cell, growth(cell), 0.2)


@over(TRAINING)
def bench_training(measure: Measure, cell: Cell) -> None:
    measure(cell, training(cell), share(cell))
