"""Selection alone, from scores that are there: 5 bytes a row read, 8 and 4 a kept row written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from cells import FP32, RATIOS, Cell, growth_cells, op_cells, over
from inputs import Problem, Rows
from peers import memcpy
from slot import once_per_shape
from timing import OP_SHARE, Candidate, Contest, Measure
from torch import Tensor

from pmod_ops import route
from pmod_ops.route import route_arguments
from pmod_ops.testing import LAYER

GROWTH = (576, 1024, 2880, 4096, 16384, 65536, 262144, 1048576)
NARROW = 8  # rows are not read here, but route wants to see them
VARIED = 262144  # logits in all: the branches of a sort are soon learnt if it always gets the same


def growth_and_ratios() -> list[Cell]:
    cells = growth_cells("select-growth", GROWTH, NARROW, FP32)
    others = [ratio for ratio in RATIOS if ratio != 0.5]
    return cells + [replace(c, ratio=r) for c in cells if c.vision == 2880 for r in others]


def in_turn(logits: list[Tensor], function: Callable[[Tensor], Any]) -> Candidate:
    """Calls `function` on one set of logits after another."""
    turns = cycle(logits)
    return lambda rows: function(next(turns))


def contest(p: Problem, logits: list[Tensor], peers: dict[str, Candidate]) -> Contest:
    """Small inputs stay in the cache, as they do after the layer that wrote them."""
    moved = 13 * p.cell.rows + 4 * p.cell.kept

    def select(scores: Tensor) -> tuple[Tensor, Tensor]:
        routing = route(p.x, p.weight, p.bias, p.plan, LAYER, logits=scores)
        return routing.gate, routing.index

    arguments, _ = route_arguments("route", p.x, p.plan, LAYER, 0.2, 1.0, "tanh", "packed")
    raw = in_turn(logits, lambda scores: torch.ops.pmod.select(scores, *arguments))

    return Contest(
        p.copies(moved=moved),
        in_turn(logits, select),
        {"op": raw, **peers, "memcpy": memcpy},
        moved,
        unlike=frozenset({"op", "memcpy", "topk", "topk_sorted"}),
        calls=max(1, 65536 // p.cell.rows),
    )


@once_per_shape
def forward(cell: Cell) -> Contest:
    p = Problem(cell)

    def eager(rows: Rows) -> tuple[Tensor, Tensor]:
        logits = p.logits.view(cell.batch, cell.length)[:, cell.text :]
        gate = F.pad(torch.tanh(logits) * 0.2 + 1, (cell.text, 0), value=1.0)
        best = logits.topk(cell.k, sorted=False).indices.sort().values + cell.text
        kept = torch.cat([torch.arange(cell.text).expand(cell.batch, cell.text), best], 1)
        return gate.flatten(), (kept + torch.arange(cell.batch)[:, None] * cell.length).flatten()

    return contest(p, [p.logits], {"eager": eager})


@once_per_shape
def growth(cell: Cell) -> Contest:
    p = Problem(cell)
    logits = [
        torch.randn(cell.rows, generator=p.generator) for _ in range(max(1, VARIED // cell.rows))
    ]
    race = contest(
        p,
        logits,
        {
            "topk": in_turn(logits, lambda scores: scores.topk(cell.k, sorted=False)),
            "topk_sorted": in_turn(logits, lambda scores: scores.topk(cell.k)),
        },
    )
    kept = logits[0].topk(cell.k).indices.sort().values
    assert torch.equal(race.ours(race.copies[0])[1].long(), kept)
    return race


@over(op_cells("select-forward"))
def bench_select(measure: Measure, cell: Cell) -> None:
    measure(cell, forward(cell), OP_SHARE)


@over(growth_and_ratios())
def bench_growth(measure: Measure, cell: Cell) -> None:
    measure(cell, growth(cell), OP_SHARE)
