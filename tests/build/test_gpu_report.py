"""The report of `make gpu`. All figures in this file are made up."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from on_gpu import report, results

STARTED = datetime.datetime(2026, 1, 31, 12, 30, tzinfo=datetime.timezone.utc)


def candidate(cold: float, graph: float | None = None, **found: Any) -> dict[str, Any]:
    """Made-up figures of one candidate."""
    medians = {"cold": cold, "cold_graph": graph, "warm": cold / 2}
    return {
        "error": None,
        "graph_error": None if graph else "made up: it waits",
        "launches": 4,
        "waits": 0,
        "peak_mb": 1.5,
        "figures": {
            mode: {"median_us": t, "p10_us": t - 1, "p90_us": t + 1, "rounds": 5}
            for mode, t in medians.items()
            if t is not None
        },
        **found,
    }


@pytest.fixture
def made_up() -> dict[str, Any]:
    """The results of a run that never was."""
    found = results.new(dry=False, started=STARTED, minutes=10)
    found["facts"] = {"gpu": "Made-Up GPU 9000", "torch": "0.0", "device": {"l2_mb": 1.0}}
    found["sources"] = {"commit": "0123456789abcdef", "changed": True}
    found["steps"] = [
        {"name": "tests", "status": "failed", "summary": "a | b", "seconds": 3.0, "budget_s": 4.0}
    ]
    found["tests"] = {"failed": ["tests.gpu.test_ops::test_made_up"]}
    found["sanitizer"] = {
        "memcheck": {"status": "passed", "errors": 0, "ours": 0, "tail": ""},
    }
    found["cells"] = [
        {
            "label": "measured",
            "kind": "glue-forward",
            "geometry": "llava_next",
            "batch": 8,
            "ratio": 0.5,
            "hidden": 4096,
            "dtype": "bfloat16",
            "rows": 23520,
            "kept": 12000,
            "bytes": 5_000_000,
            "error": None,
            "candidates": {
                "ours": candidate(20.0, 10.0),
                "official": candidate(400.0, launches=77),
                "compile_copy": candidate(60.0, 25.0),
                "compile_where": candidate(50.0, 30.0),
                "eager": candidate(100.0, 80.0, launches=31),
                "liger": candidate(1.0, figures={}, error="ImportError: made up"),
                "memcpy": candidate(9.0, 8.0),
            },
        },
        {
            **dict.fromkeys(("label", "kind", "geometry", "dtype"), "made up"),
            **dict.fromkeys(("batch", "ratio", "hidden", "rows", "kept"), 1),
            "bytes": None,
            "error": "RuntimeError: made up",
            "candidates": {},
        },
    ]
    found["left_out"] = ["select-made-up"]
    return found


def rows_of(text: str, title: str) -> list[dict[str, str]]:
    """The table below a title."""
    section = text.split(f"{title}\n\n")[1].split("\n\n")[0].splitlines()
    header, _, *lines = [[cell.strip() for cell in line.split(" | ")] for line in section]
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_figures_and_ratios(made_up: dict[str, Any]) -> None:
    (row,) = rows_of(report.markdown(made_up), "### Glue, forward")
    assert row["cold"] == "20 (19-21)"
    assert row["cold, graph"] == "10 (9-11)"
    assert row["warm, graph"] == "-"
    assert row["eager"] == "5 / 8"
    assert row["compile"] == "2.5 / 2.5"  # 50 / 20, and 25 / 10: the faster form of each mode
    assert row["official"] == "20 / -"
    assert row["liger"] == "- / -"
    assert row["GB/s"] == "500"  # 5 MB in 10 us
    assert row["of copy"] == "80.0%"
    assert row["launches"] == "ours 4, eager 31, official 77"


def test_everything_that_went_wrong_is_told(made_up: dict[str, Any]) -> None:
    text = report.markdown(made_up)
    assert text.startswith(
        "# GPU run\n\nMade-Up GPU 9000, torch 0.0, commit 0123456789 with changes"
    )
    assert "| tests | failed | a \\| b | 3 | 4 |" in text
    assert "* `tests.gpu.test_ops::test_made_up`" in text
    assert "| memcheck | passed | 0 | 0 |" in text
    assert "* glue-forward llava_next B=8 R=0.5, liger: ImportError: made up" in text
    assert "* made up made up B=1 R=1: RuntimeError: made up" in text
    assert "* select-made-up" in text
    assert "| device: l2_mb | 1.0 |" in text
    assert results.DRY not in text


def test_a_report_of_nothing(made_up: dict[str, Any]) -> None:
    empty = results.new(dry=True, started=STARTED, minutes=1)
    text = report.markdown(empty)
    assert "No GPU" in text
    assert results.DRY in text


def test_the_file_is_named_after_gpu_and_date(made_up: dict[str, Any]) -> None:
    assert results.file_name(made_up) == "results-made-up-gpu-9000-20260131T123000.json"
    made_up["measured"] = False
    assert results.file_name(made_up) == "results-dry-run-20260131T123000.json"


def test_the_file_can_be_read_again(made_up: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    results.save(path, results.dump(made_up))
    assert json.loads(path.read_text()) == made_up
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert json.loads(results.dump({**made_up, "cells": []}))["cells"] == []
