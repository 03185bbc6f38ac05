"""route_gather: V + K rows read, K written."""

from __future__ import annotations

import torch
from peers import EPS, Timed, candidate, over_dtypes, over_implementations, over_samples

from pmod_ops.plan import ROUTABLE
from pmod_ops.testing import LAYER, Sample


@over_implementations
@over_dtypes
@over_samples
def bench_route_gather(timed: Timed, sample: Sample, dtype: torch.dtype, impl: str) -> None:
    case = sample.make(dtype)
    moved = (case.x[case.plan.kind == ROUTABLE], case.attn_out, case.attn_out)
    function = candidate(
        impl,
        lambda m: m.route_gather(
            case.x, case.router_weight, case.router_bias, case.plan, LAYER, case.norm_weight, EPS
        ),
        moved,
    )
    assert timed(function, impl, moved) is not None
