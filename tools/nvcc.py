"""Decides whether the CUDA kernels are built, with which nvcc and for which GPUs.

`PMOD_CUDA` = auto (default: if there is an nvcc), 0 or 1; `PMOD_CUDA_ARCHS` = compute capabilities
without the dot, such as "80;90", instead of all that the kernels are kept ready for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ARCHS = ("80", "90", "100", "120")  # the newest one is also kept as PTX, for GPUs to come
FIRST_WITH_BLACKWELL = (12, 8)
MINIMUM = (12, 0)  # the first that knows C++20
NO_NVCC = (
    "pmod: PMOD_CUDA=1, but there is no nvcc (looked at CUDACXX, CUDA_HOME, /usr/local/cuda, "
    "the nvidia packages of this Python, and PATH). Install the CUDA toolkit, or\n"
    "  pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl "
    "nvidia-cuda-runtime\n"
    "or leave the CUDA kernels out: PMOD_CUDA=0."
)


class Nvcc(NamedTuple):
    """A CUDA compiler and its release, such as (13, 0)."""

    path: Path
    release: tuple[int, int]


def parse_release(text: str) -> tuple[int, int] | None:
    """Returns the release in what `nvcc --version` prints, or None."""
    match = re.search(r"\brelease (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def candidates(environment: Mapping[str, str]) -> Iterable[Path]:
    """Where an nvcc may be, the most explicit place first."""
    if named := environment.get("CUDACXX"):
        yield Path(shutil.which(named) or named)
    if home := environment.get("CUDA_HOME"):
        yield Path(home, "bin", "nvcc")
    yield Path("/usr/local/cuda/bin/nvcc")
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in dict.fromkeys(folders):
        yield from sorted(Path(folder or ".", "nvidia").glob("cu*/bin/nvcc"), reverse=True)
    if found := shutil.which("nvcc", path=environment.get("PATH")):
        yield Path(found)


def find(environment: Mapping[str, str]) -> Nvcc | None:
    """Returns the first nvcc that runs and is new enough, or None."""
    for path in candidates(environment):
        if not os.access(path, os.X_OK):
            continue
        ran = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        release = parse_release(ran.stdout)
        if release is not None and release >= MINIMUM:
            return Nvcc(path, release)
    return None


def archs(environment: Mapping[str, str], release: tuple[int, int]) -> tuple[str, ...]:
    """The compute capabilities to compile for.

    Raises:
        RuntimeError: if PMOD_CUDA_ARCHS is not a list of numbers.
    """
    asked = environment.get("PMOD_CUDA_ARCHS", "")
    if not asked:
        return ARCHS if release >= FIRST_WITH_BLACKWELL else ARCHS[:2]
    chosen = tuple(re.split(r"[;,\s]+", asked.strip()))
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in chosen):
        raise RuntimeError(
            "pmod: PMOD_CUDA_ARCHS: expected compute capabilities without the dot, separated by "
            f"semicolons, such as '80;90', got {asked!r}"
        )
    return chosen


def cmake_options(environment: Mapping[str, str]) -> list[str]:
    """What CMake is told of CUDA; nothing but its absence if the kernels are not built.

    Raises:
        RuntimeError: if the settings are wrong, or ask for a compiler that is not there.
    """
    wanted = environment.get("PMOD_CUDA", "auto") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise RuntimeError(f"pmod: PMOD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    nvcc = None if wanted == "0" else find(environment)
    if nvcc is None:
        if wanted == "1":
            raise RuntimeError(NO_NVCC)
        return ["-U", "CMAKE_CUDA_COMPILER", "-DPMOD_CUDA=OFF"]
    chosen = archs(environment, nvcc.release)
    real = [f"{arch}-real" for arch in chosen[:-1]] + [chosen[-1]]
    return [
        "-DPMOD_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc.path}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(real)}",
        f"-DPMOD_CUDA_ARCHS={' '.join(chosen)}",
    ]
