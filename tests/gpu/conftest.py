"""What the tests of the CUDA kernels need of their process.

`PMOD_TEST_DEVICE=cpu` runs the tests of `test_ops.py` on the CPU ops, to try the tests themselves.
`PMOD_TEST_SANITIZER` names the tool of compute-sanitizer that is watching.
"""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the references use deterministic sums


@pytest.fixture(autouse=True)
def _memory_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initcheck looks for memory that nobody wrote, and elsewhere torch writes NaN to it."""
    if os.environ.get("PMOD_TEST_SANITIZER") == "initcheck":
        leave_memory(monkeypatch)


@pytest.fixture
def unfilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the launches that fill new memory."""
    leave_memory(monkeypatch)


def leave_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
