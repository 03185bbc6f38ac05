"""The Triton kernels as the ops launch them: run on the CPU, with every launch recorded instead.

`CALLS` holds one call of a raw op, or a few that differ in what they compile, by name; a new op
adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction, mangle_type

from pmod_ops._triton import OPS, launch
from pmod_ops.testing import LAYER, Sample

EPS = 1e-6
SHORT, LONG = ("t3 v37 t5",), ("t30 v17000 t50",)  # one program selects, and several
TANH, SOFTMAX = 1, 3  # of pmod_ops.route.ACTIVATIONS


class Variant(NamedTuple):
    """A kernel, and what it is compiled for: arguments of triton's ASTSource, and options."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    options: dict[str, int]


def variant_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    """What triton specialises a launch for, with storage aligned to 16 bytes."""
    options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {key: value for key, value in kwargs.items() if key in kernel.arg_names}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_int(value) and value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, Tensor) or (is_int(value) and not free and value % 16 == 0):
            divisible.append(name)
    name = kernel.__name__.removesuffix("_kernel")
    return Variant(name, kernel, signature, constants, tuple(divisible), options)


def is_int(value: Any) -> bool:
    """A number that triton may specialise for."""
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def recorded() -> Iterator[list[Variant]]:
    """Launches of the ops, on CPU tensors, which none of them reads or writes."""
    launches: list[Variant] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(variant_of(kernel, args, kwargs))

    served = mock.patch.object(launch, "is_served", return_value=True)
    with mock.patch.object(JITFunction, "run", run), served:
        yield launches


class Layer:
    """The tensors of a routed layer, and others of the same shapes in place of gradients."""

    def __init__(self, dtype: torch.dtype, hidden: int, sequences: tuple[str, ...] = SHORT) -> None:
        case = Sample("budgets", sequences, hidden=hidden).make(dtype)
        plan = self.plan = case.plan
        self.x, self.weight, self.bias = case.x, case.router_weight, case.router_bias
        self.norm, self.rows, self.update = case.norm_weight, case.attn_out, case.update
        slots = plan.num_slots(LAYER, "packed")
        self.index = torch.arange(slots, dtype=torch.int32)
        self.inverse = torch.arange(plan.num_rows, dtype=torch.int32)
        self.rstd = torch.ones(slots)
        self.logits = self.gate = torch.zeros(plan.num_rows)
        self.maps = (self.gate, self.inverse, self.index, plan.kind)
        self.saved = (self.weight, self.logits, plan.kind, plan.cu_seqlens)

    def sizes(self, activation: int, pools: Tensor | None = None) -> tuple[Any, ...]:
        """What pmod::select takes after logits."""
        plan = self.plan
        k, cu_kept, _padded = plan.parts(LAYER)
        starts = cu_kept.narrow(0, 0, plan.num_sequences)
        slots = plan.num_slots(LAYER, "packed")
        gate = (0.2, 1.0, activation)
        return (plan.kind, plan.cu_seqlens, pools, k, starts, slots, plan.max_length, *gate)


Call = Callable[[Layer], object]


def _scatter(a: Layer, op: str, *rest: Any) -> object:
    return OPS[op](a.x, a.rows, a.update, *a.maps, *rest)


def _scatter_backward(a: Layer, *rest: Any) -> object:
    return OPS["weighted_scatter_add_backward"](a.x, a.x, a.update, *a.maps, True, True, *rest)


def _readers_backward(a: Layer, kept: Tensor | None, norm: Tensor | None, new: bool) -> object:
    rstd = a.rstd if norm is not None else a.rstd[:0]
    grads = (a.x, None, a.gate, a.rows, kept)
    rest = (a.index, a.inverse, norm, rstd, 0.2, TANH, new)
    return OPS["route_gather_backward_"](*grads, a.x, *a.saved, *rest)


def _norm_backward(a: Layer, accumulate: bool) -> object:
    rest = (a.rows, a.x, a.index, a.norm, a.rstd, accumulate)
    return OPS["gather_rmsnorm_backward_"](a.x, *rest)


def _add_backward(a: Layer, grad_out: Tensor | None, *grads: Tensor | None) -> object:
    rest = (a.update, a.index, a.norm, a.rstd, False)
    return OPS["gather_add_rmsnorm_backward_"](grads[0], grads[1], grad_out, a.rows, *rest)


def _route_backward(a: Layer, activation: int) -> object:
    return OPS["route_backward_"](a.x, a.logits, a.gate, a.x, *a.saved, 0.2, activation)


CALLS: dict[str, Call] = {
    "gather": lambda a: OPS["gather"](a.x, a.index),
    "gather_backward": lambda a: OPS["gather_backward_"](a.x, a.rows, a.index, False),
    "gather_backward, adds": lambda a: OPS["gather_backward_"](a.x, a.rows, a.index, True),
    "gather_rmsnorm": lambda a: OPS["gather_rmsnorm"](a.x, a.index, a.norm, EPS),
    "gather_rmsnorm_backward": lambda a: _norm_backward(a, False),
    "gather_rmsnorm_backward, adds": lambda a: _norm_backward(a, True),
    "gather_add_rmsnorm": lambda a: OPS["gather_add_rmsnorm"](a.x, a.rows, a.index, a.norm, EPS),
    "gather_add_rmsnorm_backward, chained": lambda a: _add_backward(a, a.x, None, None),
    "gather_add_rmsnorm_backward": lambda a: _add_backward(a, None, a.x, a.rows),
    "route": lambda a: OPS["route"](a.x, a.weight, a.bias, *a.sizes(TANH)),
    "route_backward": lambda a: _route_backward(a, TANH),
    "route_gather_backward": lambda a: _readers_backward(a, a.update, a.norm, True),
    "route_gather_backward, copied": lambda a: _readers_backward(a, a.update, None, True),
    "weighted_scatter_add": lambda a: _scatter(
        a, "weighted_scatter_add", True, True, None, None, False
    ),
    "weighted_scatter_add, scored": lambda a: _scatter(
        a, "weighted_scatter_add", True, True, a.weight, a.bias, True
    ),
    "weighted_scatter_add, in place": lambda a: _scatter(
        a, "weighted_scatter_add_", True, True, a.weight, a.bias, False
    ),
    "weighted_scatter_add_backward": lambda a: _scatter_backward(a, None, None, 0.0, 0, True, True),
    "weighted_scatter_add_backward, chained": lambda a: _scatter_backward(
        a, a.weight, a.logits, 0.2, TANH, False, False
    ),
}
# Kernels that know no rows: of one variant for all types and widths.
SELECTIONS: dict[str, Call] = {
    "select": lambda a: OPS["select"](a.logits, *a.sizes(TANH)),
    "select, softmax": lambda a: OPS["select"](a.logits, *a.sizes(SOFTMAX)),
    "select, pools": lambda a: OPS["select"](a.logits, *a.sizes(TANH, a.inverse)),
    "select_backward, softmax": lambda a: OPS["select_backward"](
        a.gate, a.logits, a.plan.kind, a.plan.cu_seqlens, 0.2, SOFTMAX
    ),
}
# Sequences that take larger blocks, as large as they get.
BLOCKS = {
    4096: ("select", "select, softmax", "select, pools"),
    8192: ("select, pools",),
    16384: ("select",),
}


def variants(dtype: torch.dtype, hidden: int) -> dict[str, Variant]:
    """By name, what the ops launch for rows of one kind."""
    return recording((name, call, Layer(dtype, hidden)) for name, call in CALLS.items())


def selections() -> dict[str, Variant]:
    """By name, what the ops launch for logits."""
    short, long = (Layer(torch.float32, 1, sequences) for sequences in (SHORT, LONG))
    lengths = (("", short), (", long", long))
    calls = [
        (name + end, call, layer) for name, call in SELECTIONS.items() for end, layer in lengths
    ]
    for rows, names in BLOCKS.items():
        layer = Layer(torch.float32, 1, (f"v{rows}",))
        calls += [(f"{name}, {rows} rows", SELECTIONS[name], layer) for name in names]
    return recording(calls)


def recording(calls: Iterable[tuple[str, Call, Layer]]) -> dict[str, Variant]:
    """The launches of calls by their names and those of the kernels; the first of equal ones."""
    found: dict[str, Variant] = {}
    with recorded() as launches:
        for name, call, layer in calls:
            launches.clear()
            call(layer)
            for variant in launches:
                if variant not in found.values():
                    found[name if name == variant.name else f"{name}: {variant.name}"] = variant
    return found
