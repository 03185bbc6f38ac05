"""Who competes in a cell: ours and the peers of the CPU benchmarks, and those that need a GPU.

The inputs of a cell are the same in every `Problem`, so each contest can make its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from typing import Any

import bench_gather
import bench_gather_add_rmsnorm
import bench_gather_rmsnorm
import bench_glue
import bench_route
import bench_route_gather
import bench_weighted_scatter_add
import torch
import torch.nn.functional as F
from cells import Cell
from graph import backward, require_grad
from inputs import EPS, Problem, Rows
from peers import choose, compiled, forward_peer, memcpy, scatter_copy, scatter_where
from timing import Candidate, Contest
from torch import Tensor

from pmod_ops import route, weighted_scatter_add
from pmod_ops.route import route_arguments
from pmod_ops.testing import LAYER

COMPILED = "compile"  # how the names of compiled peers begin


def contest(cell: Cell) -> Contest:
    """The candidates of a cell and their inputs."""
    kind, _, spread = cell.kind.partition("-")
    found = selection(cell, spread) if kind == "select" else unwrap(BUILDERS[cell.kind])(cell)
    found.peers = {name: peer for name, peer in found.peers.items() if wanted(cell, name)}
    if cell.kind in EXTRA:
        found.peers.update(EXTRA[cell.kind](Problem(cell)))
    return found


def wanted(cell: Cell, name: str) -> bool:
    """Compilation takes seconds a cell: apart from the glue, it is left to R = 0.5."""
    return not name.startswith(COMPILED) or cell.kind.startswith("glue") or cell.ratio == 0.5


def has_compiled(cell: Cell) -> bool:
    """Whether the cell has a compiled peer."""
    kinds = (
        "glue",
        "weighted_scatter_add-",
        "gather_rmsnorm-forward",
        "gather_add_rmsnorm-forward",
    )
    usual = cell.headline and wanted(cell, COMPILED) and cell.kind.startswith(kinds)
    return usual and cell.kind != "weighted_scatter_add-backward"


def next_scores(cell: Cell) -> Contest:
    """weighted_scatter_add that also scores the rows it writes: N + K rows read, N written."""
    p, moved = Problem(cell), cell.moved(n=2, k=1)
    router = (p.weight, p.bias)

    def ours(rows: Rows) -> tuple[Tensor, Tensor]:
        out, logits = weighted_scatter_add(
            rows.x, rows.residual, rows.update, p.routing, next_router=router
        )
        return out.flatten(0, 1), logits

    def apart(scatter: Callable[..., Tensor], x: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        out = scatter(x.flatten(0, 1), *args)
        scores = F.linear(out.view(x.shape)[:, cell.text :], p.weight[None], p.bias)
        return out, F.pad(scores.squeeze(-1), (cell.text, 0)).flatten()

    def peer(function: Callable[..., Any]) -> Candidate:
        return lambda rows: function(rows.x, rows.residual, rows.update, p.gate, p.index)

    peers = {"eager": peer(partial(apart, scatter_copy))}
    if cell.headline:
        peers["compile_copy"] = peer(compiled(partial(apart, scatter_copy)))
        peers["compile_where"] = peer(compiled(partial(apart, scatter_where)))
    copies = p.copies("x", "residual", "update", moved=moved)
    return Contest(copies, ours, {**peers, "memcpy": memcpy}, moved)


def selection(cell: Cell, spread: str) -> Contest:
    """Selection from logits that are there, compared with a stable sort: the same rows exactly."""
    p, moved = Problem(cell), 13 * cell.rows + 4 * cell.kept
    logits = logits_like(p, spread)
    arguments, _ = route_arguments("route", p.x, p.plan, LAYER, 0.2, 1.0, "tanh", "packed")
    first = torch.arange(cell.batch, device=cell.device)[:, None] * cell.length

    def ours(rows: Rows) -> tuple[Tensor, Tensor]:
        routing = route(p.x, p.weight, p.bias, p.plan, LAYER, logits=logits)
        return routing.gate, routing.index

    def in_order(best: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(logits) * 0.2 + 1, (best.sort().values + first).flatten()

    scores = logits.view(cell.batch, cell.length)
    peers: dict[str, Candidate] = {
        "op": lambda rows: torch.ops.pmod.select(logits, *arguments),
        "eager": lambda rows: in_order(scores.topk(cell.k, sorted=False).indices),
        "stable_sort": lambda rows: in_order(
            torch.sort(scores, stable=True, descending=True).indices[:, : cell.k]
        ),
        "topk_alone": lambda rows: scores.topk(cell.k),
        "memcpy": memcpy,
    }
    # of equal logits topk may keep any
    unlike = frozenset({"op", "eager", "topk_alone", "memcpy"})
    return Contest(p.copies(moved=moved), ours, peers, moved, unlike=unlike)


def logits_like(p: Problem, spread: str) -> Tensor:
    """Logits of one of the SPREADS."""
    normal = p.normal(p.cell.rows, dtype=torch.float32)
    if spread == "narrow":
        return 0.1 * normal
    if spread == "tied":
        return torch.zeros_like(normal)
    if spread == "coarse":  # what is left of a gate in bfloat16
        return (0.2 * torch.tanh(normal) + 1).bfloat16().float()
    return normal


def attribute(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a package that may not be installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def liger(name: str) -> Callable[..., Any] | None:
    """A function of Liger; its norms round as a Llama's if they are not told otherwise."""
    found = attribute("liger_kernel.transformers.functional", name)
    return None if found is None else partial(found, in_place=False)


def of_gather(p: Problem) -> dict[str, Candidate]:
    """Gathering by xformers."""
    take = attribute("xformers.ops", "index_select_cat")
    if take is None:
        return {}
    return {
        "xformers": lambda rows: take([rows.x.flatten(0, 1)], [p.index]).view(-1, p.cell.hidden)
    }


def of_gather_rmsnorm(p: Problem) -> dict[str, Candidate]:
    """Gathering by torch or xformers, then Liger's norm."""
    norm = liger("liger_rms_norm")
    if norm is None:
        return {}

    def after(gather: Candidate) -> Candidate:
        return lambda rows: norm(gather(rows), p.norm_weight, EPS)

    found = {"liger": after(lambda rows: rows.x.flatten(0, 1).index_select(0, p.index))}
    return found | {f"{name}_liger": after(gather) for name, gather in of_gather(p).items()}


def of_gather_rmsnorm_backward(p: Problem) -> dict[str, Candidate]:
    """The same, backward."""
    require_grad(p.norm_weight)

    def gradient(forward: Candidate) -> Candidate:
        return backward(
            forward, lambda rows: (rows.x, p.norm_weight), lambda rows: (rows.grad_rows,)
        )

    return {name: gradient(forward) for name, forward in of_gather_rmsnorm(p).items()}


def of_gather_add_rmsnorm(p: Problem) -> dict[str, Candidate]:
    """Gathering, then Liger's addition and norm."""
    both = liger("liger_fused_add_rms_norm")
    if both is None:
        return {}

    def candidate(rows: Rows) -> tuple[Tensor, Tensor]:
        kept = rows.x.flatten(0, 1).index_select(0, p.index)
        normed, residual = both(rows.update, kept, p.norm_weight, EPS)
        return residual, normed

    return {"liger": candidate}


def scatter_xformers(
    add: Callable[..., Tensor],
    x: Tensor,
    residual: Tensor,
    update: Tensor,
    gate: Tensor,
    kept: Tensor,
) -> Tensor:
    """Weight every row, those that are kept by zero, and add the processed ones."""
    processed = torch.addcmul(residual, gate[kept][:, None], update)
    out = x * gate.index_fill(0, kept, 0)[:, None]
    return add(out[:, None], kept, processed[:, None]).squeeze(1)


def of_scatter(p: Problem) -> dict[str, Candidate]:
    """Writing back by xformers."""
    add = attribute("xformers.ops", "scaled_index_add")
    if add is None:
        return {}
    return {
        "xformers": lambda rows: scatter_xformers(
            add, rows.x.flatten(0, 1), rows.residual, rows.update, p.gate, p.index
        )
    }


def of_glue(p: Problem) -> dict[str, Candidate]:
    """The whole glue from the parts of xformers and Liger."""
    take, add = (attribute("xformers.ops", n) for n in ("index_select_cat", "scaled_index_add"))
    norm = liger("liger_rms_norm")
    if take is None or add is None or norm is None:
        return {}

    def glue(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor,
        residual: Tensor,
        update: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gate, kept = choose(x, weight, bias, p.cell.text, p.cell.k)
        flat = x.flatten(0, 1)
        rows = norm(take([flat], [kept]).view(-1, p.cell.hidden), norm_weight, EPS)
        return kept, rows, scatter_xformers(add, flat, residual, update, gate, kept)

    return {"xformers_liger": forward_peer(glue, p)}


BUILDERS: dict[str, Callable[[Cell], Contest]] = {
    "glue-forward": bench_glue.forward,
    "glue-training": bench_glue.training,
    "weighted_scatter_add-forward": bench_weighted_scatter_add.forward,
    "weighted_scatter_add-next": next_scores,
    "weighted_scatter_add_-forward": bench_weighted_scatter_add.in_place,
    "weighted_scatter_add-backward": bench_weighted_scatter_add.gradient,
    "gather-forward": bench_gather.forward,
    "gather_rmsnorm-forward": bench_gather_rmsnorm.forward,
    "gather_rmsnorm-backward": bench_gather_rmsnorm.gradient,
    "gather_add_rmsnorm-forward": bench_gather_add_rmsnorm.forward,
    "gather_add_rmsnorm-backward": bench_gather_add_rmsnorm.gradient,
    "route-forward": bench_route.forward,
    "route_gather-backward": bench_route_gather.gradient,
}
EXTRA: dict[str, Callable[[Problem], dict[str, Candidate]]] = {
    "glue-forward": of_glue,
    "weighted_scatter_add-forward": of_scatter,
    "gather-forward": of_gather,
    "gather_rmsnorm-forward": of_gather_rmsnorm,
    "gather_rmsnorm-backward": of_gather_rmsnorm_backward,
    "gather_add_rmsnorm-forward": of_gather_add_rmsnorm,
}
