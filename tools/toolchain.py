"""Checks that the machine can compile, with errors that say what to install."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")  # the order in which CMake looks for them
NO_COMPILER = (
    "pmod: no C++ compiler found ({looked}). Installing pmod compiles its extension; "
    "install a compiler first:\n"
    "  Debian, Ubuntu: apt install g++\n"
    "  Fedora, RHEL:   dnf install gcc-c++\n"
    "or set CXX to the path of one."
)
NO_HEADERS = (
    "pmod: Python.h is not in {folder}. Install the headers of this Python:\n"
    "  Debian, Ubuntu: apt install python3-dev\n"
    "  Fedora, RHEL:   dnf install python3-devel"
)


def compiler() -> str:
    """Returns the path of the C++ compiler that CMake will use: `CXX`, else the first on PATH.

    Raises:
        RuntimeError: if there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = chosen[:1] or COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    looked = f"CXX={chosen[0]}" if chosen else f"looked for {', '.join(COMPILERS)} on PATH"
    raise RuntimeError(NO_COMPILER.format(looked=looked))


def program(name: str) -> str:
    """Returns the path of a build tool: what pip installed beside this Python, else on PATH.

    A virtual environment need not be activated, and PATH often has an older CMake than PyPI.

    Raises:
        RuntimeError: if there is none.
    """
    for folders in (sysconfig.get_path("scripts"), None):
        if path := shutil.which(name, path=folders):
            return path
    raise RuntimeError(f"pmod: {name} not found; install it: pip install {name}")


def python_include() -> Path:
    """Returns the folder of Python.h.

    Raises:
        RuntimeError: if Python's headers are not installed.
    """
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        raise RuntimeError(NO_HEADERS.format(folder=folder))
    return folder
