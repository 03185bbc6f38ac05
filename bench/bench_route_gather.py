"""route_gather: V + K rows read, K written; backward K + N read, N written."""

from __future__ import annotations

import torch
from cells import Cell, op_cells, over
from graph import backward, require_grad
from inputs import EPS, Problem, Rows
from peers import choose, llama_rmsnorm, memcpy
from slot import once_per_shape
from timing import OP_SHARE, Candidate, Contest, Measure
from torch import Tensor

from pmod_ops import route_gather
from pmod_ops.testing import LAYER


def both(p: Problem) -> tuple[Candidate, Candidate]:
    """Ours and clean eager: weights, gathered rows, kept rows."""

    def ours(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        routing, kept = route_gather(rows.x, p.weight, p.bias, p.plan, LAYER, p.norm_weight, EPS)
        return routing.gate, kept, routing.index

    def eager(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        gate, kept = choose(rows.x, p.weight, p.bias, p.cell.text, p.cell.k)
        gathered = rows.x.flatten(0, 1).index_select(0, kept)
        return gate, llama_rmsnorm(gathered, p.norm_weight), kept

    return ours, eager


@once_per_shape
def forward(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(v=1, k=2)
    ours, eager = both(p)
    copies = p.copies("x", moved=moved)
    return Contest(copies, ours, {"eager": eager, "memcpy": memcpy}, moved)


@once_per_shape
def gradient(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(k=1, n=2)
    copies = p.copies("x", "grad_rows", moved=moved)
    parameters = (p.weight, p.bias, p.norm_weight)
    require_grad(*parameters, *(rows.x for rows in copies))
    grad_gate = p.normal(cell.rows, dtype=torch.float32)

    def timed(function: Candidate, grad_gate: Tensor) -> Candidate:
        return backward(
            lambda rows: function(rows)[:2],
            lambda rows: (rows.x, *parameters),
            lambda rows: (grad_gate, rows.grad_rows),
        )

    ours, eager = both(p)
    peers = {"eager": timed(eager, grad_gate.to(cell.dtype)), "memcpy": memcpy}
    return Contest(copies, timed(ours, grad_gate), peers, moved, grad=True)


@over(op_cells("route_gather-forward"))
def bench_route_gather(measure: Measure, cell: Cell) -> None:
    measure(cell, forward(cell), OP_SHARE)


@over(op_cells("route_gather-backward"))
def bench_route_gather_backward(measure: Measure, cell: Cell) -> None:
    measure(cell, gradient(cell), OP_SHARE)
