"""The steps that time: compile the peers ahead, run the matrix, run it on the Triton kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import Cell

from on_gpu import contests, facts, matrix
from on_gpu.child import OUT_OF_TIME, Child, python, wait
from on_gpu.steps import Outcome, Run
from on_gpu.worker import Orders

GRACE = 15.0  # seconds that a cell may go on for when its time is up
TRITON_SHARE = 0.15  # of the time of the matrix
UNKNOWN = {"launches": None, "waits": None, "peak_mb": None}


class Team:
    """Workers, one after the other: when one dies, the next goes on without what it died of."""

    def __init__(self, run: Run, cells: Sequence[Cell], until: float, **orders: Any) -> None:
        self.run, self.cells, self.until, self.orders = run, cells, until, orders
        self.env: dict[str, str] = {}
        self.results: dict[int, dict[str, Any]] = {}
        self.dropped: dict[tuple[str, str], str] = {}  # by kind and candidate, why
        self.backend = ""

    def go(self) -> None:
        """Time all cells, or as many as there is time for."""
        while self.waiting() and time.time() < self.until:
            numbers = self.waiting()
            child, events = self.work(numbers)
            told = [json.loads(line) for line in events.read_text().splitlines()]
            self.backend = next((e["backend"] for e in told if e["event"] == "hello"), "")
            for event in told:
                if event["event"] == "result":
                    self.results[numbers[event["number"]]] = event
            open_cell, candidate = unfinished(told)
            if child.ended in ("exit code 0", OUT_OF_TIME):
                return
            if open_cell is None:
                raise RuntimeError(f"a worker ended ({child.ended}): {child.tail()}")
            self.blame(numbers[open_cell], candidate, f"the process ended: {child.ended}")

    def waiting(self) -> list[int]:
        """Cells without a result."""
        return [number for number in range(len(self.cells)) if number not in self.results]

    def work(self, numbers: Sequence[int]) -> tuple[Child, Path]:
        """One worker, until it ends."""
        orders, events = self.run.scratch / "orders.json", self.run.scratch / "events.jsonl"
        events.write_text("")
        Orders(
            cells=[matrix.to_json(self.cells[number]) for number in numbers],
            until=self.until,
            without=[list(pair) for pair in self.dropped],
            **self.orders,
        ).write(orders)
        command = python("on_gpu.worker", orders, events)
        log = self.run.scratch / "worker.log"
        child = Child(command, log, self.until + GRACE, cache(self.run) | self.env, events)
        wait([child])
        return child, events

    def blame(self, number: int, candidate: str | None, why: str) -> None:
        """Leave the peer out from now on; without ours, or one to blame, there is no cell."""
        cell = self.cells[number]
        if candidate in (None, "ours") or (cell.kind, candidate) in self.dropped:
            self.results[number] = {"bytes": None, "error": why, "candidates": {}}
        else:
            self.dropped[cell.kind, str(candidate)] = why

    def entries(self) -> list[dict[str, Any]]:
        """The cells in the form of the results file."""
        return [self.entry(number) for number in sorted(self.results)]

    def entry(self, number: int) -> dict[str, Any]:
        """One cell."""
        cell, result = self.cells[number], self.results[number]
        dropped = {name: why for (kind, name), why in self.dropped.items() if kind == cell.kind}
        lost = {
            name: {"error": why, "graph_error": None, **UNKNOWN, "figures": {}}
            for name, why in dropped.items()
        }
        shape = matrix.to_json(cell)
        return {
            "label": self.run.results["label"],
            **{n: shape[n] for n in ("kind", "geometry", "batch", "ratio", "hidden", "dtype")},
            "rows": cell.rows,
            "kept": cell.kept,
            "bytes": result["bytes"],
            "error": result["error"],
            "candidates": result["candidates"] | (lost if result["error"] is None else {}),
        }


def unfinished(events: Sequence[dict[str, Any]]) -> tuple[int | None, str | None]:
    """The cell that was begun and not finished, and the candidate that was called last."""
    cell = candidate = None
    for event in events:
        if event["event"] == "cell":
            cell, candidate = event["number"], None
        elif event["event"] == "candidate":
            candidate = event["name"]
        elif event["event"] == "result":
            cell = None
    return cell, candidate


def cache(run: Run) -> dict[str, str]:
    """Where compiled kernels are kept, for all processes of a run."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(run.output / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }


def compile_peers(run: Run, seconds: float) -> Outcome:
    """Compile with several processes at once what the matrix will find in the cache on disk."""
    if run.dry:
        return Outcome("skipped", "the tiny cells of a dry run have no compiled peers")
    cells = [cell for cell in matrix.cells() if contests.has_compiled(cell)]
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    until, children, logs = time.time() + seconds, [], []
    for worker in range(workers):
        orders, events = (run.scratch / f"compile{worker}.{end}" for end in ("json", "jsonl"))
        events.write_text("")
        mine = [matrix.to_json(cell) for cell in cells[worker::workers]]
        Orders(cells=mine, until=until, compile_only=True).write(orders)
        log = run.scratch / f"compile{worker}.log"
        command = python("on_gpu.worker", orders, events)
        children.append(Child(command, log, until, cache(run)))
        logs.append(events)
    wait(children)
    told = [json.loads(line) for events in logs for line in events.read_text().splitlines()]
    done = [event for event in told if event["event"] == "result"]
    failed = [event for event in done if event.get("error")]
    summary = f"{len(done)} of {len(cells)} cells compiled, {len(failed)} with an error"
    if len(done) < len(cells):
        return Outcome("out of time", f"{summary}; the others compile while they are timed")
    return Outcome("failed" if failed else "passed", summary)


def time_matrix(run: Run, seconds: float) -> Outcome:
    """All cells, then the main ones on the Triton kernels, if there are any."""
    cells = matrix.dry_cells() if run.dry else matrix.cells()
    triton = importlib.util.find_spec("pmod_ops._triton") is not None
    until = time.time() + seconds - (GRACE if not run.dry else 0)
    share = TRITON_SHARE if triton and not run.dry else 0
    team = Team(run, cells, until - share * seconds, dry=run.dry)
    try:
        team.go()
    finally:
        run.results["cells"] = team.entries()
        run.results["left_out"] = [str(cells[number]) for number in team.waiting()]
    notes = []
    if share:
        notes.append(time_triton(run, [c for c in cells if usual(c)], until))
    run.results["facts"]["nvidia_smi_after"] = facts.nvidia_smi()
    failed = [entry for entry in run.results["cells"] if entry["error"]]
    notes.insert(
        0, f"{len(run.results['cells'])} of {len(cells)} cells, {len(failed)} without figures"
    )
    if failed:
        return Outcome("failed", "; ".join(notes))
    return Outcome("out of time" if team.waiting() else "passed", "; ".join(notes))


def usual(cell: Cell) -> bool:
    """The cells that are also timed on the Triton kernels."""
    return cell.headline and cell.ratio == 0.5


def time_triton(run: Run, cells: Sequence[Cell], until: float) -> str:
    """Add figures of the Triton kernels to the cells, from a process that uses no others."""
    team = Team(run, cells, until, only=["memcpy"])
    team.env = {"PMOD_CUDA_IMPL": "triton"}
    team.go()
    if "triton" not in team.backend.lower():
        return f"Triton kernels were asked for, but the process had: {team.backend}"
    adopt_triton(run.results["cells"], team.entries())
    return f"{len(team.results)} cells on the Triton kernels"


def adopt_triton(cells: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Put the figures of the other process beside those of this one."""
    key = ("kind", "geometry", "batch", "ratio", "hidden", "dtype")
    by_shape = {tuple(entry[name] for name in key): entry for entry in cells}
    for other in others:
        entry = by_shape.get(tuple(other[name] for name in key))
        if entry is not None and "ours" in other["candidates"]:
            entry["candidates"]["triton"] = other["candidates"]["ours"]
            entry["candidates"]["triton_memcpy"] = other["candidates"]["memcpy"]
