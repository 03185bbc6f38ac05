"""select: gates, and the rows that each pool keeps, in row order (reference.select).

For sequences of up to 16,384 rows, 8,192 with pool ids; select_long.py is for others. One program
per sequence, with a key per row in registers. Each pool finds its k-th largest key bit by bit, from
the most significant on, counting the keys that are not below; of rows that equal it the first are
kept. Then kept rows are counted in row order. Reads and writes a few integers per row, and every
slot of the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton.launch import LaunchConfig
from pmod_ops._triton.plan import Gate, Plan, Selected
from pmod_ops._triton.rows import ALWAYS, ROUTABLE
from pmod_ops._triton.selection import (
    rows_of_sequence,
    slots_of_sequence,
    sort_key,
    write_gates,
    write_slots,
)

# What a program has registers for; pool ids take one more each.
MOST_ROWS, MOST_ROWS_WITH_POOLS = 16384, 8192
LANES = 1024  # rows at a time whose gates are taken, and slots that are filled

# Keys of rows that are decided; no logit has them.
NOT_KEPT = tl.constexpr(0)
KEPT = tl.constexpr(1)


@triton.jit
def keep_best(keys, offsets, k, BLOCK: tl.constexpr):
    """Which of the undecided rows have the k largest keys, the first ones of equal keys.

    And, if they are many, rows that are KEPT. The first equal ones are found as the key is: by
    counting them up to a row. That takes no register per row, and there rarely are any.
    """
    threshold = tl.full((), 0, tl.uint32)
    counted = tl.sum((keys > KEPT).to(tl.int32), axis=0)
    bit = 31
    while (bit >= 0) & (counted != k):
        higher = threshold | (tl.full((), 1, tl.uint32) << bit)
        count = tl.sum((keys >= higher).to(tl.int32), axis=0)
        enough = count >= k
        threshold = tl.where(enough, higher, threshold)
        counted = tl.where(enough, count, counted)
        bit -= 1
    threshold = tl.maximum(threshold, KEPT)  # if there are no more than k: all of them
    ties = k - tl.sum((keys > threshold).to(tl.int32), axis=0)
    all_first = tl.sum((keys == threshold).to(tl.int32), axis=0) <= ties
    limit = tl.where(all_first, BLOCK, 0)
    step = tl.where(all_first, 0, BLOCK // 2)
    while step > 0:
        count = tl.sum(((keys == threshold) & (offsets < limit + step)).to(tl.int32), axis=0)
        limit = tl.where(count <= ties, limit + step, limit)
        step //= 2
    return keys > threshold - (offsets < limit).to(tl.uint32)


@triton.jit
def keep_best_of_pools(keys, pool_id_ptr, k_ptr, offsets, num_pools, BLOCK: tl.constexpr):
    """Keys with every pool decided. Pools whose ids are not 0..P-1 keep nothing."""
    pools = tl.load(pool_id_ptr + offsets, mask=keys > KEPT, other=-1)
    exists = (pools >= 0) & (pools < num_pools)
    pool = tl.min(tl.where(exists, pools, num_pools), axis=0)
    last = tl.max(tl.where(exists, pools, -1), axis=0)
    while pool <= last:
        own = tl.where(pools == pool, keys, NOT_KEPT)
        best = keep_best(own, offsets, tl.load(k_ptr + pool), BLOCK)
        keys = tl.where(pools == pool, best.to(tl.uint32), keys)
        pool += 1
    return keys


@triton.jit
def write_filler(index_ptr, begin, end, LANES: tl.constexpr):
    """-1 in slots begin..end."""
    for first in range(tl.maximum(begin, 0), end, LANES):
        slot = first + tl.arange(0, LANES)
        tl.store(index_ptr + slot, tl.full((LANES,), -1, tl.int32), mask=slot < end)


@triton.jit(do_not_specialize=["num_rows", "num_pools", "num_slots"])
def select_kernel(
    logits_ptr,
    kind_ptr,
    cu_seqlens_ptr,
    pool_id_ptr,
    k_ptr,
    slot_start_ptr,
    gate_ptr,
    index_ptr,
    inverse_ptr,
    num_rows,
    num_pools,
    num_slots,
    gate_scale,
    gate_bias,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per sequence. Without pool ids a sequence is a pool."""
    sequence = tl.program_id(0)
    first, length = rows_of_sequence(cu_seqlens_ptr, sequence, num_rows)
    length = tl.minimum(length, BLOCK)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < length
    kind = tl.load(kind_ptr + first + offsets, mask=inside, other=0)
    logit = tl.load(logits_ptr + first + offsets, mask=inside, other=0.0)
    decided = tl.where(kind == ALWAYS, KEPT, NOT_KEPT).to(tl.uint32)
    keys = tl.where(kind == ROUTABLE, sort_key(logit), decided)
    if pool_id_ptr is not None:
        keys = keep_best_of_pools(keys, pool_id_ptr + first, k_ptr, offsets, num_pools, BLOCK)
        kept = keys == KEPT
    else:
        kept = keep_best(keys, offsets, tl.load(k_ptr + sequence), BLOCK) | (keys == KEPT)
    slot_begin, slot_end = slots_of_sequence(
        slot_start_ptr, sequence, tl.num_programs(0), num_slots
    )
    total = write_slots(index_ptr, inverse_ptr, first, offsets, inside, kept, slot_begin, slot_end)
    if sequence == 0:
        write_filler(index_ptr, 0, tl.minimum(slot_begin, num_slots), LANES)
    write_filler(index_ptr, slot_begin + total, slot_end, LANES)
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


def launch_config(max_length: int) -> LaunchConfig:
    """Keys that a program has in registers: 8 to 32 a thread of 32 lanes a warp."""
    block = max(1024, triton.next_power_of_2(max_length))
    return LaunchConfig(block, min(max(block // 512, 4), 16))


def launch_options(config: LaunchConfig) -> dict[str, Any]:
    """Of the launch. A sequence is one program's, so registers need not be saved for others.

    NVIDIA's assembler spills one here and there otherwise, unless the program has all there are;
    ROCm knows no such option.
    """
    if torch.version.hip is not None or config.num_warps == 16:
        return config.options
    return config.options | {"maxnreg": 255}


def fits(plan: Plan) -> bool:
    """Whether one program can select from every sequence."""
    most = MOST_ROWS if plan.pool_id is None else MOST_ROWS_WITH_POOLS
    return plan.max_length <= most


def select_short(logits: Tensor, plan: Plan, gate: Gate, out: Selected) -> None:
    """Select from sequences of rows that `fits` knows, of which there is at least one."""
    config = launch_config(plan.max_length)
    select_kernel[(plan.slot_start.shape[0],)](
        logits,
        plan.kind,
        plan.cu_seqlens,
        plan.pool_id,
        plan.k,
        plan.slot_start,
        out.gate,
        out.index,
        out.inverse,
        logits.shape[0],
        plan.k.shape[0],
        plan.num_slots,
        gate.scale,
        gate.bias,
        ACTIVATION=gate.activation,
        BLOCK=config.block,
        LANES=min(LANES, 128 * config.num_warps),
        **launch_options(config),
    )
