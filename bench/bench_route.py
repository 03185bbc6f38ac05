"""route: V routable rows read."""

from __future__ import annotations

from cells import Cell, op_cells, over
from inputs import Problem, Rows
from peers import choose, memcpy
from slot import once_per_shape
from timing import OP_SHARE, Contest, Measure
from torch import Tensor

from pmod_ops import route
from pmod_ops.testing import LAYER


@once_per_shape
def forward(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(v=1)

    def ours(rows: Rows) -> tuple[Tensor, Tensor]:
        routing = route(rows.x, p.weight, p.bias, p.plan, LAYER)
        return routing.gate, routing.index

    return Contest(
        p.copies("x", moved=moved),
        ours,
        {
            "eager": lambda rows: choose(rows.x, p.weight, p.bias, cell.text, cell.k),
            "memcpy": memcpy,
        },
        moved,
    )


@over(op_cells("route-forward"))
def bench_route(measure: Measure, cell: Cell) -> None:
    measure(cell, forward(cell), OP_SHARE)
