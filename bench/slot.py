"""Keeps what was built for a shape while its cells run, one shape at a time."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path

import torch
from cells import Cell
from timing import Contest

_built: dict[object, Contest] = {}


def once_per_shape(build: Callable[[Cell], Contest]) -> Callable[[Cell], Contest]:
    """Let cells that differ in the number of threads share tensors and compiled code.

    There is a single slot: gigabytes of the shape before are gone before the next is built.
    """

    @wraps(build)
    def shared(cell: Cell) -> Contest:
        key = build, replace(cell, threads=0)
        if key not in _built:
            _built.clear()
            torch.compiler.reset()
            gc.collect()
            give_back()
            _built[key] = build(cell)
        return _built[key]

    return shared


def give_back() -> None:
    """Return freed memory to the system if it is a third of all there is.

    It stays with the process otherwise, and in pieces that suit no other shape it would pile up.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    if resident > os.sysconf("SC_PHYS_PAGES") * page / 3:
        ctypes.CDLL(None).malloc_trim(0)
