"""The algorithm as others would write it: as the authors did, in clean eager PyTorch, compiled.

All functions take a `Problem` and one copy of its `Rows`, and return the kept rows' indices (or a
mask of them), the gathered and normalised rows, and the output of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from inputs import EPS, Problem, Rows
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Glue = Callable[..., tuple[Tensor, Tensor, Tensor]]


def llama_rmsnorm(rows: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm of transformers."""
    wide = rows.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(rows.dtype)


def check_finite(hidden: Tensor) -> None:
    """The authors look for NaN and infinity twice per layer, on the host."""
    if torch.isnan(hidden).any() or torch.isinf(hidden).any():
        raise ValueError("NaN or infinity in the hidden states")


def official(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    residual: Tensor,
    update: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the authors' layer does around attention and MLP, step by step.

    Boolean masks, sizes read back from the device, a weight for every token, a clone that is
    written through masks. Its decoder layer starts with the norm, so the norm is here too.
    """
    target, valid = problem.target, problem.valid
    assert not torch.all(~target)
    counts = target.sum(1)
    k = (counts * problem.cell.ratio).int()
    logits = F.linear(x, weight[None], bias).squeeze(-1)
    logits = logits.masked_fill(~target, -torch.inf)
    gate = torch.tanh(logits) * 0.2 + 1
    most = int(k.max().item())
    chosen = gate.topk(most, dim=1).indices
    within = torch.arange(most, device=x.device)[None] < k[:, None]
    keep = torch.full_like(target, False).scatter_(1, chosen, within)
    keep = keep.clone() | (~target & valid)
    hidden = x.clone()
    lengths = keep.sum(1)
    rows = pad_sequence(list(x[keep].split(lengths.tolist())), batch_first=True)
    positions = problem.positions[keep].split(lengths.tolist())
    pad_sequence(list(positions), batch_first=True)
    mask = torch.arange(rows.shape[1], device=x.device)[None] < lengths[:, None]
    padded = 0 in mask
    rows = llama_rmsnorm(rows, norm_weight)
    residual, update = (t.view(rows.shape) for t in (residual, update))
    check_finite(update)
    hidden[keep] = update[mask] if padded else update.flatten(0, 1)
    hidden[target] *= gate[target][:, None]
    hidden[keep] += residual[mask] if padded else residual.flatten(0, 1)
    check_finite(hidden)
    return keep, rows.flatten(0, 1), hidden.flatten(0, 1)


def choose(x: Tensor, weight: Tensor, bias: Tensor, text: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights [N] and kept rows [K], where text comes first and k is known: no mask, no sync."""
    (batch, length, _), device = x.shape, x.device
    logits = F.linear(x[:, text:], weight[None], bias).squeeze(-1)
    gate = F.pad(torch.tanh(logits) * 0.2 + 1, (text, 0), value=1.0).flatten()
    best = logits.detach().topk(k, sorted=False).indices.sort().values + text
    always = torch.arange(text, device=device).expand(batch, text)
    first = torch.arange(batch, device=device)[:, None] * length
    return gate, (torch.cat([always, best], 1) + first).flatten()


def inverse_of(kept: Tensor, num_rows: int) -> Tensor:
    """The slot of every row, -1 where it is not kept."""
    slots = torch.full((num_rows,), -1, device=kept.device)
    return slots.index_copy(0, kept, torch.arange(len(kept), device=kept.device))


def scatter_copy(x: Tensor, residual: Tensor, update: Tensor, gate: Tensor, kept: Tensor) -> Tensor:
    """Weight every row, then write the kept ones over it."""
    processed = torch.addcmul(residual, gate[kept][:, None], update)
    return (x * gate[:, None]).index_copy_(0, kept, processed)


def scatter_where(
    x: Tensor, residual: Tensor, update: Tensor, gate: Tensor, kept: Tensor
) -> Tensor:
    """Choose per row, through the inverse of `kept`: one pass when it is compiled."""
    slot = inverse_of(kept, x.shape[0])
    processed = residual[slot.clamp(min=0)] + gate[:, None] * update[slot.clamp(min=0)]
    return torch.where((slot >= 0)[:, None], processed, gate[:, None] * x)


class Take(torch.autograd.Function):
    """source[index] for an index without repetitions, whose backward is a gather, too.

    `back` is the inverse of `index`. Autograd's own backward adds rows up one after the other, in
    case two are the same; under torch.compile that is slow.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return source.index_select(0, index.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (back,) = ctx.saved_tensors
        rows = grads[0].index_select(0, back.clamp(min=0))
        return torch.where((back >= 0)[:, None], rows, torch.zeros_like(rows)), None, None


def eager(
    scatter: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    residual: Tensor,
    update: Tensor,
    text: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean eager: everything about sizes is known on the host, indices are integers."""
    gate, kept = choose(x, weight, bias, text, k)
    flat = x.flatten(0, 1)
    rows = llama_rmsnorm(flat.index_select(0, kept), norm_weight)
    return kept, rows, scatter(flat, residual, update, gate, kept)


def eager_take(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    residual: Tensor,
    update: Tensor,
    text: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch.where form with `Take` for every gather."""
    gate, kept = choose(x, weight, bias, text, k)
    flat = x.flatten(0, 1)
    slot = inverse_of(kept, flat.shape[0])
    rows = llama_rmsnorm(Take.apply(flat, kept, slot), norm_weight)
    processed = Take.apply(residual, slot, kept) + gate[:, None] * Take.apply(update, slot, kept)
    return kept, rows, torch.where((slot >= 0)[:, None], processed, gate[:, None] * flat)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile; it recompiles by itself for another number of threads."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def memcpy(rows: Rows) -> Tensor:
    """A copy of half of the bytes, which reads and writes as many as the op must."""
    return rows.source.clone()


def official_of(problem: Problem) -> Glue:
    """The authors' form on the masks of a cell."""
    return partial(official, problem=problem)


def forward_peer(glue: Glue, p: Problem) -> Callable[[Rows], Any]:
    """A peer, called on the rows of a copy."""
    return lambda rows: glue(rows.x, p.weight, p.bias, p.norm_weight, rows.residual, rows.update)


def glue_peers(problem: Problem, *, training: bool) -> dict[str, Glue]:
    """The peers of a cell: functions of x, weight, bias, norm weight, residual and update.

    Compilation takes seconds a cell, and the authors' form up to seconds a call, so cells that
    are not in the tables do without.
    """
    cell = problem.cell
    sizes = {"text": cell.text, "k": cell.k}
    peers: dict[str, Glue] = {"eager": partial(eager, scatter_copy, **sizes)}
    if cell.headline:
        peers["compile_copy"] = compiled(partial(eager, scatter_copy, **sizes))
        peers["compile_where"] = compiled(partial(eager, scatter_where, **sizes))
        if training:
            peers["compile_take"] = compiled(partial(eager_take, **sizes))
    if cell.headline or (cell.batch == 1 and cell.geometry != "video"):
        peers["official"] = official_of(problem)
    return peers
