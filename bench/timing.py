"""Times several candidates in turn in one process, and puts their ratios into the result."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from agreement import assert_agree, tensors
from cells import Cell
from inputs import Rows
from machine import facts
from pytest_benchmark.fixture import BenchmarkFixture

Candidate = Callable[[Rows], Any]
MIN_ROUNDS, MAX_ROUNDS = 5, 60
OP_SHARE = 0.2  # of the budget, for a cell of a single op
SLOW = "official"  # timed in some of the rounds only
SLOW_SHARE, SLOW_ROUNDS = 0.25, 3


@dataclass
class Contest:
    """Candidates for one job, on the same inputs.

    Attributes:
        copies: of the inputs; each call takes the next.
        ours: what is measured. Other forms of it can be among the peers.
        peers: candidates that are compared with it.
        moved: the least bytes that the job reads and writes.
        unlike: peers that do another job, so that their results are not compared.
        grad: whether gradients are recorded.
        calls: calls per timing, for what takes microseconds.
        least_rounds: rounds, if the budget of the cell does not allow for more.
    """

    copies: list[Rows]
    ours: Candidate
    peers: dict[str, Candidate]
    moved: int
    unlike: frozenset[str] = frozenset({"memcpy"})
    grad: bool = False
    calls: int = 1
    least_rounds: int = MIN_ROUNDS


Measure = Callable[[Cell, Contest, float], None]  # the fixture; the number is a share of the budget


class Sample(NamedTuple):
    """Seconds of one call."""

    wall: float
    cpu: float


@dataclass
class Race:
    """Runs a contest: warm-up, rounds, ratios."""

    contest: Contest
    budget: float
    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    round: int = -1
    taken: int = 0

    def __post_init__(self) -> None:
        self.candidates = {"ours": self.contest.ours, **self.contest.peers}
        self.samples = {name: {} for name in self.candidates}
        self.rounds = dict.fromkeys(self.candidates, self.contest.least_rounds)

    def warm_up(self, copies: int | None = None) -> None:
        """First calls, on every copy; compares results on the first and plans the rounds."""
        contest, cost = self.contest, {}
        self._compare(contest.copies[0])
        for name, candidate in self.candidates.items():
            for rows in contest.copies[:copies]:
                start = time.perf_counter()
                candidate(rows)
                cost[name] = time.perf_counter() - start
        self._plan({name: seconds * contest.calls for name, seconds in cost.items()})

    def _compare(self, rows: Rows) -> None:
        if self.contest.unlike.issuperset(self.contest.peers):
            return
        rows.refresh()
        expected: Any = tensors(self.contest.ours(rows))
        if rows.scratch.numel():
            expected = [t.clone() for t in expected]
        for name, candidate in self.contest.peers.items():
            rows.refresh()
            out = candidate(rows)
            if name not in self.contest.unlike:
                assert_agree(out, expected, name)
            del out

    def _plan(self, cost: dict[str, float]) -> None:
        slow = cost.pop(SLOW, None)
        share = 1.0 if slow is None else 1 - SLOW_SHARE
        within_budget = share * self.budget / sum(cost.values())
        rounds = int(min(MAX_ROUNDS, max(self.contest.least_rounds, within_budget)))
        self.rounds = dict.fromkeys(self.candidates, rounds)
        if slow is not None:
            affordable = int(SLOW_SHARE * self.budget / slow)
            self.rounds[SLOW] = min(rounds, max(SLOW_ROUNDS, affordable))

    def time_peers(self) -> None:
        """The setup of a round: every peer that is due, in an order that moves on."""
        self.round += 1
        total = self.rounds["ours"]
        due = [
            name
            for name in self.contest.peers
            if (self.round + 1) * self.rounds[name] // total
            > self.round * self.rounds[name] // total
        ]
        turn = self.round % max(1, len(due))
        for name in due[turn:] + due[:turn]:
            self._time(name)

    def time_ours(self) -> None:
        """The measured part of a round."""
        self._time("ours")

    def _time(self, name: str) -> None:
        candidate, calls = self.candidates[name], range(self.contest.calls)
        rows = self.contest.copies[self.taken % len(self.contest.copies)]
        self.taken += 1
        wall, cpu = time.perf_counter(), time.process_time()
        out = None
        for _ in calls:
            out = candidate(rows)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        del out  # freed after the clock has stopped, whoever allocated it
        self.samples[name][self.round] = Sample(wall / len(calls), cpu / len(calls))

    def results(self) -> dict[str, Any]:
        """Medians in milliseconds, and medians of the ratios to ours of each round."""
        ours = self.samples["ours"]
        found: dict[str, Any] = {"bytes": self.contest.moved}
        for clock in Sample._fields:
            times = {name: [getattr(s, clock) for s in runs.values()] for name, runs in self._all()}
            found[f"{clock}_ms"] = {n: significant(1e3 * median(t)) for n, t in times.items()}
            found[f"{clock}_ratio"] = {
                name: significant(
                    median(getattr(s, clock) / getattr(ours[i], clock) for i, s in runs.items())
                )
                for name, runs in self._all()
                if name != "ours"
            }
        found["GB/s"] = significant(self.contest.moved / found["wall_ms"]["ours"] / 1e6)
        if "memcpy" in found["wall_ratio"]:
            found["of_memcpy"] = found["wall_ratio"]["memcpy"]
        if SLOW in self.rounds:
            found["rounds_official"] = self.rounds[SLOW]
        return found

    def _all(self) -> Iterator[tuple[str, dict[int, Sample]]]:
        yield from ((name, runs) for name, runs in self.samples.items() if runs)


def significant(value: float, digits: int = 4) -> float:
    """`value` rounded to so many digits: the rest is noise, and the results are committed."""
    return float(f"{value:.{digits}g}")


def run(benchmark: BenchmarkFixture, cell: Cell, contest: Contest, budget: float) -> None:
    """Measure `cell`; the result of the benchmark carries everything that was found."""
    load = os.getloadavg()[0]
    torch.set_num_threads(cell.threads)
    race = Race(contest, budget)
    benchmark.group = cell.kind
    with torch.set_grad_enabled(contest.grad), no_collection():
        race.warm_up(None if benchmark.enabled else 1)
        benchmark.pedantic(race.time_ours, setup=race.time_peers, rounds=race.rounds["ours"])
    if benchmark.enabled:
        benchmark.extra_info.update(
            {
                "threads": cell.threads,
                "rows": cell.rows,
                "kept": cell.kept,
                **race.results(),
                "load": significant(load),
                **facts(),
            }
        )


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, and not before the end."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
