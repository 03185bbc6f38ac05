"""PEP 517 build backend: setuptools, building against the torch that is already installed.

A plain `requires = ["torch"]` would make pip put the newest torch into the build environment,
whichever one is installed. So torch is asked for only when the target environment has none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import toolchain
import torchfind
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = Mapping[str, Any] | None


def _requirements(hook: Callable[..., list[str]], settings: Settings) -> list[str]:
    try:
        # Checked here as well as in setup.py: before pip downloads a torch for nothing.
        toolchain.compiler()
        toolchain.python_include()
        torch = torchfind.find()
    except RuntimeError as error:
        sys.exit(str(error))
    return hook(settings) + ([] if torch else [torchfind.FALLBACK])


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Returns what pip must add to the build environment of a wheel."""
    return _requirements(build_meta.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Returns what pip must add to the build environment of an editable install."""
    return _requirements(build_meta.get_requires_for_build_editable, config_settings)
