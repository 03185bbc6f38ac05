"""gather_rmsnorm: K rows read, K written; backward 2K read, N written."""

from __future__ import annotations

from cells import Cell, op_cells, over
from graph import backward, require_grad
from inputs import EPS, Problem, Rows
from peers import compiled, llama_rmsnorm, memcpy
from slot import once_per_shape
from timing import OP_SHARE, Candidate, Contest, Measure
from torch import Tensor

from pmod_ops import gather_rmsnorm


def eager(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return llama_rmsnorm(x.flatten(0, 1).index_select(0, index), weight)


@once_per_shape
def forward(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(k=2)
    peers: dict[str, Candidate] = {"eager": lambda rows: eager(rows.x, p.index, p.norm_weight)}
    if cell.headline:
        fused = compiled(eager)
        peers["compile"] = lambda rows: fused(rows.x, p.index, p.norm_weight)
    return Contest(
        p.copies("x", moved=moved),
        lambda rows: gather_rmsnorm(rows.x, p.routing, p.norm_weight, EPS),
        {**peers, "memcpy": memcpy},
        moved,
    )


@once_per_shape
def gradient(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(k=2, n=1)
    copies = p.copies("x", "grad_rows", moved=moved)
    require_grad(p.norm_weight, *(rows.x for rows in copies))

    def timed(function: Candidate) -> Candidate:
        return backward(
            function, lambda rows: (rows.x, p.norm_weight), lambda rows: (rows.grad_rows,)
        )

    def ours(rows: Rows) -> Tensor:
        return gather_rmsnorm(rows.x, p.routing, p.norm_weight, EPS)

    peers = {"eager": timed(lambda rows: eager(rows.x, p.index, p.norm_weight))}
    return Contest(copies, timed(ours), {**peers, "memcpy": memcpy}, moved, grad=True)


@over(op_cells("gather_rmsnorm-forward"))
def bench_gather_rmsnorm(measure: Measure, cell: Cell) -> None:
    measure(cell, forward(cell), OP_SHARE)


@over(op_cells("gather_rmsnorm-backward"))
def bench_gather_rmsnorm_backward(measure: Measure, cell: Cell) -> None:
    measure(cell, gradient(cell), OP_SHARE)
