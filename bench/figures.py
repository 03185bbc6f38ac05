"""Reads stored results back: cells, ratios, goals. Free of torch, for tools/bench_report.py."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAIN, DEFAULT = "_baseline.json", "_default-allocator-baseline.json"
ID = re.compile(r"\[(.+)-([^-]+)-b(\d+)-r([\d.]+)-d(\d+)-(\w+)-t(\d+)\]$")
# the others are copies, or forms of ours
RIVALS = ("eager", "compile", "official", "topk", "dense")
FORWARD, TRAINING = "glue-forward", "glue-training"


@dataclass(frozen=True)
class Result:
    """One benchmark: its cell, from the id, and what was recorded."""

    kind: str
    geometry: str
    batch: int
    ratio: float
    hidden: int
    dtype: str
    threads: int
    info: dict[str, Any]

    @property
    def headline(self) -> bool:
        """Whether the cell is one of the main tables."""
        return (self.hidden, self.dtype) == (4096, "bfloat16")

    @property
    def label(self) -> str:
        """The cell in words."""
        shape = f"{self.geometry}, B = {self.batch}, R = {self.ratio:g}"
        return f"{shape}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def against(self, peer: str) -> float | None:
        """How many times our time the fastest form of `peer` took; None if it was not timed."""
        found = self.info["wall_ratio"].items()
        return min((value for name, value in found if name.startswith(peer)), default=None)

    def beaten_by(self) -> dict[str, float]:
        """The peers that were faster, and their share of our time."""
        found = sorted(self.info["wall_ratio"].items())
        return {name: value for name, value in found if name.startswith(RIVALS) and value < 1}

    def layer_shares(self) -> tuple[float, float, float]:
        """Of a layer's CPU time: the glue, the glue less what it replaces, the official glue."""
        cpu = self.info["cpu_ratio"]
        layer = cpu["layer"]
        return 1 / layer, (1 - cpu["own_parts"]) / layer, cpu["official"] / layer


@dataclass(frozen=True)
class Runs:
    """The baseline, and the small one with glibc's own allocator settings."""

    main: list[Result]
    default: list[Result]
    about: str

    def of(self, kind: str, *, headline: bool = False) -> list[Result]:
        """Results of the baseline of one kind, perhaps those of the main tables alone."""
        return [r for r in self.main if r.kind == kind and (r.headline or not headline)]


def newest(folder: Path, ending: str) -> Path | None:
    """The stored run with the highest number."""
    return max(folder.glob(f"*/[0-9]*{ending}"), key=lambda path: path.name, default=None)


def load(folder: Path) -> Runs | None:
    """Reads the newest results; None where there are none."""
    main, default = newest(folder, MAIN), newest(folder, DEFAULT)
    if main is None:
        return None
    document = json.loads(main.read_text())
    results = [parse(entry) for entry in document["benchmarks"]]
    others = json.loads(default.read_text())["benchmarks"] if default else []
    facts, commit = results[0].info, document["commit_info"]
    loads = [r.info["load"] for r in results]
    changed = " with changes" if commit.get("dirty") else ""
    about = (
        f"{facts['cpu']}, {facts['cores']} cores, instruction set {facts['isa']}, torch"
        f" {facts['torch']}, Python {facts['python']}; {document['datetime'][:10]}, commit"
        f" {str(commit['id'])[:10]}{changed}; load average before a cell {min(loads):.1f} to"
        f" {max(loads):.1f}."
    )
    return Runs(results, [parse(entry) for entry in others], about)


def parse(benchmark: dict[str, Any]) -> Result:
    """One entry of pytest-benchmark's file."""
    match = ID.search(benchmark["name"])
    assert match, benchmark["name"]
    kind, geometry, batch, ratio, hidden, dtype, threads = match.groups()
    shape = int(batch), float(ratio), int(hidden), dtype, int(threads)
    return Result(kind, geometry, *shape, benchmark["extra_info"])


def mean(values: Sequence[float]) -> float:
    """The geometric mean; the plain one if a value is not positive, as a net share can be."""
    if min(values) <= 0:
        return sum(values) / len(values)
    return math.exp(sum(map(math.log, values)) / len(values))


Figures = list[tuple[float, Result]]


@dataclass(frozen=True)
class Goal:
    """What is aimed at.

    Attributes:
        what: the figure.
        bound: its bound on every row.
        figures: finds it on every row.
        limit: the bound is an upper one.
        averaged: the bound is on the geometric mean instead.
    """

    what: str
    bound: float
    figures: Callable[[Runs], Figures]
    limit: bool = False
    averaged: bool = False

    def judge(self, figures: Figures) -> tuple[float, Result, float, bool]:
        """The worst figure and its row, the mean, and whether the goal is met."""
        worst, where = (max if self.limit else min)(figures, key=lambda pair: pair[0])
        average = mean([value for value, _ in figures])
        judged = average if self.averaged else worst
        return worst, where, average, judged <= self.bound if self.limit else judged >= self.bound


def ratio(kind: str, peer: str, rows: int = 0) -> Callable[[Runs], Figures]:
    """Peer over ours on every row of a main table that has at least so many rows."""

    def figures(runs: Runs) -> Figures:
        found = [(r.against(peer), r) for r in runs.of(kind, headline=True)]
        return [(value, r) for value, r in found if value is not None and r.info["rows"] >= rows]

    return figures


def topk(runs: Runs) -> Figures:
    """torch.topk as it is called by default over pmod::select, op against op, of 2880 rows."""
    found = [(r.info["wall_ms"], r) for r in runs.of("select-growth") if r.geometry == "n2880"]
    return [(ms["topk_sorted"] / ms["op"], r) for ms, r in found if r.ratio == 0.5]


def overhead(of_ratio: float, *, net: bool) -> Callable[[Runs], Figures]:
    """CPU time of the glue as a share of the layer's."""
    place = 1 if net else 0
    return lambda runs: [
        (r.layer_shares()[place], r) for r in runs.of("layer") if r.ratio == of_ratio
    ]


GOALS = (
    Goal("forward, eager / ours", 8, ratio(FORWARD, "eager")),
    Goal("forward, best compile / ours", 2, ratio(FORWARD, "compile")),
    Goal("forward, best compile / ours, mean", 2.5, ratio(FORWARD, "compile"), averaged=True),
    Goal("training, best compile / ours", 1.7, ratio(TRAINING, "compile")),
    Goal("forward, official / ours", 15, ratio(FORWARD, "official")),
    Goal("forward, rate / memcpy's, N >= 2000", 0.9, ratio(FORWARD, "memcpy", 2000)),
    Goal("torch.topk / pmod::select, n = 2880", 3, topk),
    Goal("glue / layer, R = 0.5", 0.007, overhead(0.5, net=False), limit=True),
    Goal("glue / layer, R = 0.15", 0.015, overhead(0.15, net=False), limit=True),
    Goal("glue, net / layer, R = 0.5", 0.007, overhead(0.5, net=True), limit=True),
    Goal("glue, net / layer, R = 0.15", 0.015, overhead(0.15, net=True), limit=True),
)
