"""Options and the fixture of the benchmarks, and what their stored results leave out."""

from __future__ import annotations

import os
from typing import Any

import pytest
from cells import Cell
from machine import facts, last_level_cache
from pytest_benchmark.fixture import BenchmarkFixture
from timing import Contest, Measure, run, significant

STATS = ("min", "max", "mean", "stddev", "median", "iqr", "outliers", "ops", "rounds", "iterations")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pmod benchmarks")
    group.addoption(
        "--budget",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="time for the rounds of a cell of the main tables; others take a share of it",
    )
    group.addoption(
        "--subset",
        action="store_true",
        help="only the forward glue in bfloat16 at D = 4096 and B = 1",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--subset"):
        return
    chosen, left = [], []
    for item in items:
        cell: Any = getattr(item, "callspec", None) and item.callspec.params.get("cell")  # pyright: ignore[reportAttributeAccessIssue]
        wanted = cell and cell.kind == "glue-forward" and cell.headline and cell.batch == 1
        (chosen if wanted else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = chosen


def pytest_report_header() -> str:
    known = ", ".join(f"{name} {value}" for name, value in facts().items())
    cache = f"last-level cache {last_level_cache() >> 20} MiB"
    return f"machine: {known}, {cache}, load {os.getloadavg()[0]:.2f}"


@pytest.fixture
def measure(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Measure:
    """Times a contest within a share of the budget."""
    budget: Any = request.config.getoption("--budget")

    def timed(cell: Cell, contest: Contest, share: float) -> None:
        run(benchmark, cell, contest, share * budget)

    return timed


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave nothing to compare: any difference, a clock rate even, would be a warning, so an error.

    What counts about the machine is in every result.
    """
    machine_info.clear()


def pytest_benchmark_compare_machine_info(
    config: pytest.Config, compared_benchmark: dict[str, Any]
) -> None:
    """Say what was different when the results to compare with were made."""
    theirs = compared_benchmark["benchmarks"][0]["extra_info"]
    for name, value in facts().items():
        if theirs.get(name) != value:
            print(f"comparing with results of another {name}: {theirs.get(name)}; here {value}")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keep what a comparison and the report need: the results are committed."""
    for result in output_json["benchmarks"]:
        stats = {name: result["stats"][name] for name in STATS}
        result["stats"] = {
            name: significant(value, 5) if isinstance(value, float) else value
            for name, value in stats.items()
        }
        result["params"] = None
        del result["options"]


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """A line per cell: our time, and how much longer each peer took."""
    session = getattr(config, "_benchmarksession", None)
    for result in session.benchmarks if session else []:
        info = result.extra_info
        if "wall_ratio" in info:
            ratios = "  ".join(f"{name} {value:g}x" for name, value in info["wall_ratio"].items())
            terminalreporter.write_line(f"{result.name}: {info['wall_ms']['ours']:g} ms  {ratios}")
