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
# what was timed apart from the rest
PARTS = {"Whole models": "_models-baseline.json", "Training steps": "_training-baseline.json"}
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
    facts = results[0].info
    about = (
        f"{facts['cpu']}, {facts['cores']} cores, instruction set {facts['isa']}, torch"
        f" {facts['torch']}, Python {facts['python']}; {occasion(document)}."
    )
    for title, ending in PARTS.items():
        path = newest(folder, ending)
        if path is not None:
            part = json.loads(path.read_text())
            known = {result.kind for result in results}
            found = [parse(entry) for entry in part["benchmarks"]]
            results += [result for result in found if result.kind not in known]
            about += f" {title}: {occasion(part)}."
    return Runs(results, [parse(entry) for entry in others], about)


def occasion(document: dict[str, Any]) -> str:
    """When and of which commit results are, and how busy the machine was."""
    commit = document["commit_info"]
    changed = " with changes" if commit.get("dirty") else ""
    loads = [entry["extra_info"]["load"] for entry in document["benchmarks"]]
    return (
        f"{document['datetime'][:10]}, commit {str(commit['id'])[:10]}{changed}; load average"
        f" before a cell {min(loads):.1f} to {max(loads):.1f}"
    )


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


def reached(kind: str, geometry: str) -> Callable[[Runs], Figures]:
    """The share of the ratio of operations that the wall clock shows, for models of a kind."""
    return lambda runs: [
        (r.info["reached"], r)
        for r in runs.main
        if r.kind.startswith(kind) and r.geometry == geometry and "reached" in r.info
    ]


def dense_over_ours(kind: str) -> Callable[[Runs], Figures]:
    """Time of the dense model over ours."""
    found = dense_times(kind)
    return lambda runs: [(1 / share, r) for share, r in found(runs)]


def dense_times(kind: str, geometry: str = "") -> Callable[[Runs], Figures]:
    """Our time over that of the dense model."""

    def figures(runs: Runs) -> Figures:
        models = [r for r in runs.main if r.kind.startswith(kind) and "weights" in r.info]
        found = [(r.against("dense"), r) for r in models if geometry in ("", r.geometry)]
        return [(1 / value, r) for value, r in found if value]

    return figures


def peaks(kind: str, key: str = "peak_bytes") -> Callable[[Runs], Figures]:
    """Our peak memory over that of the dense model."""
    return lambda runs: [
        (r.info[key]["ours"] / r.info[key]["dense"], r)
        for r in runs.main
        if r.kind.startswith(kind) and r.info.get(key)
    ]


def cache_shares(runs: Runs) -> Figures:
    """How far the share of cached vision tokens is from that of the schedule, 53.75 %."""
    shares = [(r.info.get("vision_share"), r) for r in runs.main]
    return [(abs(share - 0.5375), r) for share, r in shares if share is not None]


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
    Goal("prefill, 2880, 1b: share of the FLOP ratio", 0.95, reached("prefill-1b", "llava_next")),
    Goal("prefill, 2880, smol: the same", 0.9, reached("prefill-smol", "llava_next")),
    Goal("prefill, 576: the same", 0.9, reached("prefill", "llava15")),
    Goal("decoding step, dense / p-MoD", 1, dense_over_ours("decode")),
    Goal("peak memory of a prefill, p-MoD / dense", 1, peaks("prefill"), limit=True),
    Goal("cached vision tokens: share less 53.75 %", 0.002, cache_shares, limit=True),
    Goal("training step, 2880, p-MoD / dense", 0.62, dense_times("training", "llava_next"), True),
    Goal("training step, 576, p-MoD / dense", 0.66, dense_times("training", "llava15"), True),
    Goal("peak memory of a step, p-MoD / dense", 1, peaks("training"), limit=True),
    Goal(
        "the same, logits of all tokens", 1, peaks("training", "peak_bytes_all_logits"), limit=True
    ),
)
