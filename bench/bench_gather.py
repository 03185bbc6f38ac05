"""gather: K rows read, K written."""

from __future__ import annotations

from cells import Cell, op_cells, over
from inputs import Problem
from peers import memcpy
from slot import once_per_shape
from timing import OP_SHARE, Contest, Measure

from pmod_ops import gather


@once_per_shape
def forward(cell: Cell) -> Contest:
    p, moved = Problem(cell), cell.moved(k=2)
    return Contest(
        p.copies("x", moved=moved),
        lambda rows: gather(rows.x, p.routing),
        {"eager": lambda rows: rows.x.flatten(0, 1).index_select(0, p.index), "memcpy": memcpy},
        moved,
    )


@over(op_cells("gather-forward"))
def bench_gather(measure: Measure, cell: Cell) -> None:
    measure(cell, forward(cell), OP_SHARE)
