"""gather_rmsnorm: K rows read, K written."""

from __future__ import annotations

import torch
from peers import EPS, Timed, candidate, over_dtypes, over_implementations, over_samples, routed

from pmod_ops.testing import Sample


@over_implementations
@over_dtypes
@over_samples
def bench_gather_rmsnorm(timed: Timed, sample: Sample, dtype: torch.dtype, impl: str) -> None:
    case = sample.make(dtype)
    routing = routed(case)
    moved = (case.attn_out, case.attn_out)
    function = candidate(
        impl, lambda m: m.gather_rmsnorm(case.x, routing, case.norm_weight, EPS), moved
    )
    assert timed(function, impl, moved) is not None
