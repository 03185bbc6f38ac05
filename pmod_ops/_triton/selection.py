"""What the two ways to select rows share: keys that sort like logits, rows and slots of a sequence.

See select.py and select_long.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pmod_ops._triton.gate import SOFTMAX, activate, exp_of_negative
from pmod_ops._triton.rows import ROUTABLE


@triton.jit
def sort_key(logit):
    """Sorts like the logit: NaN highest, -0 equal to +0. The lowest, of -inf, is 0x007FFFFF."""
    bits = logit.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = tl.where(bits > 0x7FFFFFFF, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(size == 0, 0x80000000, key)
    return tl.where(size > 0x7F800000, 0xFFFFFFFF, key)


@triton.jit
def rows_of_sequence(cu_seqlens_ptr, sequence, num_rows):
    """The first row and the number of rows; inside the batch whatever the offsets say."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), num_rows)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_rows)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def slots_of_sequence(slot_start_ptr, sequence, num_sequences, num_slots):
    """First slot, and the end, up to which there are kept rows and then filler.

    Kept rows for which a wrong plan has no slot count as not kept. Any first slot is brought to
    where adding up rows cannot overflow.
    """
    begin = tl.load(slot_start_ptr + sequence)
    begin = tl.minimum(tl.maximum(begin, -(1 << 30)), num_slots)
    last = sequence + 1 == num_sequences
    end = tl.load(slot_start_ptr + sequence + 1, mask=sequence + 1 < num_sequences, other=0)
    return begin, tl.minimum(tl.where(last, num_slots, end), num_slots)


@triton.jit
def write_slots(index_ptr, inverse_ptr, first, offsets, inside, kept, slot_begin, slot_end):
    """Write index and inverse of some rows of a sequence, in row order: how many are kept.

    `first`: row of offset 0; `slot_begin`: slot of the first kept row.
    """
    ones = kept.to(tl.int32)
    slot = slot_begin + tl.cumsum(ones, axis=0) - 1
    placed = kept & (slot >= 0) & (slot < slot_end)
    tl.store(inverse_ptr + first + offsets, tl.where(placed, slot, -1), mask=inside)
    tl.store(index_ptr + slot, first + offsets, mask=placed)
    return tl.sum(ones, axis=0)


@triton.jit
def routable_logits(logits_ptr, kind_ptr, at, length, other):
    """Of rows below `length`: logits of routable ones, `other` elsewhere, and which these are."""
    inside = at < length
    routable = tl.load(kind_ptr + at, mask=inside, other=0) == ROUTABLE
    return tl.load(logits_ptr + at, mask=routable, other=other), routable


@triton.jit
def softmax_parts(logits_ptr, kind_ptr, length, BLOCK: tl.constexpr):
    """The largest logit of the routable rows, and the sum of exp(logit - largest).

    A NaN is no largest logit, and gets into the sum, so that it shows in every row.
    """
    lanes = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, length, BLOCK):
        logit, _ = routable_logits(logits_ptr, kind_ptr, start + lanes, length, -float("inf"))
        tops = tl.where(logit > tops, logit, tops)
    largest = tl.max(tops, axis=0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        logit, routable = routable_logits(logits_ptr, kind_ptr, start + lanes, length, largest)
        sums += tl.where(routable, exp_of_negative(logit - largest), 0.0)
    return largest, tl.sum(sums, axis=0)


@triton.jit
def write_gates(
    logits_ptr,
    kind_ptr,
    gate_ptr,
    length,
    gate_scale,
    gate_bias,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scale * act(logit) + bias on routable rows, exactly 1 elsewhere; `length` rows.

    A whole sequence, if they are a softmax. The pointers lead to the first row.
    """
    lanes = tl.arange(0, BLOCK)
    largest, total = 0.0, 1.0
    if ACTIVATION == SOFTMAX:
        largest, total = softmax_parts(logits_ptr, kind_ptr, length, BLOCK)
    for start in range(0, length, BLOCK):
        at = start + lanes
        logit, routable = routable_logits(logits_ptr, kind_ptr, at, length, largest)
        if ACTIVATION == SOFTMAX:
            weight = tl.div_rn(exp_of_negative(logit - largest), total)
        else:
            weight = activate(logit, ACTIVATION)
        gate = tl.where(routable, gate_scale * weight + gate_bias, 1.0)
        tl.store(gate_ptr + at, gate, mask=at < length)
