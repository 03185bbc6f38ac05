"""Counting tokens on the host for a RoutingPlan, and checking counts that the caller gives."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from pmod_ops._checks import fail

if TYPE_CHECKING:
    from pmod_ops.plan import RoutingPlan

PADDING, ROUTABLE, ALWAYS = 0, 1, 2


def is_sequence(pools: object) -> bool:
    """Whether the entry of a sequence holds several counts."""
    return isinstance(pools, Sequence | Tensor) and not (
        isinstance(pools, Tensor) and not pools.ndim
    )


def check_count(op: str, name: str, value: SupportsIndex) -> int:
    """A count as a Python integer."""
    try:
        count = operator.index(value)
    except TypeError:
        message = f"pmod_ops.{op}: {name}: expected an integer >= 0, got {value!r}"
        raise TypeError(message) from None
    if count < 0:
        fail(op, name, "a count >= 0", count)
    return count


def check_ratio(layer: int, ratio: float) -> float:
    """The share of rows that a layer keeps, in [0, 1]."""
    op = "RoutingPlan"
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        fail(op, "ratios", "layer indices >= 0 as keys", layer)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(
            f"pmod_ops.{op}: ratios[{layer}]: expected a number in [0, 1], got {ratio!r}"
        )
    if not (math.isfinite(ratio) and 0 <= ratio <= 1):
        fail(op, f"ratios[{layer}]", "a number in [0, 1]", ratio)
    return float(ratio)


def dense_pools(routable: Tensor, pool_id: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Number the pools that hold a routable row 0..P-1, sequence by sequence, smallest id first."""
    dense = torch.zeros(routable.shape, dtype=torch.int32)
    counts: list[list[int]] = []
    first = 0
    for row, (mask, ids) in enumerate(zip(routable, pool_id, strict=True)):
        _, place, count = torch.unique(ids[mask], return_inverse=True, return_counts=True)
        dense[row, mask] = place.to(torch.int32) + first
        counts.append(count.tolist())
        first += len(counts[-1])
    return dense.reshape(-1), counts


def check_counts(
    op: str, plan: RoutingPlan, routable: list[list[int]], always: Sequence[int]
) -> None:
    """Compare the counts of a plan with its contents; reads them, so it is for the CPU only."""
    bounds = plan.cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != plan.num_rows or sorted(bounds) != bounds:
        fail(op, "cu_seqlens", f"ascending offsets from 0 to {plan.num_rows}", bounds)
    kind = plan.kind
    if kind.numel() and int(kind.max()) > ALWAYS:
        row = int((kind > ALWAYS).nonzero()[0])
        fail(op, f"kind[{row}]", "0, 1 or 2", int(kind[row]))
    first = 0
    for b, pools in enumerate(routable):
        rows = slice(bounds[b], bounds[b + 1])
        found_always = int((kind[rows] == ALWAYS).sum())
        if found_always != always[b]:
            fail(op, f"always_per_sequence[{b}]", f"{found_always} rows of kind 2", always[b])
        mask = kind[rows] == ROUTABLE
        if plan.pool_id is None:
            found = [int(mask.sum())]
        else:
            ids = plan.pool_id[rows][mask] - first
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(pools)):
                fail(
                    op,
                    "pool_id",
                    f"ids {first}..{first + len(pools) - 1} in sequence {b}",
                    "others",
                )
            found = torch.bincount(ids, minlength=len(pools)).tolist()
        if found != pools:
            fail(op, f"routable_per_pool[{b}]", f"{found} rows of kind 1", pools)
        first += len(pools)
