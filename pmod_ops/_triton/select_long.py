"""select for batches with a sequence of more rows than one program selects from (select.py).

The logit's key is followed by the row, the lowest of which counts most, so that no two keys of a
pool are equal. A pass per digit of 8 bits: one kernel counts the digits of the rows that are still
undecided, of every pool, in global memory; the next picks each pool's digit. Passes with nothing
left to decide return at once. Then kept rows are counted in parts of sequences, counts are added up
along each sequence, and slots are written in row order. A part of a sequence per program; reads a
few integers per row and pass. Integer atomics only, so that their order does not show; no program
waits for another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.gate import SOFTMAX
from pmod_ops._triton.plan import Gate, Plan, Selected
from pmod_ops._triton.select_long_kernels import (
    add_up_kept_kernel,
    count_digits_kernel,
    count_kept_kernel,
    gate_kernel,
    pick_digits_kernel,
    write_slots_kernel,
)

DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS
LOGIT_BITS = 32
PART_ROWS = 2048
OPEN_COUNTS = 16  # more than the passes
LANES = 1024  # rows whose gates are taken, or parts added up, at a time
WARPS = 8


class Scratch(NamedTuple):
    """Views of the op's scratch output."""

    counts: Tensor  # int32 [P, DIGITS]
    open: Tensor  # int32 [OPEN_COUNTS]: pools that are undecided in each pass
    # How far a pool has come: keys are decided by comparing key >> shift with the prefix.
    prefix: Tensor  # uint64 [P]
    shift: Tensor  # int32 [P]
    wanted: Tensor  # int32 [P]: undecided rows still to be kept; 0: done
    kept: Tensor  # int32 [parts]: kept rows of the part, then of earlier parts of the sequence

    @classmethod
    def of(cls, memory: Tensor, k: Tensor, parts: int) -> Scratch:
        """Nothing is counted, and every pool wants its k.

        In `memory`, the op's output, which the schema makes as large as that takes for sequences
        of more than 16,384 rows; in memory of its own for others.
        """
        pools = k.shape[0]
        sizes = [4 * pools * DIGITS, 4 * OPEN_COUNTS, 8 * pools, 4 * pools, 4 * pools, 4 * parts]
        if memory.shape[0] < sum(sizes):
            memory = memory.new_empty(sum(sizes))
        *zeroed, kept = memory[: sum(sizes)].split(sizes)
        memory[: sum(sizes[:-1])].zero_()
        counts, open_, prefix, shift, wanted = zeroed
        scratch = cls(
            counts.view(torch.int32),
            open_.view(torch.int32),
            prefix.view(torch.uint64),
            shift.view(torch.int32),
            wanted.view(torch.int32),
            kept.view(torch.int32),
        )
        scratch.wanted.copy_(k)
        return scratch


def row_bits(rows: int) -> int:
    """Whole digits that hold any row."""
    return -(-max(rows - 1, 0).bit_length() // DIGIT_BITS) * DIGIT_BITS


def shifts(rows: int) -> range:
    """Of the digit that each pass decides."""
    return range(LOGIT_BITS + row_bits(rows) - DIGIT_BITS, -1, -DIGIT_BITS)


def select_long(logits: Tensor, plan: Plan, gate: Gate, out: Selected) -> None:
    """Select from sequences of any length, of which there is at least one."""
    rows, sequences, pools = logits.shape[0], plan.slot_start.shape[0], plan.k.shape[0]
    parts = rows // PART_ROWS + sequences
    scratch = Scratch.of(out.scratch, plan.k, parts)
    out.index.fill_(-1)
    keys = (logits, plan.kind, plan.cu_seqlens, plan.pool_id)
    part = {"PART": PART_ROWS, **launch.options(WARPS)}
    sizes = (rows, sequences, pools)
    if pools:
        for turn, shift in enumerate(shifts(rows)):
            progress = (scratch.counts, scratch.open, scratch.prefix)
            count_digits_kernel[(parts,)](
                *keys,
                *progress,
                scratch.wanted,
                *sizes,
                row_bits(rows),
                turn,
                shift,
                **part,
                DIGITS=DIGITS,
            )
            pick_digits_kernel[(pools,)](
                *progress,
                scratch.shift,
                scratch.wanted,
                turn,
                shift,
                DIGITS=DIGITS,
                **launch.options(WARPS),
            )
    decided = (scratch.prefix, scratch.shift)
    count_kept_kernel[(parts,)](*keys, *decided, scratch.kept, *sizes, row_bits(rows), **part)
    add_up_kept_kernel[(sequences,)](
        plan.cu_seqlens,
        scratch.kept,
        rows,
        parts,
        PART=PART_ROWS,
        LANES=LANES,
        **launch.options(WARPS),
    )
    write_slots_kernel[(parts,)](
        *keys,
        plan.slot_start,
        *decided,
        scratch.kept,
        out.index,
        out.inverse,
        *sizes,
        plan.num_slots,
        row_bits(rows),
        **part,
    )
    softmax = gate.activation == SOFTMAX.value
    gate_kernel[(sequences if softmax else triton.cdiv(rows, LANES),)](
        *keys[:3],
        out.gate,
        rows,
        gate.scale,
        gate.bias,
        ACTIVATION=gate.activation,
        LANES=LANES,
        **launch.options(WARPS),
    )
