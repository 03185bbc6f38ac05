"""The gradient of logits from those of logits and gates (reference.activate).

A few bytes a row; a softmax gate couples the rows of a sequence, which then is one program's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.gate import SOFTMAX, exp_of_negative, gate_slope
from pmod_ops._triton.plan import Gate, check_bounds, check_kind
from pmod_ops._triton.selection import routable_logits, rows_of_sequence, softmax_parts

LANES = 1024  # rows of a program, or of a sequence at a time
WARPS = 8


@triton.jit(do_not_specialize=["num_rows"])
def logit_gradient_kernel(
    grad_logits_ptr,
    grad_gate_ptr,
    logits_ptr,
    kind_ptr,
    out_ptr,
    num_rows,
    gate_scale,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per LANES rows. Not with a softmax gate, unless there is no gradient of it."""
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    logit, routable = routable_logits(logits_ptr, kind_ptr, at, num_rows, 0.0)
    grad = tl.zeros((LANES,), tl.float32)
    if grad_gate_ptr is not None:
        of_gate = tl.load(grad_gate_ptr + at, mask=routable, other=0.0)
        grad += gate_slope(logit, gate_scale, ACTIVATION) * of_gate
    if grad_logits_ptr is not None:
        grad += tl.load(grad_logits_ptr + at, mask=routable, other=0.0)
    tl.store(out_ptr + at, grad, mask=at < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def softmax_logit_gradient_kernel(
    grad_logits_ptr,
    grad_gate_ptr,
    logits_ptr,
    kind_ptr,
    cu_seqlens_ptr,
    out_ptr,
    num_rows,
    gate_scale,
    LANES: tl.constexpr,
):
    """One program per sequence."""
    first, length = rows_of_sequence(cu_seqlens_ptr, tl.program_id(0), num_rows)
    logits_ptr += first
    kind_ptr += first
    lanes = tl.arange(0, LANES)
    largest, total = softmax_parts(logits_ptr, kind_ptr, length, LANES)
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, length, LANES):
        at = start + lanes
        logit, routable = routable_logits(logits_ptr, kind_ptr, at, length, largest)
        of_gate = tl.load(grad_gate_ptr + first + at, mask=routable, other=0.0)
        weight = tl.div_rn(exp_of_negative(logit - largest), total)
        sums += tl.where(routable, weight * of_gate, 0.0)
    mean = tl.sum(sums, axis=0)
    for start in range(0, length, LANES):
        at = start + lanes
        logit, routable = routable_logits(logits_ptr, kind_ptr, at, length, largest)
        of_gate = tl.load(grad_gate_ptr + first + at, mask=routable, other=0.0)
        weight = tl.div_rn(exp_of_negative(logit - largest), total)
        grad = gate_scale * weight * (of_gate - mean)
        if grad_logits_ptr is not None:
            grad += tl.load(grad_logits_ptr + first + at, mask=routable, other=0.0)
        tl.store(out_ptr + first + at, tl.where(routable, grad, 0.0), mask=at < length)


def logit_gradient(
    op: str,
    grad_logits: Tensor | None,
    grad_gate: Tensor | None,
    logits: Tensor,
    kind: Tensor,
    cu_seqlens: Tensor,
    gate: Gate,
) -> Tensor:
    """D loss / d logit [N], of checked logits."""
    rows = logits.shape[0]
    numbers = {"dtype": torch.float32, "size": rows, "like": logits}
    grad_logits = launch.check_optional_numbers(op, "grad_logits", grad_logits, **numbers)
    grad_gate = launch.check_optional_numbers(op, "grad_gate", grad_gate, **numbers)
    kind = check_kind(op, kind, rows, like=logits)
    bounds = check_bounds(op, cu_seqlens, like=logits)
    sequences = bounds.shape[0] - 1
    out = launch.numbers(logits, rows)
    if gate.activation == SOFTMAX.value and grad_gate is not None:
        if sequences:
            softmax_logit_gradient_kernel[(sequences,)](
                grad_logits,
                grad_gate,
                logits,
                kind,
                bounds,
                out,
                rows,
                gate.scale,
                LANES=LANES,
                **launch.options(WARPS),
            )
    elif rows:
        logit_gradient_kernel[(triton.cdiv(rows, LANES),)](
            grad_logits,
            grad_gate,
            logits,
            kind,
            out,
            rows,
            gate.scale,
            ACTIVATION=gate.activation,
            LANES=LANES,
            **launch.options(WARPS),
        )
    return out
