"""weighted_scatter_add: N + K rows read, N written."""

from __future__ import annotations

import torch
from peers import Timed, candidate, over_dtypes, over_implementations, over_samples, routed

from pmod_ops.testing import Sample


@over_implementations
@over_dtypes
@over_samples
def bench_weighted_scatter_add(timed: Timed, sample: Sample, dtype: torch.dtype, impl: str) -> None:
    case = sample.make(dtype)
    routing = routed(case)
    moved = (case.x, case.x, case.attn_out)
    function = candidate(
        impl, lambda m: m.weighted_scatter_add(case.x, case.attn_out, case.update, routing), moved
    )
    assert timed(function, impl, moved) is not None
