"""Rows in a program: loaded in float32, normalised, rounded. One program has a whole row.

Arithmetic is in float32: every load is widened at once. Offsets of rows are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

PADDING = tl.constexpr(0)  # kinds of rows, as in pmod_ops.plan
ROUTABLE = tl.constexpr(1)
ALWAYS = tl.constexpr(2)


@triton.jit
def leads_to_one_of(count, index):
    """An index that is -1, or no index at all, leads nowhere."""
    return (index >= 0) & (index < count)


@triton.jit
def columns(HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of a program, and which of them a row has."""
    cols = tl.arange(0, BLOCK)
    return cols, cols < HIDDEN


@triton.jit
def row_of(matrix_ptr, row, HIDDEN: tl.constexpr):
    """Where row `row` begins. `row` is a number of any width, or a Python integer."""
    return matrix_ptr + tl.cast(row, tl.int64) * HIDDEN


@triton.jit
def load_raw(matrix_ptr, row, present, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """A row as it is, for bitwise copies; zeros beyond its end, and if it is not present."""
    cols, inside = columns(HIDDEN, BLOCK)
    return tl.load(row_of(matrix_ptr, row, HIDDEN) + cols, mask=inside & present, other=0.0)


@triton.jit
def load_row(matrix_ptr, row, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """A row in float32, zeros beyond its end."""
    return load_raw(matrix_ptr, row, True, HIDDEN, BLOCK).to(tl.float32)


@triton.jit
def load_row_if(matrix_ptr, row, present, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """A row in float32; zeros, and nothing read, if it is not present."""
    return load_raw(matrix_ptr, row, present, HIDDEN, BLOCK).to(tl.float32)


@triton.jit
def load_weight(weight_ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """A parameter [D] in float32, zeros beyond its end."""
    cols, inside = columns(HIDDEN, BLOCK)
    return tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_row(matrix_ptr, row, values, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Write a row, rounded to the type of the matrix."""
    store_row_if(matrix_ptr, row, values, True, HIDDEN, BLOCK)


@triton.jit
def store_row_if(matrix_ptr, row, values, wanted, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Write a row, rounded to the type of the matrix, if it is wanted."""
    cols, inside = columns(HIDDEN, BLOCK)
    rounded = values.to(matrix_ptr.dtype.element_ty)
    tl.store(row_of(matrix_ptr, row, HIDDEN) + cols, rounded, mask=inside & wanted)


@triton.jit
def rounded_like(values, matrix_ptr):
    """Values in float32 as a row of the matrix holds them."""
    return values.to(matrix_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def dot(row, weight):
    """Their product, a score.

    A score must not depend on whether it was taken with a row (weighted_scatter_add) or later
    (route), so both take it here, in blocks of the same size with as many warps.
    """
    return tl.sum(row * weight, axis=0)


@triton.jit
def reciprocal_rms(row, eps, HIDDEN: tl.constexpr):
    """1 / sqrt(mean square + eps) of a row with zeros beyond its end."""
    mean = tl.sum(row * row, axis=0) / HIDDEN
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def normalise(row, rstd, weight, like_ptr):
    """round(row * rstd) * weight: the caller's store rounds the product."""
    return rounded_like(row * rstd, like_ptr) * weight


@triton.jit
def norm_gradient(grad, row, weight, rstd, like_ptr, HIDDEN: tl.constexpr):
    """The gradient of a row that was normalised, and its term in that of the weight.

    rstd * (g - n * mean(g * n)) with n = row * rstd and g = grad * weight; grad * round(n).
    """
    normed = row * rstd
    of_normed = grad * weight
    mean = tl.sum(of_normed * normed, axis=0) / HIDDEN
    of_row = rstd * (of_normed - mean * normed)
    return of_row, grad * rounded_like(normed, like_ptr)


@triton.jit
def chunk(rows):
    """First and last row, exclusive, of this program's share of `rows`."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    begin = rows * program // programs
    end = rows * (program + 1) // programs
    return begin.to(tl.int32), end.to(tl.int32)
