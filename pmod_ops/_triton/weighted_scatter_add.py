"""pmod::weighted_scatter_add: reference.weighted_scatter_add.

One program per row, which comes from its slot if it was kept, else from x. The next layer's logit
is taken from the row as rounded, while it is in registers. Reads N + K rows (K rows of x are not
read) and writes N; in place, a row that stays as it is is not written, and not read unless it is
examined. The backward is in weighted_scatter_add_backward.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmod_ops._triton import launch
from pmod_ops._triton.launch import LaunchConfig
from pmod_ops._triton.rows import (
    PADDING,
    ROUTABLE,
    columns,
    dot,
    leads_to_one_of,
    load_raw,
    load_row,
    load_weight,
    store_row,
)
from pmod_ops._triton.weighted_scatter_add_backward import weighted_scatter_add_backward


@triton.jit(do_not_specialize=["num_slots"])
def weighted_scatter_add_kernel(
    x_ptr,
    residual_ptr,
    update_ptr,
    gate_ptr,
    inverse_ptr,
    kind_ptr,
    out_ptr,
    next_weight_ptr,
    next_bias_ptr,
    next_logits_ptr,
    finite_ptr,
    num_slots,
    GATE_MLP: tl.constexpr,
    SCALE_SKIPPED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. `next_weight_ptr` and `finite_ptr` are None if nothing is asked."""
    row = tl.program_id(0)
    slot = tl.load(inverse_ptr + row)
    kind = tl.load(kind_ptr + row)
    routable = kind == ROUTABLE
    kept = leads_to_one_of(num_slots, slot)
    scaled = routable & (kept == 0) & SCALE_SKIPPED
    gate = tl.load(gate_ptr + row, mask=scaled | (routable & kept & GATE_MLP), other=1.0)
    written = kept | scaled | (not IN_PLACE)
    read = written | (finite_ptr is not None)
    if next_weight_ptr is not None:
        read = read | routable
    out = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    if kept:
        residual = load_row(residual_ptr, slot, HIDDEN, BLOCK)
        update = load_row(update_ptr, slot, HIDDEN, BLOCK)
        out = (residual + gate * update).to(out.dtype)
    elif read:
        x = load_raw(x_ptr, row, True, HIDDEN, BLOCK)
        out = x  # bit by bit, unless it is scaled
        if scaled:
            out = (gate * x.to(tl.float32)).to(out.dtype)
    if written:
        store_row(out_ptr, row, out, HIDDEN, BLOCK)
    # beyond the row there is 0 times a gate, which may be infinite
    _cols, inside = columns(HIDDEN, BLOCK)
    examined = tl.where(inside, out.to(tl.float32), 0.0)
    if finite_ptr is not None:
        is_finite = tl.abs(examined) < float("inf")
        failures = tl.sum((is_finite == 0).to(tl.int32), axis=0)
        # every program that writes writes the same
        tl.store(finite_ptr, 0, mask=(failures > 0) & (kind != PADDING))
    if next_weight_ptr is not None:
        logit = dot(examined, load_weight(next_weight_ptr, HIDDEN, BLOCK))
        if next_bias_ptr is not None:
            logit += tl.load(next_bias_ptr).to(tl.float32)
        tl.store(next_logits_ptr + row, tl.where(routable, logit, 0.0))


def launch_config(hidden: int) -> LaunchConfig:
    """Of the forward kernel. Like that of route, see `rows.dot`."""
    return launch.row_config(hidden)


def scatter(
    op: str,
    x: Tensor,
    rows: tuple[Tensor, ...],
    flags: tuple[bool, bool],
    next_router: tuple[Tensor | None, Tensor | None],
    check_finite: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes to `out`, which may be x itself; None: a new one. `rows`: residual to kind."""
    x = launch.check_rows(op, "x", x)
    count, hidden = x.shape
    residual, update, gate, inverse, index, kind = rows
    residual = launch.check_rows(op, "residual", residual, like=x)
    slots = residual.shape[0]
    update = launch.check_rows(op, "update", update, like=x, count=slots)
    gate, inverse, _index, kind = launch.check_maps(op, gate, inverse, index, kind, slots, like=x)
    weight = launch.check_optional_weight(op, "next_weight", next_router[0], hidden, like=x)
    bias = launch.check_optional_weight(op, "next_bias", next_router[1], 1, like=x)
    if out is not None:
        launch.check_mutable(op, "x", out)
    in_place = out is not None
    out = x if in_place else launch.empty(x, count, hidden)
    next_logits = launch.numbers(x, 0 if weight is None else count)
    with launch.on_device(x):
        finite = torch.ones(int(check_finite), dtype=torch.bool, device=x.device)
        if count:
            config = launch_config(hidden)
            weighted_scatter_add_kernel[(count,)](
                x,
                residual,
                update,
                gate,
                inverse,
                kind,
                out,
                weight,
                bias,
                next_logits,
                finite.view(torch.uint8) if check_finite else None,
                slots,
                GATE_MLP=flags[0],
                SCALE_SKIPPED=flags[1],
                IN_PLACE=in_place,
                HIDDEN=hidden,
                BLOCK=config.block,
                **config.options,
            )
    return out, next_logits, finite


def weighted_scatter_add(
    x: Tensor,
    residual: Tensor,
    update: Tensor,
    gate: Tensor,
    inverse: Tensor,
    index: Tensor,
    kind: Tensor,
    gate_mlp: bool,
    scale_skipped: bool,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """pmod::weighted_scatter_add."""
    rows = (residual, update, gate, inverse, index, kind)
    flags, router = (gate_mlp, scale_skipped), (next_weight, next_bias)
    return scatter("weighted_scatter_add", x, rows, flags, router, check_finite, None)


def weighted_scatter_add_(
    x: Tensor,
    residual: Tensor,
    update: Tensor,
    gate: Tensor,
    inverse: Tensor,
    index: Tensor,
    kind: Tensor,
    gate_mlp: bool,
    scale_skipped: bool,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    check_finite: bool,
) -> tuple[Tensor, Tensor]:
    """pmod::weighted_scatter_add_."""
    rows = (residual, update, gate, inverse, index, kind)
    flags, router = (gate_mlp, scale_skipped), (next_weight, next_bias)
    _, logits, finite = scatter("weighted_scatter_add_", x, rows, flags, router, check_finite, x)
    return logits, finite


OPS = {
    "weighted_scatter_add": weighted_scatter_add,
    "weighted_scatter_add_": weighted_scatter_add_,
    "weighted_scatter_add_backward": weighted_scatter_add_backward,
}
