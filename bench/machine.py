"""The facts of the machine and of the process that a figure depends on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import pmod_ops

RETAINED = {"MALLOC_MMAP_THRESHOLD_": 1 << 32, "MALLOC_TRIM_THRESHOLD_": 1 << 34}


def last_level_cache() -> int:
    """Bytes of the last-level cache that this core shares; 32 MiB where the system does not say.

    sysconf would give the sum of all clusters of an AMD socket.
    """
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes]
    return max(found, default=32 << 20)


def cpu() -> str:
    """The model name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def isa() -> str:
    """The instruction set that the kernels use here, or those the build has."""
    build: Any = pmod_ops.backend_info()["build"]
    known = build.get("isa", "unknown")
    active = build.get("active_isa") or (known.get("active") if isinstance(known, dict) else None)
    if active:
        return str(active)
    return known if isinstance(known, str) else "+".join(map(str, known))


def allocator() -> str:
    """Whether glibc keeps freed memory (as `make bench` asks it to) or returns it."""
    kept = all(int(os.environ.get(name, 0)) >= least for name, least in RETAINED.items())
    return "retained" if kept else "default"


def facts() -> dict[str, Any]:
    """What stays the same for a whole run."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "isa": isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "allocator": allocator(),
        "bound": os.environ.get("OMP_PROC_BIND", "no"),
    }
