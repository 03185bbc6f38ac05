"""The implementations a benchmark compares, and the copy of the same bytes that bounds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pmod_ops
from pmod_ops import Routing, reference
from pmod_ops.testing import BENCHMARKS, LAYER, Case

EPS = 1e-5
Timed = Callable[..., Any]
IMPLEMENTATIONS = {"pmod": pmod_ops, "eager": reference}
DTYPES = (torch.bfloat16, torch.float32)

over_samples = pytest.mark.parametrize("sample", BENCHMARKS, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_implementations = pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "copy"])


def routed(case: Case) -> Routing:
    """The routing of a case, made outside the timed part."""
    return pmod_ops.route(case.x, case.router_weight, case.router_bias, case.plan, LAYER)


def candidate(
    impl: str, function: Callable[[Any], Any], moved: tuple[Tensor, ...]
) -> Callable[[], Any]:
    """The timed call: `function` of the implementation, or a copy of half the bytes it moves.

    A copy reads and writes, so copying half of the bytes moves as many as the op must.
    """
    if impl == "copy":
        rows = torch.cat([t.reshape(-1) for t in moved])
        half = rows[: rows.numel() // 2]
        return half.clone
    module = IMPLEMENTATIONS[impl]
    return lambda: function(module)
