"""Sizes of every routed layer, known on the host before the first layer runs.

A plan is made once per batch. Everything a layer needs to allocate its outputs is a Python integer
here, so no layer ever waits for the device (p-MoD, arXiv:2412.04449, section 3; the budget is
k = int(float32(n) * float32(ratio)), as in the authors' code).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pmod_ops._checks import check_tensor, fail
from pmod_ops._counts import (
    ALWAYS,
    PADDING,
    ROUTABLE,
    check_count,
    check_counts,
    check_ratio,
    dense_pools,
    is_sequence,
)
from pmod_ops.routing import Layout

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Which rows compete for a place, and how many of them each routed layer keeps.

    Attributes:
        kind: uint8 [N]: 0 padding (never kept, never scaled), 1 routable, 2 always kept.
        cu_seqlens: int32 [B + 1], the first row of each sequence, and N.
        pool_id: int32 [N] or None. The pool in which a routable row competes; None means one pool
            per sequence. Ids are 0..P-1, in sequence order.
        sizes: int32 [layers, P + 2B + 1]: k, cu_kept and the first padded slot of every layer.
        layers: absolute indices of the routed layers, ascending.
        num_pools: P.
        kept: for every routed layer, the number of kept rows of each sequence (host integers).
        num_routable: routable rows of the whole batch; 0 means that every layer is dense.
        max_length: rows of the longest sequence, padding included, or an upper bound.
    """

    kind: Tensor
    cu_seqlens: Tensor
    pool_id: Tensor | None
    sizes: Tensor
    layers: tuple[int, ...]
    num_pools: int
    kept: tuple[tuple[int, ...], ...]
    num_routable: int
    max_length: int

    @classmethod
    def from_mask(
        cls,
        target_mask: Tensor,
        valid_mask: Tensor | None = None,
        ratios: Mapping[int, float] | None = None,
        pool_id: Tensor | None = None,
    ) -> RoutingPlan:
        """Count tokens of a padded batch; the only host synchronisation of a forward pass.

        Args:
            target_mask: bool [B, S], True = routable. Padding is never routable, whatever it says.
            valid_mask: bool or integer [B, S], nonzero = not padding; None = no padding.
            ratios: share of the routable rows kept, in [0, 1], keyed by absolute layer index.
            pool_id: integer [B, S]; routable rows of one sequence with equal ids share one budget.
                Ids need not be dense, and equal ids in two sequences are two pools.

        Raises:
            TypeError: an argument is not a tensor, or of the wrong dtype.
            ValueError: a shape, a device or a ratio is out of range; the message names it.
        """
        op = "RoutingPlan.from_mask"
        check_tensor(op, "target_mask", target_mask, dims=(2,), dtypes=(torch.bool,))
        kind = torch.where(target_mask, ROUTABLE, ALWAYS).to(torch.uint8)
        if valid_mask is not None:
            dtypes = (torch.bool, *INTEGERS)
            check_tensor(
                op,
                "valid_mask",
                valid_mask,
                shape=target_mask.shape,
                dtypes=dtypes,
                like=target_mask,
            )
            kind = kind.masked_fill(valid_mask == 0, PADDING)
        if pool_id is not None:
            shape = target_mask.shape
            check_tensor(op, "pool_id", pool_id, shape=shape, dtypes=INTEGERS, like=target_mask)
        batch, length = target_mask.shape
        host_kind = kind.cpu() if pool_id is None else None
        dense_pool: Tensor | None = None
        if pool_id is None:
            assert host_kind is not None
            routable = [[int(n)] for n in (host_kind == ROUTABLE).sum(1)]
        else:
            both = torch.stack((kind.long(), pool_id.long())).cpu()
            host_kind = both[0]
            dense_pool, routable = dense_pools(host_kind == ROUTABLE, both[1])
        always = (host_kind == ALWAYS).sum(1).tolist()
        cu_seqlens = [length * b for b in range(batch + 1)]
        return cls._build(kind.reshape(-1), cu_seqlens, routable, always, ratios or {}, dense_pool)

    @classmethod
    def from_counts(
        cls,
        kind: Tensor,
        cu_seqlens: Tensor | Sequence[int],
        routable_per_pool: Sequence[int] | Sequence[Sequence[int]],
        always_per_sequence: Sequence[int],
        ratios: Mapping[int, float],
        pool_id: Tensor | None = None,
    ) -> RoutingPlan:
        """Build a plan from counts the caller already has on the host: no synchronisation.

        Args:
            kind: uint8 [N], see the class. Its contents are trusted on a GPU and checked on a CPU.
            cu_seqlens: int32 [B + 1] tensor or a sequence of B + 1 integers, from 0 to N.
            routable_per_pool: B integers, or B sequences of integers when a sequence has several
                pools; pool ids count through them in order.
            always_per_sequence: B integers, rows of kind 2.
            ratios: share of the routable rows kept, in [0, 1], keyed by absolute layer index.
            pool_id: int32 [N], required if a sequence has several pools.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: counts, shapes or ratios do not fit each other; the message names them.
        """
        op = "RoutingPlan.from_counts"
        check_tensor(op, "kind", kind, dims=(1,), dtypes=(torch.uint8,))
        batch = len(always_per_sequence)
        if len(routable_per_pool) != batch:
            fail(
                op,
                "routable_per_pool",
                f"{batch} entries, one per sequence",
                len(routable_per_pool),
            )
        routable = []
        for b, given in enumerate(routable_per_pool):
            pools: Any = given if is_sequence(given) else [given]
            routable.append([check_count(op, f"routable_per_pool[{b}]", n) for n in pools])
        always = [
            check_count(op, f"always_per_sequence[{b}]", n)
            for b, n in enumerate(always_per_sequence)
        ]
        if pool_id is None and any(len(pools) != 1 for pools in routable):
            fail(op, "pool_id", "an int32 tensor, because a sequence has several pools", None)
        if pool_id is not None:
            check_tensor(op, "pool_id", pool_id, shape=kind.shape, dtypes=(torch.int32,), like=kind)
        if isinstance(cu_seqlens, Tensor):
            check_tensor(op, "cu_seqlens", cu_seqlens, shape=(batch + 1,), dtypes=(torch.int32,))
        elif len(cu_seqlens) != batch + 1:
            fail(op, "cu_seqlens", f"{batch + 1} entries", len(cu_seqlens))
        plan = cls._build(kind, cu_seqlens, routable, always, ratios, pool_id)
        if kind.device.type == "cpu":
            check_counts(op, plan, routable, always)
        return plan

    @classmethod
    def _build(
        cls,
        kind: Tensor,
        cu_seqlens: Tensor | Sequence[int],
        routable: list[list[int]],
        always: Sequence[int],
        ratios: Mapping[int, float],
        pool_id: Tensor | None,
    ) -> RoutingPlan:
        if not isinstance(ratios, Mapping):
            got = type(ratios).__name__
            raise TypeError(f"pmod_ops.RoutingPlan: ratios: expected a mapping, got {got}")
        layers = tuple(sorted(ratios))
        counts = torch.tensor([n for pools in routable for n in pools], dtype=torch.float32)
        shares = torch.tensor(
            [check_ratio(layer, ratios[layer]) for layer in layers], dtype=torch.float32
        )
        k = torch.outer(shares, counts).to(torch.int32)  # [layers, P], float32 product, truncated
        sizes, kept = [], []
        for row in k.tolist():
            budgets = iter(row)
            per_sequence = [
                n + sum(next(budgets) for _ in pools)
                for n, pools in zip(always, routable, strict=True)
            ]
            longest = max(per_sequence, default=0)
            cu_kept = [0]
            for n in per_sequence:
                cu_kept.append(cu_kept[-1] + n)
            starts = [(b + 1) * longest - n for b, n in enumerate(per_sequence)]
            sizes.append([*row, *cu_kept, *starts])
            kept.append(tuple(per_sequence))
        width = counts.numel() + 2 * len(always) + 1
        parts = [torch.tensor(sizes, dtype=torch.int32).reshape(len(layers), width)]
        # one upload for everything that was computed here
        if not isinstance(cu_seqlens, Tensor):
            parts.append(torch.tensor(cu_seqlens, dtype=torch.int32))
        if pool_id is not None and pool_id.device != kind.device:
            parts.append(pool_id)
        device_parts = _upload(parts, kind.device)
        return cls(
            kind=kind,
            cu_seqlens=cu_seqlens.to(kind.device)
            if isinstance(cu_seqlens, Tensor)
            else device_parts[1],
            pool_id=device_parts[-1]
            if pool_id is not None and pool_id.device != kind.device
            else pool_id,
            sizes=device_parts[0],
            layers=layers,
            num_pools=counts.numel(),
            kept=tuple(kept),
            num_routable=sum(sum(pools) for pools in routable),
            max_length=_max_length(cu_seqlens, kind.shape[0]),
        )

    @property
    def num_rows(self) -> int:
        """N, padding included."""
        return self.kind.shape[0]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    def parts(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """`k`, `cu_kept` and the padded `slot_start` of `layer`, as views that one op makes."""
        batch = self.num_sequences
        row = self.sizes.select(0, self._position(layer))
        k, cu_kept, padded_start = row.split_with_sizes((self.num_pools, batch + 1, batch))
        return k, cu_kept, padded_start

    def k(self, layer: int) -> Tensor:
        """int32 [P]: routable rows that `layer` keeps in each pool."""
        return self.parts(layer)[0]

    def cu_kept(self, layer: int) -> Tensor:
        """int32 [B + 1]: offsets of the kept rows of each sequence in the packed layout."""
        return self.parts(layer)[1]

    def slot_start(self, layer: int, layout: Layout = "packed") -> Tensor:
        """int32 [B]: the slot of the first kept row of each sequence in `layout`."""
        _, cu_kept, padded_start = self.parts(layer)
        return cu_kept.narrow(0, 0, self.num_sequences) if layout == "packed" else padded_start

    def num_slots(self, layer: int, layout: Layout = "packed") -> int:
        """Slots of `layout`: the kept rows, plus fillers if padded."""
        if layout == "packed":
            return self.total_kept(layer)
        return self.num_sequences * self.max_kept(layer)

    def kept_per_sequence(self, layer: int) -> tuple[int, ...]:
        """Rows that `layer` keeps in each sequence (host integers)."""
        return self.kept[self._position(layer)]

    def total_kept(self, layer: int) -> int:
        """K: rows that `layer` keeps in the whole batch."""
        return sum(self.kept_per_sequence(layer))

    def max_kept(self, layer: int) -> int:
        """Rows that `layer` keeps in the sequence that keeps most; 0 for an empty batch."""
        return max(self.kept_per_sequence(layer), default=0)

    def _position(self, layer: int) -> int:
        if layer not in self.layers:
            fail("RoutingPlan", "layer", f"one of {list(self.layers)}", layer)
        return self.layers.index(layer)


def check_plan(op: str, plan: Any, x: Tensor) -> None:
    """A RoutingPlan of as many rows as `x` has, on its device."""
    if not isinstance(plan, RoutingPlan):
        got = type(plan).__name__
        raise TypeError(f"pmod_ops.{op}: plan: expected a RoutingPlan, got {got}")
    rows = x.numel() // x.shape[-1]
    if plan.num_rows != rows:
        fail(op, "plan", f"one made for the {rows} rows of x", f"{plan.num_rows} rows")
    if plan.kind.device != x.device:
        fail(op, "plan", f"device {x.device} like x", plan.kind.device)


def _max_length(cu_seqlens: Tensor | Sequence[int], num_rows: int) -> int:
    """Rows of the longest sequence; of all, where the offsets are on a GPU and cannot be read."""
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type != "cpu":
            return num_rows
        cu_seqlens = cu_seqlens.tolist()
    return max((end - start for start, end in pairwise(cu_seqlens)), default=0)


def _upload(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    flat = torch.cat([part.reshape(-1) for part in parts])
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _flatten_plan(plan: RoutingPlan) -> tuple[list[Any], Any]:
    return [plan.kind, plan.cu_seqlens, plan.pool_id, plan.sizes], (
        plan.layers,
        plan.num_pools,
        plan.kept,
        plan.num_routable,
        plan.max_length,
    )


def _flatten_plan_with_keys(plan: RoutingPlan) -> tuple[list[Any], Any]:
    leaves, context = _flatten_plan(plan)
    names = ("kind", "cu_seqlens", "pool_id", "sizes")
    keys = [pytree.GetAttrKey(name) for name in names]
    return list(zip(keys, leaves, strict=True)), context


def _unflatten_plan(leaves: Any, context: Any) -> RoutingPlan:
    return RoutingPlan(*leaves, *context)


def _plan_context_from_json(text: str) -> Any:
    layers, num_pools, kept, *counts = json.loads(text)
    return tuple(layers), num_pools, tuple(tuple(row) for row in kept), *counts


pytree.register_pytree_node(
    RoutingPlan,
    _flatten_plan,
    _unflatten_plan,
    serialized_type_name="pmod_ops.RoutingPlan",
    to_dumpable_context=json.dumps,
    from_dumpable_context=_plan_context_from_json,
    flatten_with_keys_fn=_flatten_plan_with_keys,
)
