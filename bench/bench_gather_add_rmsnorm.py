"""gather_add_rmsnorm: 2K rows read, 2K written; backward 3K read, K + N written."""

from __future__ import annotations

from cells import Cell, op_cells, over
from graph import backward, require_grad
from inputs import EPS, Problem, Rows
from peers import compiled, llama_rmsnorm, memcpy
from slot import once_per_shape
from timing import OP_SHARE, Candidate, Contest, Measure
from torch import Tensor

from pmod_ops import gather_add_rmsnorm


def eager(x: Tensor, attn_out: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    residual = x.flatten(0, 1).index_select(0, index) + attn_out
    return residual, llama_rmsnorm(residual, weight)


@once_per_shape
def forward(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(k=4)
    rest = (p.index, p.norm_weight)
    peers: dict[str, Candidate] = {"eager": lambda rows: eager(rows.x, rows.update, *rest)}
    if cell.headline:
        fused = compiled(eager)
        peers["compile"] = lambda rows: fused(rows.x, rows.update, *rest)
    return Contest(
        p.copies("x", "update", moved=moved),
        lambda rows: gather_add_rmsnorm(rows.x, rows.update, p.routing, p.norm_weight, EPS),
        {**peers, "memcpy": memcpy},
        moved,
    )


@once_per_shape
def gradient(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(k=4, n=1)
    # the residual's gradient has the shape of `residual`, and is taken from there
    copies = p.copies("x", "update", "residual", "grad_rows", moved=moved)
    require_grad(p.norm_weight, *(t for rows in copies for t in (rows.x, rows.update)))

    def timed(function: Candidate) -> Candidate:
        return backward(
            function,
            lambda rows: (rows.x, rows.update, p.norm_weight),
            lambda rows: (rows.residual, rows.grad_rows),
        )

    def ours(rows: Rows) -> tuple[Tensor, Tensor]:
        return gather_add_rmsnorm(rows.x, rows.update, p.routing, p.norm_weight, EPS)

    peers = {"eager": timed(lambda rows: eager(rows.x, rows.update, p.index, p.norm_weight))}
    return Contest(copies, timed(ours), {**peers, "memcpy": memcpy}, moved, grad=True)


@over(op_cells("gather_add_rmsnorm-forward"))
def bench_gather_add_rmsnorm(measure: Measure, cell: Cell) -> None:
    measure(cell, forward(cell), OP_SHARE)


@over(op_cells("gather_add_rmsnorm-backward"))
def bench_gather_add_rmsnorm_backward(measure: Measure, cell: Cell) -> None:
    measure(cell, gradient(cell), OP_SHARE)
