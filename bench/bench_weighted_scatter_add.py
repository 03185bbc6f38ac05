"""weighted_scatter_add: N + K rows read, N written; backward 2N read, N + 2K written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cells import Cell, op_cells, over
from graph import backward, require_grad
from inputs import Problem, Rows
from peers import compiled, memcpy, scatter_copy, scatter_where
from slot import once_per_shape
from timing import OP_SHARE, Candidate, Contest, Measure
from torch import Tensor

from pmod_ops import Routing, weighted_scatter_add, weighted_scatter_add_


def scatter(p: Problem, routing: Routing) -> Candidate:
    def ours(rows: Rows) -> Tensor:
        out = weighted_scatter_add(rows.x, rows.residual, rows.update, routing)
        return out.flatten(0, 1)

    return ours


@once_per_shape
def forward(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(n=2, k=1)
    forms: dict[str, Callable[..., Tensor]] = {"eager": scatter_copy}
    if cell.headline:
        forms |= {"compile_copy": compiled(scatter_copy), "compile_where": compiled(scatter_where)}

    def peer(function: Callable[..., Tensor]) -> Candidate:
        return lambda rows: function(
            rows.x.flatten(0, 1), rows.residual, rows.update, p.gate, p.index
        )

    peers = {name: peer(function) for name, function in forms.items()}
    copies = p.copies("x", "residual", "update", moved=moved)
    return Contest(copies, scatter(p, p.routing), {**peers, "memcpy": memcpy}, moved)


@once_per_shape
def in_place(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(n=2, k=1)

    def ours(rows: Rows) -> Tensor:
        weighted_scatter_add_(rows.scratch, rows.residual, rows.update, p.routing)
        return rows.scratch.flatten(0, 1)

    def eager(rows: Rows) -> Tensor:
        out = rows.scratch.flatten(0, 1).mul_(p.gate[:, None])
        return out.index_copy_(
            0, p.index, rows.residual.addcmul(p.gate[p.index][:, None], rows.update)
        )

    copies = p.copies("x", "scratch", "residual", "update", moved=moved)
    return Contest(copies, ours, {"eager": eager, "memcpy": memcpy}, moved)


@once_per_shape
def gradient(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(n=3, k=2)
    copies = p.copies("x", "residual", "update", "grad_out", moved=moved)
    routing = replace(p.routing, gate=p.routing.gate.clone())
    require_grad(p.gate, routing.gate)
    for rows in copies:
        require_grad(rows.x, rows.residual, rows.update)
        # the peer's gate is a plain tensor, so it would get a gradient for text rows too
        rows.grad_out.view_as(rows.x)[:, : cell.text] = 0

    def timed(function: Candidate, gate: Tensor) -> Candidate:
        return backward(
            function,
            lambda rows: (rows.x, rows.residual, rows.update, gate),
            lambda rows: (rows.grad_out,),
        )

    def eager(rows: Rows) -> Tensor:
        return scatter_copy(rows.x.flatten(0, 1), rows.residual, rows.update, p.gate, p.index)

    peers = {"eager": timed(eager, p.gate), "memcpy": memcpy}
    return Contest(copies, timed(scatter(p, routing), routing.gate), peers, moved, grad=True)


@over(op_cells("weighted_scatter_add-forward"))
def bench_weighted_scatter_add(measure: Measure, cell: Cell) -> None:
    measure(cell, forward(cell), OP_SHARE)


@over(op_cells("weighted_scatter_add_-forward"))
def bench_weighted_scatter_add_in_place(measure: Measure, cell: Cell) -> None:
    measure(cell, in_place(cell), OP_SHARE)


@over(op_cells("weighted_scatter_add-backward"))
def bench_weighted_scatter_add_backward(measure: Measure, cell: Cell) -> None:
    measure(cell, gradient(cell), OP_SHARE)
