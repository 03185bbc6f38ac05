"""What a figure depends on: the GPU, its clocks and limits, the driver, torch and the kernels."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import pmod_ops

ROOT = Path(__file__).resolve().parents[2]
QUERY = (
    *("name", "driver_version", "pstate", "temperature.gpu", "utilization.gpu"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "clocks.applications.graphics"),
    *("power.draw", "power.limit", "power.max_limit", "persistence_mode", "compute_mode"),
    *("ecc.mode.current", "mig.mode.current", "clocks_throttle_reasons.active"),
)


def collect() -> dict[str, Any]:
    """All facts; what a machine does not tell is null."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "device": properties() if cuda else None,
        "devices": torch.cuda.device_count() if cuda else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "backend": pmod_ops.backend_info(),
        "peers": peers(),
        "nvidia_smi": nvidia_smi(),
    }


def properties() -> dict[str, Any]:
    """Of the device that the run uses."""
    found = torch.cuda.get_device_properties(0)
    return {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "multiprocessors": found.multi_processor_count,
        "memory_mb": found.total_memory >> 20,
        "l2_mb": found.L2_cache_size / 2**20,
    }


def peers() -> dict[str, str | None]:
    """Versions of the packages that are timed beside this one."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in ("triton", "xformers", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def nvidia_smi() -> dict[str, str] | None:
    """Clocks, limits and load of the first GPU, and who else computes on it."""
    answer = ask(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0")
    if answer is None:
        return None
    found = dict(zip(QUERY, (part.strip() for part in answer.split(",")), strict=False))
    others = ask("--query-compute-apps=pid,used_memory", "--format=csv,noheader", "--id=0")
    found["other processes"] = str(len((others or "").split("\n")) if others else 0)
    return found


def ask(*arguments: str) -> str | None:
    """What nvidia-smi prints, or None."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def sources() -> dict[str, Any] | None:
    """The commit that is checked out, and whether files were changed since."""
    try:
        commit, changed = (
            subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changed)}
