"""Which cells are timed, the most telling ones first: a run may end before the last."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from cells import BF16, FP32, RATIOS, Cell

FP16 = torch.float16
SHAPES = (("llava15", 1), ("llava15", 8), ("llava_next", 1), ("llava_next", 8))
GLUE = ("glue-forward", "glue-training")
FORWARD = (
    *("weighted_scatter_add-forward", "weighted_scatter_add-next", "weighted_scatter_add_-forward"),
    *("gather_rmsnorm-forward", "gather_add_rmsnorm-forward", "gather-forward"),
)
BACKWARD = (
    *("weighted_scatter_add-backward", "gather_rmsnorm-backward"),
    *("gather_add_rmsnorm-backward", "route_gather-backward"),
)
# Kinds of logits for a selection: distinct, close to each other, all the same, few values.
SPREADS = ("normal", "narrow", "tied", "coarse")
SELECT_ROWS = {576: (1, 8, 64), 2880: (1, 8, 64), 16384: (1, 8, 64), 65536: (1, 8), 1_000_000: (1,)}
SCORE_ROWS = (636, 2940, 23520, 131072)
SCORE_WIDTHS = (2048, 4096, 5120, 8192)
NARROW = 8  # a selection reads no rows, but route wants to see them


def cells() -> list[Cell]:
    """All cells, for a GPU."""
    found: list[tuple[int, Cell]] = []
    for kind, (geometry, batch), ratio in product(GLUE, SHAPES, RATIOS):
        found.append((0 if ratio == 0.5 else 3, Cell(kind, geometry, batch, ratio)))
    for kind, (geometry, batch), ratio in product(FORWARD, SHAPES, RATIOS):
        found.append((2 if ratio == 0.5 else 6, Cell(kind, geometry, batch, ratio)))
    for kind, (geometry, batch), ratio in product(BACKWARD, SHAPES, RATIOS):
        found.append((4 if ratio == 0.5 else 7, Cell(kind, geometry, batch, ratio)))
    for kind, geometry in product(BACKWARD, ("llava15", "llava_next")):
        found.append((7, Cell(kind, geometry, 1, 0.5, dtype=FP32)))
    for n, batches in SELECT_ROWS.items():
        for batch in batches:
            for ratio in RATIOS:
                usual = batch == 1 and ratio == 0.5
                found.append((1 if usual else 8, select_cell(n, batch, ratio, "normal")))
        found += [(5, select_cell(n, 1, 0.5, spread)) for spread in SPREADS[1:]]
    for n, hidden, dtype in product(SCORE_ROWS, SCORE_WIDTHS, (BF16, FP16, FP32)):
        usual = hidden == 4096 and dtype == BF16
        cell = Cell("route-forward", f"n{n}", 1, 0.5, hidden, dtype)
        found.append((2 if usual else 9, cell))
    found.sort(key=lambda entry: entry[0])
    return [replace(cell, device="cuda") for _, cell in found]


def dry_cells() -> list[Cell]:
    """One tiny cell of every kind, for the CPU."""
    kinds = (*GLUE, *FORWARD, *BACKWARD, "route-forward")
    found = [Cell(kind, "tiny", 1, 0.5, 64) for kind in kinds]
    return found + [select_cell(96, 2, 0.5, spread) for spread in SPREADS]


def select_cell(n: int, batch: int, ratio: float, spread: str) -> Cell:
    """A selection among n rows of each of so many sequences."""
    return Cell(f"select-{spread}", f"n{n}", batch, ratio, NARROW, FP32)


def to_json(cell: Cell) -> dict[str, Any]:
    """For another process."""
    return {**asdict(cell), "dtype": str(cell.dtype).removeprefix("torch.")}


def from_json(entry: dict[str, Any]) -> Cell:
    """The inverse of `to_json`."""
    return Cell(**{**entry, "dtype": getattr(torch, entry["dtype"])})
