"""What every op must pass, given how to call it: one implementation for all files in this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import pmod_ops
from pmod_ops import Routing, reference
from pmod_ops._checks import acc_dtype
from pmod_ops.testing import LAYER, Case, Sample, assert_no_worse, distinct

EPS = 1e-5
# A dense Jacobian of more inputs than this takes gigabytes; fast mode checks a random projection of it.
FULL_JACOBIAN = 1500


@dataclasses.dataclass(frozen=True)
class Op:
    """How to call one op.

    Attributes:
        leaves: names of its differentiable inputs.
        public: (module, tensors, routing, case) -> differentiable outputs, through the public function.
        raw: (tensors, routing, case) -> [(overload, arguments)], forward and backward ops.
    """

    name: str
    leaves: tuple[str, ...]
    public: Callable[[Any, Tensors, Routing, Case], tuple[Tensor, ...]]
    raw: Callable[[Tensors, Routing, Case], list[tuple[Any, tuple[Any, ...]]]]


@dataclasses.dataclass
class Tensors:
    """The inputs of all ops by name."""

    x: Tensor
    router_weight: Tensor
    router_bias: Tensor | None
    norm_weight: Tensor
    attn_out: Tensor
    residual: Tensor
    update: Tensor
    gate: Tensor


def tensors(case: Case, routing: Routing, dtype: torch.dtype | None = None) -> Tensors:
    """All inputs of a case, optionally converted."""
    inputs = (
        case.x,
        case.router_weight,
        case.router_bias,
        case.norm_weight,
        case.attn_out,
        case.attn_out.flip(-1),
        case.update,
        routing.gate,
    )
    return Tensors(*(None if t is None else t.detach().to(dtype or t.dtype) for t in inputs))


def leaves_of(op: Op, t: Tensors) -> list[Tensor]:
    """Make the op's differentiable inputs require gradients and return them."""
    present = [getattr(t, name) for name in op.leaves]
    return [leaf.requires_grad_() for leaf in present if leaf is not None]


def routing_of(case: Case) -> Routing:
    """The routing of a case, by the op under test."""
    with torch.no_grad():
        return pmod_ops.route(
            case.x,
            case.router_weight,
            case.router_bias,
            case.plan,
            LAYER,
            layout=case.sample.layout,
            **case.sample.gate,
        )


def in_precision(routing: Routing, dtype: torch.dtype) -> Routing:
    gate = routing.gate.to(acc_dtype(dtype))
    return dataclasses.replace(routing, logits=routing.logits.to(gate.dtype), gate=gate)


def router_scales(case: Case, bias_gradient: Callable[[Case], Tensor]) -> dict[str, float]:
    """Sums of absolute terms of the router's gradients, which cancel.

    A bias per row has the gradient of that row's logit: the terms of the sum.
    """
    per_row = case.x.new_zeros(case.plan.num_rows)
    bias = per_row if case.router_bias is None else per_row + case.router_bias
    terms = bias_gradient(dataclasses.replace(case, router_bias=bias)).abs()
    by_column = terms @ case.x.double().abs()
    return {"router_bias": float(terms.sum()), "router_weight": float(by_column.max())}


def eager_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What eager PyTorch computes in for comparison, see `assert_no_worse`; None = as given."""
    return torch.float32 if dtype == torch.float64 else None


def run(
    op: Op, module: ModuleType, case: Case, routing: Routing, dtype: torch.dtype | None = None
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs, and gradients of the leaves for a fixed cotangent, by `module`."""
    t = tensors(case, routing, dtype)
    leaves = leaves_of(op, t)
    if dtype is not None:
        routing = in_precision(routing, dtype)
    outputs = op.public(module, t, routing, case)
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64, device=case.x.device)
    for out in outputs:
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        if case.sample.finite:
            # the cotangent is what the row dtype can hold, in every dtype
            cotangent = cotangent.to(case.x)
            loss = loss + (out * cotangent.to(out.dtype)).sum().double()
    grads = (
        list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        if case.sample.finite
        else []
    )
    return outputs, grads


def check_values(op: Op, sample: Sample, dtype: torch.dtype, device: str = "cpu") -> None:
    """Outputs and gradients are as near to float64 as those of eager PyTorch, up to a factor of two."""
    case = sample.make(dtype, device)
    routing = routing_of(case)
    ours, our_grads = run(op, pmod_ops, case, routing)
    eager, eager_grads = run(op, reference, case, routing, eager_dtype(dtype))
    exact, exact_grads = run(op, reference, case, routing, torch.float64)
    assert len(ours) == len(eager) > 0
    for i, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        assert a.dtype == (c.dtype if dtype == torch.float64 else b.dtype)
        assert_no_worse(a, b, c, f"output {i}")
    scales = (
        router_scales(
            case,
            lambda c: run(op, reference, c, routing, torch.float64)[1][
                op.leaves.index("router_bias")
            ],
        )
        if "router_bias" in op.leaves and sample.finite
        else {}
    )
    names = [name for name in op.leaves if getattr(tensors(case, routing), name) is not None]
    for name, a, b, c in zip(
        names if sample.finite else [], our_grads, eager_grads, exact_grads, strict=True
    ):
        assert_no_worse(a, b, c, f"gradient of {name}", scales.get(name))


def check_opcheck(op: Op, sample: Sample) -> None:
    """Schema, autograd registration, fake and AOT dispatch of the op and of its backward op."""
    case = sample.make(torch.float32)
    routing = routing_of(case)
    t = tensors(case, routing)
    calls = op.raw(t, routing, case)
    assert calls
    for overload, arguments in calls:
        torch.library.opcheck(overload, arguments)


def check_gradients(op: Op, sample: Sample) -> None:
    """Gradcheck of the public function, selection frozen by the gap between logits (or by being given)."""
    case = sample.make(torch.float64)
    routing = routing_of(case)
    t = tensors(case, routing)
    leaves = leaves_of(op, t)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        named = {n: next(given) if getattr(t, n) is not None else None for n in op.leaves}
        return op.public(pmod_ops, dataclasses.replace(t, **named), routing, case)

    fast = sample.hidden > 64 or sum(leaf.numel() for leaf in leaves) > FULL_JACOBIAN
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)


def check_compiled(op: Op, sample: Sample, backend: str) -> None:
    """The op compiles into one graph, forward and backward, and equals eager."""
    torch.compiler.reset()
    case = sample.make(torch.float32)
    routing = routing_of(case)
    compiled = torch.compile(
        lambda t, routing: op.public(pmod_ops, t, routing, case),
        fullgraph=True,
        backend=backend,
        dynamic=False,
    )
    results = []
    for function in (compiled, lambda t, r: op.public(pmod_ops, t, r, case)):
        t = tensors(case, routing)
        leaves = leaves_of(op, t)
        outputs = function(t, routing)
        loss = torch.stack([(out * out).sum() for out in outputs]).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append((*outputs, *grads))
    for a, b in zip(*results, strict=True):
        # inductor may fuse the loss differently; the op itself is the same kernel
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def finite(table: tuple[Sample, ...]) -> list[Sample]:
    """Samples for opcheck and compile: those without NaN outputs."""
    return [sample for sample in table if sample.finite]


def checkable(table: tuple[Sample, ...]) -> list[Sample]:
    """Samples for gradcheck: finite, and no small step changes the selection."""
    return [s for s in table if s.finite and distinct(s.make(torch.float64))]


def zeros_like_x(case: Case) -> Tensor:
    return torch.zeros_like(case.x)


def acc_zeros(case: Case, *shape: int) -> Tensor:
    return case.x.new_zeros(*shape, dtype=acc_dtype(case.x.dtype))
