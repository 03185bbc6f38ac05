"""The gradient of a parameter from its partial sums, and of a bias: in a fixed order, in double.

A program has some columns and adds up their partial sums, a few at a time, in order. Reads
count * D floats.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton.launch import numbers, options

COLUMNS, PARTS = 32, 32  # of a program: 32 columns are one transaction
VALUES = 1024  # that a program of sum_values adds at a time


@triton.jit
def sum_partials_kernel(
    partials_ptr,
    out_ptr,
    count,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program for some columns."""
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    parts = tl.arange(0, PARTS)
    sums = tl.zeros((PARTS, COLUMNS), dtype=tl.float64)
    for first in range(0, count, PARTS):
        part = first + parts
        inside = (part < count)[:, None] & (cols < HIDDEN)[None, :]
        offsets = part.to(tl.int64)[:, None] * HIDDEN + cols[None, :]
        sums += tl.load(partials_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    tl.store(out_ptr + cols, tl.sum(sums, axis=0).to(tl.float32), mask=cols < HIDDEN)


@triton.jit(do_not_specialize=["count"])
def sum_values_kernel(values_ptr, out_ptr, count, VALUES: tl.constexpr):
    """One program for all values."""
    lanes = tl.arange(0, VALUES)
    sums = tl.zeros((VALUES,), dtype=tl.float64)
    for first in range(0, count, VALUES):
        at = first + lanes
        sums += tl.load(values_ptr + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(out_ptr, tl.sum(sums, axis=0).to(tl.float32))


def sum_partials(partials: Tensor) -> Tensor:
    """Sums float32 [count, D] over its rows, in their order: [D]."""
    count, hidden = partials.shape
    out = numbers(partials, hidden)
    sum_partials_kernel[(triton.cdiv(hidden, COLUMNS),)](
        partials, out, count, HIDDEN=hidden, COLUMNS=COLUMNS, PARTS=PARTS, **options(4)
    )
    return out


def sum_values(values: Tensor) -> Tensor:
    """Sums float32 [N], in a fixed order: [1]."""
    out = numbers(values, 1)
    sum_values_kernel[(1,)](values, out, values.shape[0], VALUES=VALUES, **options(8))
    return out
