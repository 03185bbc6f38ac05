"""What every benchmark records: bytes moved, rate, implementation, machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import Timed
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pmod_ops.testing import nbytes


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Timed:
    """Time a function; `moved` are the tensors whose rows it reads or writes at least once."""

    def run(function: Callable[[], Any], impl: str, moved: tuple[Tensor, ...]) -> Any:
        with torch.inference_mode():
            out = benchmark(function)
        moved_bytes = nbytes(*moved)
        benchmark.extra_info.update(
            impl=impl,
            bytes=moved_bytes,
            device=platform.processor() or platform.machine(),
            threads=torch.get_num_threads(),
            load=os.getloadavg()[0],
            torch=torch.__version__,
        )
        measured: Any = benchmark.stats  # None when benchmarks are disabled
        if measured is not None:
            benchmark.extra_info["GB/s"] = round(moved_bytes / measured.stats.median / 1e9, 2)
        return out

    return run
