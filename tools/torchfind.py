"""Finds the torch that the extension must be built against, without importing it.

A build in isolation does not see the target environment on `sys.path`, but `sysconfig` still names
its folders.
"""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MINIMUM = (2, 13)
FALLBACK = "torch==2.13.0"  # asked for when no torch is installed


class Torch(NamedTuple):
    """An installed torch: its package folder and its version text."""

    folder: Path
    version: str


def parse_version(text: str) -> str | None:
    """Returns `__version__` as written in the text of a `torch/version.py`, or None."""
    match = re.search(r"""^__version__\s*(?::[^=]*)?=\s*["']([^"']+)["']""", text, re.MULTILINE)
    return match[1] if match else None


def release(version: str) -> tuple[int, int]:
    """Returns (major, minor) of a version such as `2.13.0+cpu` or `2.14.0a0+git123`.

    Raises:
        RuntimeError: if the text does not start with two numbers.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise RuntimeError(f"pmod: cannot read the torch version {version!r}")
    return int(match[1]), int(match[2])


def folders() -> list[Path]:
    """Lists the folders in which torch may be installed, in Python's own order of search."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        paths.append(site.getusersitepackages())
    elif sees_system_packages(Path(sys.prefix)):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        paths += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
    return [Path(path) for path in dict.fromkeys(paths) if path]


def sees_system_packages(prefix: Path) -> bool:
    """Whether the virtual environment at `prefix` was made with `--system-site-packages`."""
    config = prefix / "pyvenv.cfg"
    text = config.read_text() if config.is_file() else ""
    return bool(
        re.search(
            r"^include-system-site-packages\s*=\s*true\s*$", text, re.MULTILINE | re.IGNORECASE
        )
    )


def find(candidates: Iterable[Path] | None = None) -> Torch | None:
    """Returns the first torch found in `candidates` (default: `folders()`), or None.

    Raises:
        RuntimeError: if that torch is older than `MINIMUM` or its version cannot be read.
    """
    for candidate in folders() if candidates is None else candidates:
        version_file = candidate / "torch" / "version.py"
        if not version_file.is_file():
            continue
        version = parse_version(version_file.read_text())
        if version is None:
            raise RuntimeError(f"pmod: {version_file} does not say which torch it is")
        if release(version) < MINIMUM:
            wanted = ".".join(map(str, MINIMUM))
            raise RuntimeError(
                f"pmod needs torch {wanted} or newer, but torch {version} is installed in "
                f"{candidate}. Upgrade it first: pip install 'torch>={wanted}'"
            )
        return Torch(version_file.parent.resolve(), version)
    return None
