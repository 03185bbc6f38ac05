"""The process that times cells: `python -m on_gpu.worker ORDERS EVENTS`, see `benchmarks.py`.

It is a process of its own because a kernel that goes wrong takes the whole CUDA context with it.
ORDERS is a JSON file (see `Orders`). Every event is a line of JSON appended to EVENTS: what it is
about to do, so that the parent knows what it died of, and the figures of a cell when it has them.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from cells import Cell
from timing import Contest

import pmod_ops
from on_gpu import contests, matrix
from on_gpu.clocks import Clock, CudaClock, HostClock
from on_gpu.measure import brief, measure

MOST_SECONDS, LEAST_SECONDS = 1.0, 0.1  # of timing, for one cell
DRY_SECONDS = 0.0  # as few rounds as there can be


@dataclass
class Orders:
    """What a worker is to do.

    Attributes:
        cells: as JSON, in order.
        until: the time (of `time.time`) at which no more cells are begun.
        dry: measure nothing, on the CPU.
        compile_only: only call the compiled peers, so that their kernels are in the cache on disk.
        only: candidates to time, or None for all.
        without: pairs (kind, candidate) that are left out, because they ended a worker before.
    """

    cells: list[dict[str, Any]]
    until: float
    dry: bool = False
    compile_only: bool = False
    only: list[str] | None = None
    without: list[list[str]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """For the worker."""
        path.write_text(json.dumps(asdict(self)))


class Worker:
    """Carries out orders and tells of them."""

    def __init__(self, orders: Orders, events: Path) -> None:
        self.orders, self.events = orders, events

    def tell(self, event: str, **what: Any) -> None:
        """Append an event; the file is closed again, so a crash loses nothing."""
        with self.events.open("a") as file:
            file.write(json.dumps({"event": event, **what}) + "\n")

    def run(self) -> None:
        """All cells, while there is time."""
        clock = HostClock() if self.orders.dry else CudaClock()
        if self.orders.dry:
            torch.set_num_threads(1)  # threads that wait for each other would take most of the time
        gc.freeze()  # collecting between cells looks at what came later only
        self.tell("hello", backend=pmod_ops.backend_info()["devices"]["cuda"])
        for number, entry in enumerate(self.orders.cells):
            left = self.orders.until - time.time()
            if left <= 0:
                return
            cell = matrix.from_json(entry)
            self.tell("cell", number=number)
            share = left / (len(self.orders.cells) - number) / 2  # the other half prepares
            seconds = (
                DRY_SECONDS if self.orders.dry else min(MOST_SECONDS, max(LEAST_SECONDS, share))
            )
            self.tell("result", number=number, **self.cell(cell, clock, seconds))
            gc.collect()

    def cell(self, cell: Cell, clock: Clock, seconds: float) -> dict[str, Any]:
        """Figures of one cell, or why there are none."""
        try:
            if contests.has_compiled(cell):
                torch.compiler.reset()  # every cell compiles the same functions for its own sizes
            with clock.session():
                contest = contests.contest(cell)
            contest.peers = {n: p for n, p in contest.peers.items() if self.included(cell, n)}
            if self.orders.compile_only:
                return self.compile(contest)
            found = measure(contest, clock, seconds, lambda name: self.tell("candidate", name=name))
        except Exception as error:
            clock.settle()  # raises, and ends the process, if it is the device that failed
            return {"bytes": None, "error": brief(error), "candidates": {}}
        return {"bytes": contest.moved, "error": None, "candidates": found}

    def included(self, cell: Cell, name: str) -> bool:
        """Whether the orders want the peer."""
        if self.orders.compile_only and not name.startswith(contests.COMPILED):
            return False
        wanted = self.orders.only is None or name in self.orders.only
        return wanted and [cell.kind, name] not in self.orders.without

    def compile(self, contest: Contest) -> dict[str, Any]:
        """Call every compiled peer once."""
        with torch.set_grad_enabled(contest.grad):
            for peer in contest.peers.values():
                peer(contest.copies[0])
        return {}


def main() -> None:
    """Entry point."""
    orders, events = sys.argv[1:]
    Worker(Orders(**json.loads(Path(orders).read_text())), Path(events)).run()


if __name__ == "__main__":
    main()
