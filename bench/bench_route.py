"""route: V routable rows read."""

from __future__ import annotations

import torch
from peers import Timed, candidate, over_dtypes, over_implementations, over_samples

from pmod_ops.plan import ROUTABLE
from pmod_ops.testing import LAYER, Sample


@over_implementations
@over_dtypes
@over_samples
def bench_route(timed: Timed, sample: Sample, dtype: torch.dtype, impl: str) -> None:
    case = sample.make(dtype)
    moved = (case.x[case.plan.kind == ROUTABLE],)
    function = candidate(
        impl,
        lambda m: m.route(case.x, case.router_weight, case.router_bias, case.plan, LAYER),
        moved,
    )
    assert timed(function, impl, moved) is not None
