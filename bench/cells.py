"""The cells of the benchmark matrix: which shapes are timed, and how they are called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from pmod_ops.plan import RoutingPlan
from pmod_ops.testing import Sample

BF16, FP32 = torch.bfloat16, torch.float32
RATIOS = (0.85, 0.5, 0.15)
THREADS = (1, 2)
# Text and vision rows of a sequence. "nX" is a sequence of X routable rows alone. "tiny" is for
# calling everything once, not for timing.
GEOMETRIES = {
    "llava15": (60, 576),
    "llava_next": (60, 2880),
    "video": (60, 32768),
    "tiny": (4, 24),
}
BATCHES = (("llava15", 1), ("llava15", 8), ("llava_next", 1), ("llava_next", 8), ("video", 1))


@dataclass(frozen=True)
class Cell:
    """One benchmark: what is timed, on which shape, with how many threads."""

    kind: str
    geometry: str
    batch: int = 1
    ratio: float = 0.5
    hidden: int = 4096
    dtype: torch.dtype = BF16
    threads: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        return (
            f"{self.kind}-{self.geometry}-b{self.batch}-r{self.ratio}-d{self.hidden}"
            f"-{str(self.dtype).removeprefix('torch.')}-t{self.threads}"
        )

    @property
    def text(self) -> int:
        """Rows of a sequence that are always kept; they come first."""
        return GEOMETRIES[self.geometry][0] if self.geometry in GEOMETRIES else 0

    @property
    def vision(self) -> int:
        """Routable rows of a sequence."""
        if self.geometry in GEOMETRIES:
            return GEOMETRIES[self.geometry][1]
        return int(self.geometry.removeprefix("n"))

    @property
    def k(self) -> int:
        """Routable rows that a sequence keeps, as the plan computes it."""
        return int(torch.tensor(self.vision, dtype=torch.float32) * self.ratio)

    @property
    def length(self) -> int:
        """S: rows of a sequence."""
        return self.text + self.vision

    @property
    def rows(self) -> int:
        """N."""
        return self.batch * self.length

    @property
    def kept(self) -> int:
        """K."""
        return self.batch * (self.text + self.k)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.hidden * self.dtype.itemsize

    @property
    def headline(self) -> bool:
        """Whether the cell is in the tables of ratios, and is timed against every peer."""
        return self.dtype == BF16 and self.hidden == 4096

    def moved(self, n: float = 0, k: float = 0, v: float = 0) -> int:
        """Bytes of n times all rows, k times the kept and v times the routable ones."""
        rows = n * self.rows + k * self.kept + v * self.batch * self.vision
        return int(rows * self.row_bytes)

    def plan(self) -> RoutingPlan:
        """The routing plan of the batch."""
        sequence = f"t{self.text} v{self.vision}"
        return Sample("bench", (sequence,) * self.batch, self.ratio).plan(self.device)


def over(cells: Iterable[Cell]) -> pytest.MarkDecorator:
    """Run a benchmark once per cell; ids such as gather-forward-video-b1-r0.5-d4096-bfloat16-t1."""
    return pytest.mark.parametrize("cell", list(cells), ids=str)


def glue_cells(kind: str) -> list[Cell]:
    """The whole matrix. The thread counts of a shape are neighbours: they share its tensors."""
    return [
        Cell(kind, geometry, batch, ratio, hidden, dtype, threads)
        for (geometry, batch), hidden, dtype, ratio, threads in product(
            BATCHES, (4096, 2048), (BF16, FP32), RATIOS, THREADS
        )
    ]


def op_cells(kind: str) -> list[Cell]:
    """The matrix of a single op: R = 0.5, and the other ratios, types and widths at one shape."""
    shapes = [(geometry, batch, 0.5, 4096, BF16) for geometry, batch in BATCHES]
    shapes += [("llava_next", 1, ratio, 4096, BF16) for ratio in (0.85, 0.15)]
    shapes += [("llava_next", 1, 0.5, 4096, FP32), ("llava_next", 1, 0.5, 2048, BF16)]
    return [Cell(kind, *shape, threads) for shape, threads in product(shapes, THREADS)]


def growth_cells(kind: str, sizes: Iterable[int], hidden: int, dtype: torch.dtype) -> list[Cell]:
    """One sequence of n routable rows, for every n."""
    return [
        Cell(kind, f"n{n}", hidden=hidden, dtype=dtype, threads=threads)
        for n, threads in product(sizes, THREADS)
    ]
