"""The arguments of pmod::select and of the ops that contain it: types and shapes, not contents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmod_ops._checks import fail
from pmod_ops._triton.launch import check_numbers, check_optional_numbers, empty, numbers
from pmod_ops.route import scratch_bytes


class Plan(NamedTuple):
    """What comes from a routing plan, in the order of the schema."""

    kind: Tensor
    cu_seqlens: Tensor
    pool_id: Tensor | None
    k: Tensor
    slot_start: Tensor
    num_slots: int
    max_length: int


class Gate(NamedTuple):
    """Of routable rows: scale * act(logit) + bias."""

    scale: float
    bias: float
    activation: int


class Selected(NamedTuple):
    """Outputs of pmod::select."""

    gate: Tensor
    index: Tensor
    inverse: Tensor
    scratch: Tensor


def check_logits(
    op: str, logits: Tensor, rows: int | None = None, *, like: Tensor | None = None
) -> Tensor:
    """Scores of `rows` rows (None: any), on the device of `like`, if there is one."""
    like = logits if like is None else like
    return check_numbers(op, "logits", logits, torch.float32, rows, like=like)


def check_kind(op: str, kind: Tensor, rows: int, *, like: Tensor) -> Tensor:
    """The kind of every row."""
    return check_numbers(op, "kind", kind, torch.uint8, rows, like=like)


def check_bounds(op: str, cu_seqlens: Tensor, *, like: Tensor) -> Tensor:
    """Offsets of sequences, B + 1 of them."""
    bounds = check_numbers(op, "cu_seqlens", cu_seqlens, torch.int32, None, like=like)
    if bounds.shape[0] < 1:
        fail(op, "cu_seqlens", "B + 1 entries", "none")
    return bounds


def check_plan(op: str, plan: Plan, rows: int, *, like: Tensor) -> Plan:
    """A plan of `rows` rows, on the device of `like`."""
    bounds = check_bounds(op, plan.cu_seqlens, like=like)
    sequences = bounds.shape[0] - 1
    for argument, size in (("num_slots", plan.num_slots), ("max_length", plan.max_length)):
        if size < 0:
            fail(op, argument, ">= 0", size)
    pools = sequences if plan.pool_id is None else None
    return Plan(
        check_kind(op, plan.kind, rows, like=like),
        bounds,
        check_optional_numbers(op, "pool_id", plan.pool_id, torch.int32, rows, like=like),
        check_numbers(op, "k", plan.k, torch.int32, pools, like=like),
        check_numbers(op, "slot_start", plan.slot_start, torch.int32, sequences, like=like),
        plan.num_slots,
        plan.max_length,
    )


def check_gate(op: str, scale: float, bias: float, activation: int) -> Gate:
    """A gate of a known activation."""
    if not 0 <= activation <= 3:
        fail(op, "activation", "0..3", activation)
    return Gate(scale, bias, activation)


def empty_selection(logits: Tensor, plan: Plan) -> Selected:
    """Outputs, not yet written."""
    rows, sequences, pools = logits.shape[0], plan.slot_start.shape[0], plan.k.shape[0]
    scratch = scratch_bytes(rows, sequences, pools, plan.max_length)
    return Selected(
        gate=numbers(logits, rows),
        index=empty(logits, plan.num_slots, dtype=torch.int32),
        inverse=empty(logits, rows, dtype=torch.int32),
        scratch=empty(logits, scratch, dtype=torch.uint8),
    )
