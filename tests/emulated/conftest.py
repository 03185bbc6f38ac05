"""Runs the ops of the package on the emulated CUDA kernels."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pmod_ops
from pmod_ops import _library

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "build" / "emulated" / "tests" / "emulator" / "pmod_emulated.so"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("emulated")


def kernel_ops() -> list[str]:
    """The ops that have kernels."""
    return [op for op in _library._ops if not op.endswith("_info")]


@cache
def load() -> tuple[ModuleType, torch.library.Library]:
    """Define pmod_emulated::X like pmod::X for every op, and load their kernels."""
    path = Path(os.environ.get("PMOD_EMULATED_MODULE", MODULE))
    if not path.is_file():
        pytest.fail(f"{path} is not there; build it: make emulated", pytrace=False)
    library = torch.library.Library("pmod_emulated", "DEF")
    for op in kernel_ops():
        schema = str(getattr(torch.ops.pmod, op).default._schema)
        library.define(schema.removeprefix("pmod::"))
    spec = importlib.util.spec_from_file_location("pmod_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, library


@pytest.fixture(scope="session")
def simt() -> ModuleType:
    """The controls of the emulator."""
    return load()[0]


@pytest.fixture
def emulated(simt: ModuleType, seed: int) -> Iterator[ModuleType]:
    """For the length of a test, CPU tensors are served by the emulated CUDA kernels."""
    simt.set_schedule(seed=seed | 1)
    override = torch.library.Library("pmod", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*other operators may also be overridden")
        for op in kernel_ops():
            kernel = getattr(torch.ops.pmod_emulated, op).default
            override.impl(op, kernel, "CPU", allow_override=True)
    yield simt
    override._destroy()
    assert pmod_ops.backend_info()["devices"]["cpu"].startswith("C++")
