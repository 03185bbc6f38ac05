"""What holds for every test: its seed, determinism, and what the markers mean."""

from __future__ import annotations

import importlib.util
import os
import random
import zlib

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    # Triton decides when it is imported, by whatever test comes first, whether it compiles kernels
    # for a GPU or interprets them. It says nothing to what torch.compile makes for the CPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Also poisons torch.empty with NaN, so that an output that an op forgot to write is seen.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if item.get_closest_marker("interpret") and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every generator from the test's name: the same in any order and on any worker."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
