"""Kernels of select_long.py, in the order of their launches.

A part is so many rows of one sequence, or fewer. The state of a pool is a prefix, a shift and how
many rows are wanted: its keys are decided by comparing key >> shift with the prefix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pmod_ops._triton.gate import SOFTMAX
from pmod_ops._triton.rows import ALWAYS, ROUTABLE
from pmod_ops._triton.selection import (
    rows_of_sequence,
    slots_of_sequence,
    sort_key,
    write_gates,
    write_slots,
)


@triton.jit
def first_part(cu_seqlens_ptr, sequence, num_rows, PART: tl.constexpr):
    """Parts before a sequence.

    Numbers are left out where a sequence ends inside a part; that bounds them by N / PART + B
    without looking at the lengths.
    """
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), num_rows)
    return begin // PART + sequence


@triton.jit
def part_of_program(cu_seqlens_ptr, num_sequences, num_rows, PART: tl.constexpr):
    """The sequence of this program's part, its first row, and how many rows it has, maybe none."""
    part = tl.program_id(0)
    low = tl.full((), 0, tl.int32)
    high = low + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        after = first_part(cu_seqlens_ptr, middle, num_rows, PART) <= part
        low, high = tl.where(after, middle, low), tl.where(after, high, middle)
    begin, length = rows_of_sequence(cu_seqlens_ptr, low, num_rows)
    before = tl.maximum(part - first_part(cu_seqlens_ptr, low, num_rows, PART), 0)
    skipped = tl.minimum(before * PART, length)
    return low, begin + skipped, tl.minimum(length - skipped, PART)


@triton.jit
def load_keys(
    logits_ptr,
    kind_ptr,
    pool_id_ptr,
    sequence,
    first,
    length,
    num_pools,
    row_bits,
    PART: tl.constexpr,
):
    """Keys, kinds and pools of the rows of a part; pool -1: not routable, or not a pool."""
    offsets = tl.arange(0, PART)
    inside = offsets < length
    kind = tl.load(kind_ptr + first + offsets, mask=inside, other=0)
    routable = kind == ROUTABLE
    logit = tl.load(logits_ptr + first + offsets, mask=routable, other=0.0)
    last = (tl.full((), 1, tl.uint64) << row_bits) - 1
    row = (first + offsets).to(tl.uint64)
    keys = (sort_key(logit).to(tl.uint64) << row_bits) | (last - row)
    if pool_id_ptr is not None:
        pools = tl.load(pool_id_ptr + first + offsets, mask=routable, other=-1)
        pools = tl.where((pools >= 0) & (pools < num_pools), pools, -1)
    else:
        pools = tl.where(routable, sequence, -1)
    return keys, kind, pools


@triton.jit(
    do_not_specialize=["num_rows", "num_sequences", "num_pools", "row_bits", "turn", "shift"]
)
def count_digits_kernel(
    logits_ptr,
    kind_ptr,
    cu_seqlens_ptr,
    pool_id_ptr,
    counts_ptr,
    open_ptr,
    prefix_ptr,
    wanted_ptr,
    num_rows,
    num_sequences,
    num_pools,
    row_bits,
    turn,
    shift,
    PART: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """One program per part. One pool of a part is counted as a histogram, others row by row."""
    if (turn == 0) | (tl.load(open_ptr + turn) > 0):
        sequence, first, length = part_of_program(cu_seqlens_ptr, num_sequences, num_rows, PART)
        keys, _, pools = load_keys(
            logits_ptr, kind_ptr, pool_id_ptr, sequence, first, length, num_pools, row_bits, PART
        )
        keys = keys >> shift
        competes = pools >= 0
        wanted = tl.load(wanted_ptr + pools, mask=competes, other=0)
        prefix = tl.load(prefix_ptr + pools, mask=competes, other=0)
        undecided = competes & (wanted > 0) & (keys // DIGITS == prefix)
        digits = (keys % DIGITS).to(tl.int32)
        pool = tl.min(tl.where(undecided, pools, num_pools), axis=0)
        if pool < num_pools:
            histogram = tl.histogram(digits, DIGITS, mask=undecided & (pools == pool))
            counts = counts_ptr + pool.to(tl.int64) * DIGITS + tl.arange(0, DIGITS)
            tl.atomic_add(counts, histogram, mask=histogram > 0, sem="relaxed")
            if pool_id_ptr is not None:
                counts = counts_ptr + pools.to(tl.int64) * DIGITS + digits
                tl.atomic_add(counts, 1, mask=undecided & (pools != pool), sem="relaxed")


@triton.jit(do_not_specialize=["turn", "shift"])
def pick_digits_kernel(
    counts_ptr,
    open_ptr,
    prefix_ptr,
    shift_ptr,
    wanted_ptr,
    turn,
    shift,
    DIGITS: tl.constexpr,
):
    """One program per pool: the digit of its wanted-th largest key, 0 if there are fewer keys."""
    pool = tl.program_id(0)
    wanted = tl.load(wanted_ptr + pool)
    if wanted > 0:
        digit = DIGITS - 1 - tl.arange(0, DIGITS)
        at = counts_ptr + pool.to(tl.int64) * DIGITS + digit
        count = tl.load(at)
        tl.store(at, tl.zeros((DIGITS,), tl.int32))
        upto = tl.cumsum(count, axis=0)
        above = upto - count
        picked = (above < wanted) & ((wanted <= upto) | (digit == 0))
        left = wanted - tl.sum(tl.where(picked, above, 0), axis=0)
        left = tl.where(left < tl.sum(tl.where(picked, count, 0), axis=0), left, 0)
        next_digit = tl.sum(tl.where(picked, digit, 0), axis=0)
        tl.store(prefix_ptr + pool, tl.load(prefix_ptr + pool) * DIGITS + next_digit.to(tl.uint64))
        tl.store(shift_ptr + pool, shift)
        tl.store(wanted_ptr + pool, left)
        if left > 0:
            tl.atomic_add(open_ptr + turn + 1, 1, sem="relaxed")
    elif turn == 0:
        tl.store(prefix_ptr + pool, 2)  # what no key reaches
        tl.store(shift_ptr + pool, 63)
        tl.store(wanted_ptr + pool, 0)


@triton.jit
def kept_rows(
    logits_ptr,
    kind_ptr,
    pool_id_ptr,
    prefix_ptr,
    shift_ptr,
    sequence,
    first,
    length,
    num_pools,
    row_bits,
    PART: tl.constexpr,
):
    """Which rows of a part are kept."""
    keys, kind, pools = load_keys(
        logits_ptr, kind_ptr, pool_id_ptr, sequence, first, length, num_pools, row_bits, PART
    )
    competes = pools >= 0
    prefix = tl.load(prefix_ptr + pools, mask=competes, other=0)
    shift = tl.load(shift_ptr + pools, mask=competes, other=0)
    return (kind == ALWAYS) | (competes & (keys >> shift.to(tl.uint64) >= prefix))


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "num_pools", "row_bits"])
def count_kept_kernel(
    logits_ptr,
    kind_ptr,
    cu_seqlens_ptr,
    pool_id_ptr,
    prefix_ptr,
    shift_ptr,
    kept_ptr,
    num_rows,
    num_sequences,
    num_pools,
    row_bits,
    PART: tl.constexpr,
):
    """One program per part."""
    sequence, first, length = part_of_program(cu_seqlens_ptr, num_sequences, num_rows, PART)
    kept = kept_rows(
        logits_ptr,
        kind_ptr,
        pool_id_ptr,
        prefix_ptr,
        shift_ptr,
        sequence,
        first,
        length,
        num_pools,
        row_bits,
        PART,
    )
    tl.store(kept_ptr + tl.program_id(0), tl.sum(kept.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def add_up_kept_kernel(
    cu_seqlens_ptr, kept_ptr, num_rows, num_parts, PART: tl.constexpr, LANES: tl.constexpr
):
    """One program per sequence: kept rows of a part become those of earlier parts of it."""
    sequence = tl.program_id(0)
    begin = first_part(cu_seqlens_ptr, sequence, num_rows, PART)
    end = tl.minimum(first_part(cu_seqlens_ptr, sequence + 1, num_rows, PART), num_parts)
    before = tl.full((), 0, tl.int32)
    for first in range(begin, end, LANES):
        part = first + tl.arange(0, LANES)
        count = tl.load(kept_ptr + part, mask=part < end, other=0)
        tl.store(kept_ptr + part, before + tl.cumsum(count, axis=0) - count, mask=part < end)
        before += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "num_pools", "num_slots", "row_bits"])
def write_slots_kernel(
    logits_ptr,
    kind_ptr,
    cu_seqlens_ptr,
    pool_id_ptr,
    slot_start_ptr,
    prefix_ptr,
    shift_ptr,
    kept_ptr,
    index_ptr,
    inverse_ptr,
    num_rows,
    num_sequences,
    num_pools,
    num_slots,
    row_bits,
    PART: tl.constexpr,
):
    """One program per part."""
    sequence, first, length = part_of_program(cu_seqlens_ptr, num_sequences, num_rows, PART)
    kept = kept_rows(
        logits_ptr,
        kind_ptr,
        pool_id_ptr,
        prefix_ptr,
        shift_ptr,
        sequence,
        first,
        length,
        num_pools,
        row_bits,
        PART,
    )
    slot, slot_end = slots_of_sequence(slot_start_ptr, sequence, num_sequences, num_slots)
    slot += tl.load(kept_ptr + tl.program_id(0))
    offsets = tl.arange(0, PART)
    write_slots(index_ptr, inverse_ptr, first, offsets, offsets < length, kept, slot, slot_end)


@triton.jit(do_not_specialize=["num_rows"])
def gate_kernel(
    logits_ptr,
    kind_ptr,
    cu_seqlens_ptr,
    gate_ptr,
    num_rows,
    gate_scale,
    gate_bias,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per sequence if gates are a softmax, else per LANES rows."""
    if ACTIVATION == SOFTMAX:
        first, length = rows_of_sequence(cu_seqlens_ptr, tl.program_id(0), num_rows)
    else:
        first = tl.program_id(0) * LANES
        length = tl.minimum(num_rows - first, LANES)
    write_gates(
        logits_ptr + first,
        kind_ptr + first,
        gate_ptr + first,
        length,
        gate_scale,
        gate_bias,
        ACTIVATION,
        LANES,
    )
