"""The tensors of a cell, in enough copies that a timed call finds none of them in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from cells import Cell
from machine import last_level_cache
from torch import Tensor

import pmod_ops
from pmod_ops.plan import ROUTABLE
from pmod_ops.testing import LAYER, nbytes

EPS = 1e-5


@dataclass
class Rows:
    """One copy of the row tensors. Those that a benchmark does not ask for are empty.

    Attributes:
        x: [B, S, D], the input of the layer.
        residual: [K, D], x[index] plus attention.
        update: [K, D], the MLP output (the attention output, for gather_add_rmsnorm).
        grad_rows: [K, D], gradient of the gathered rows.
        grad_out: [N, D], gradient of the output.
        scratch: like x, for what is written in place.
        source: what the memcpy peer copies, half of the bytes that the op must move.
    """

    x: Tensor
    residual: Tensor
    update: Tensor
    grad_rows: Tensor
    grad_out: Tensor
    scratch: Tensor
    source: Tensor

    def refresh(self) -> None:
        """Undo what was written in place."""
        if self.scratch.numel():
            self.scratch.copy_(self.x)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return list(vars(self).values())


class Problem:
    """Everything of a shape that a call does not stream: plan, weights, the routing, masks.

    The scores of kept and skipped rows lie on two sides of a wide gap, so that candidates that
    score in bfloat16 and in float32 keep the same rows and can be compared.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell, self.plan = cell, cell.plan()
        self.generator = torch.Generator(cell.device).manual_seed(cell.rows * cell.hidden)
        hidden, dtype = cell.hidden, cell.dtype
        self.weight = (self.normal(hidden, dtype=torch.float32) / hidden**0.5).to(dtype)
        self.bias = torch.full((1,), 0.125, dtype=dtype, device=cell.device)
        self.norm_weight = self.normal(hidden)
        self.x = self._scored_rows()
        with torch.no_grad():
            self.routing = pmod_ops.route(self.x, self.weight, self.bias, self.plan, LAYER)
        self.logits = self.routing.logits
        self.index = self.routing.index.long()
        self.gate = self.routing.gate.to(dtype)
        shape = (cell.batch, cell.length)
        self.target = (self.plan.kind == ROUTABLE).view(shape)
        self.valid = torch.ones(shape, dtype=torch.bool, device=cell.device)
        self.positions = torch.arange(cell.length, device=cell.device).expand(shape)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values of the cell's dtype, on its device."""
        given = {"dtype": dtype or self.cell.dtype, "device": self.cell.device}
        return torch.randn(*shape, generator=self.generator, **given)

    def _scored_rows(self) -> Tensor:
        cell, weight = self.cell, self.weight.float()
        x = torch.empty(cell.batch, cell.length, cell.hidden, dtype=cell.dtype, device=cell.device)
        for sequence in x:
            rows = self.normal(cell.length, cell.hidden, dtype=torch.float32)
            vision = rows[cell.text :]
            wanted = (1 + 0.1 * self.normal(cell.vision, dtype=torch.float32)).clamp(0.6, 1.4)
            order = torch.randperm(cell.vision, generator=self.generator, device=cell.device)
            wanted[order[cell.k :]] *= -1
            step = (wanted - self.bias.float() - vision @ weight) / (weight @ weight)
            vision.addcmul_(step[:, None], weight)
            sequence.copy_(rows)
        return x

    def copies(self, *names: str, moved: int) -> list[Rows]:
        """Copies of the named tensors whose sum exceeds twice the last-level cache.

        One on a GPU, whose cache is small enough to be emptied before every call, and of what is
        not timed.
        """
        cell = self.cell
        kept, every = (cell.kept, cell.hidden), (cell.rows, cell.hidden)
        make = {
            "x": lambda: self.x,
            "residual": lambda: self.normal(*kept),
            "update": lambda: self.normal(*kept),
            "grad_rows": lambda: self.normal(*kept),
            "grad_out": lambda: self.normal(*every),
            "scratch": lambda: self.x.clone(),
        }
        empty = torch.empty(0, dtype=cell.dtype, device=cell.device)
        tensors = {name: make[name]() if name in names else empty for name in make}
        half = moved // (2 * cell.dtype.itemsize)
        source = torch.ones(half, dtype=cell.dtype, device=cell.device)
        first = Rows(**tensors, source=source)
        read = nbytes(*first.tensors()) - nbytes(source, first.scratch)
        rotated = read > 0 and cell.device == "cpu" and cell.geometry != "tiny"
        count = ceil(2 * last_level_cache() / read) if rotated else 1
        clones = [Rows(*(t.clone() for t in first.tensors())) for _ in range(count - 1)]
        return [first, *clones]
