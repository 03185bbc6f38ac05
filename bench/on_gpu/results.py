"""The results file of `make gpu`, and what it is called.

build/gpu/results-<gpu>-<date>.json, one JSON object, version 1 of the schema:

schema      1
measured    bool: false for a dry run, whose figures mean nothing
label       "measured" or "dry run, not measured"; every cell repeats it
started     "2026-01-31T12:00:00+00:00"
minutes     the time that the run was given
sources     {"commit", "changed": bool}, null where there is no git
facts       see `facts.py`; {} if that step failed
steps       in order, each {"name", "status", "summary", "seconds", "budget_s"}; the status is
            "passed", "failed", "skipped" or "out of time"
tests       {"tests", "failures", "errors", "skipped", "failed": [names]} of tests/gpu
triton_tests  the same of those that also ran on the Triton kernels; {} if none did
sanitizer   by tool: {"status", "errors", "ours", "tail"}: all errors reported, those that name a
            kernel of this package, and the last lines of the output
cells       one object per cell of the benchmark matrix:
    label, kind, geometry, batch, ratio, hidden, dtype, rows, kept
    bytes       the least that the job must read and write
    error       null, or why there are no figures
    candidates  by name ("ours", "eager", "memcpy", ...), each:
        error        null, or why it was not timed
        graph_error  null, or why it was not captured as a CUDA graph
        launches     kernels, memory copies and fills of one call; null where unknown
        waits        times that one call waited for the device; null where unknown
        peak_mb      device memory that one call needs beside its inputs; null where unknown
        figures      of one call by mode, each {"median_us", "p10_us", "p90_us", "rounds"}:
            cold         called as usual, after the L2 cache was overwritten
            warm         called as usual, several times in a row
            cold_graph, warm_graph  the same, replayed as a CUDA graph
left_out    cells that there was no time for, as strings

A candidate "triton" was timed in a process of its own; compare it through that process's "memcpy",
which is stored as "triton_memcpy".
"""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
MEASURED, DRY = "measured", "dry run, not measured"
MODES = ("cold", "cold_graph", "warm", "warm_graph")

Results = dict[str, Any]


def new(*, dry: bool, started: datetime, minutes: float) -> Results:
    """The results before the first step."""
    return {
        "schema": SCHEMA,
        "measured": not dry,
        "label": DRY if dry else MEASURED,
        "started": started.isoformat(timespec="seconds"),
        "minutes": minutes,
        "sources": None,
        "facts": {},
        "steps": [],
        "tests": {},
        "triton_tests": {},
        "sanitizer": {},
        "cells": [],
        "left_out": [],
    }


def file_name(results: Results) -> str:
    """results-<gpu>-<date>.json, in characters that any shell leaves alone."""
    gpu = results["facts"].get("gpu") or "unknown"
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if results["measured"] else "dry-run"
    date = re.sub(r"[^0-9T]", "", results["started"][:19])
    return f"results-{name}-{date}.json"


def save(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader never sees a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def dump(results: Results) -> str:
    """JSON, a cell a line."""
    head = {name: value for name, value in results.items() if name != "cells"}
    cells = ",\n".join(json.dumps(cell) for cell in results["cells"])
    return json.dumps(head, indent=1)[:-2] + f',\n "cells": [\n{cells}\n]\n}}\n'
