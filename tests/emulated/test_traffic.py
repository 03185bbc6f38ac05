"""The CUDA kernels read and write the rows that docs/ops says, counted by the emulator.

It counts every access, so a row that is read twice counts twice. Weights and numbers per row are not
counted as rows; partial sums of parameter gradients are, and get a column of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from ops.checks import EPS, routing_of
from ops.test_chain import glue, leaves_of
from ops.test_route import sizes

import pmod_ops
from pmod_ops.testing import LAYER, Sample

ops = torch.ops.pmod

HIDDEN = 4096
SAMPLE = Sample("traffic", ("t3 v34 t5",), hidden=HIDDEN)
PADDED = Sample("traffic_padded", ("t3 v20 t2", "v9 t2 .14"), hidden=HIDDEN, layout="padded")
DTYPES = (torch.float32, torch.bfloat16)
NONE = (None, None)  # no next router


class Layer:
    """The tensors of a routed layer, and others of the same shapes in place of gradients."""

    def __init__(self, dtype: torch.dtype, sample: Sample = SAMPLE) -> None:
        self.case = case = sample.make(dtype)
        routing = routing_of(case)
        plan = case.plan
        self.index, self.inverse = routing.index, routing.inverse
        self.logits, self.gate = routing.logits, routing.gate
        self.weight, self.norm = case.router_weight, case.norm_weight
        self.x, self.grad_x = case.x.clone(), case.x.flip(0)
        slots = self.index.shape[0]
        self.rows, self.update = (t.view(slots, HIDDEN) for t in (case.attn_out, case.update))
        self.rstd = torch.rand(slots)
        self.maps = (self.gate, self.inverse, self.index, plan.kind)
        *_, scale, _bias, activation = self.sizes = sizes(case)
        self.router_gate = (scale, activation)
        self.saved = (self.weight, self.logits, plan.kind, plan.cu_seqlens)
        # as in a chained layer: the gradient of the other rows' logits is done with
        self.grad_kept_gate = torch.where(self.inverse >= 0, self.gate, 0)
        self.n, self.k = plan.num_rows, plan.total_kept(LAYER)
        self.v = int((plan.kind == 1).sum())
        self.kept_v = self.k - int((plan.kind == 2).sum())

    def total(self, rows):
        """As a number of rows: of {"n": 1, "k": 2}, N + 2K."""
        return sum(count * getattr(self, size) for size, count in rows.items())

    def scatter(self, gate_mlp=True, scale_skipped=True, router=NONE, finite=False):
        """The arguments after x of the two forward ops."""
        return (self.rows, self.update, *self.maps, gate_mlp, scale_skipped, *router, finite)

    def scatter_backward(self, *flags, router=NONE, write_residual=False, zero_kept=False):
        return ops.weighted_scatter_add_backward(
            *(self.grad_x, self.x, self.update, *self.maps, *(flags or (True, True))),
            *(*router, *self.router_gate, write_residual, zero_kept),
        )

    def readers_backward(self, grad_gate, *grads, norm=True, overwrite=True):
        """The backward of route_gather; `grads`: of the rows, and other gradients of the kept."""
        norms = (self.norm, self.rstd) if norm else (None, self.rstd[:0])
        return ops.route_gather_backward_(
            *(self.grad_x, None, grad_gate, *grads, self.x, *self.saved, self.index, self.inverse),
            *(*norms, *self.router_gate, overwrite),
        )

    def copy_backward(self, accumulate):
        return ops.gather_backward_(self.grad_x, self.rows, self.index, accumulate)

    def norm_backward(self, accumulate):
        return ops.gather_rmsnorm_backward_(
            *(self.grad_x, self.rows, self.x, self.index, self.norm, self.rstd, accumulate)
        )

    def add_backward(self, grad_x=None, grad_residual=None, grad_out=None, accumulate=False):
        return ops.gather_add_rmsnorm_backward_(
            *(grad_x, grad_residual, grad_out, self.rows, self.update),
            *(self.index, self.norm, self.rstd, accumulate),
        )


Rows = dict[str, int]  # how many times each size of a Layer


@dataclass
class Call:
    """A call of an op, the rows that it moves, and what each gradient of a parameter is summed over."""

    name: str
    run: Callable[[Layer], object]
    read: Rows
    written: Rows
    summed: str = ""


FORWARD = (
    Call("score", lambda a: ops.route(a.x, a.weight, None, *a.sizes), {"v": 1}, {}),
    Call("select", lambda a: ops.select(a.logits, *a.sizes), {}, {}),
    Call("gather", lambda a: ops.gather(a.x, a.index), {"k": 1}, {"k": 1}),
    Call(
        "gather_rmsnorm",
        lambda a: ops.gather_rmsnorm(a.x, a.index, a.norm, EPS),
        {"k": 1},
        {"k": 1},
    ),
    Call(
        "gather_add_rmsnorm",
        lambda a: ops.gather_add_rmsnorm(a.x, a.rows, a.index, a.norm, EPS),
        {"k": 2},
        {"k": 2},
    ),
    Call(
        "route_gather",
        lambda a: ops.route_gather(a.x, a.weight, None, *a.sizes, a.norm, EPS),
        {"v": 1, "k": 1},
        {"k": 1},
    ),
    Call(
        "select_gather",
        lambda a: ops.select_gather(a.x, a.logits, *a.sizes, None, EPS),
        {"k": 1},
        {"k": 1},
    ),
    Call(
        "weighted_scatter_add",
        lambda a: ops.weighted_scatter_add(a.x, *a.scatter()),
        {"n": 1, "k": 1},
        {"n": 1},
    ),
    Call(
        "weighted_scatter_add, scored and checked",
        lambda a: ops.weighted_scatter_add(a.x, *a.scatter(router=(a.weight, None), finite=True)),
        {"n": 1, "k": 1},
        {"n": 1},
    ),
    Call(
        "weighted_scatter_add_",
        lambda a: ops.weighted_scatter_add_(a.x, *a.scatter()),
        {"n": 1, "k": 1},
        {"n": 1},
    ),
    Call(
        "weighted_scatter_add_, unscaled",
        lambda a: ops.weighted_scatter_add_(a.x, *a.scatter(scale_skipped=False)),
        {"k": 2},
        {"k": 1},
    ),
)

BACKWARD = (
    Call("gather", lambda a: a.copy_backward(False), {"k": 1}, {"k": 1}),
    Call("gather, added", lambda a: a.copy_backward(True), {"k": 2}, {"k": 1}),
    Call("gather_rmsnorm", lambda a: a.norm_backward(False), {"k": 2}, {"k": 1}, "k"),
    Call("gather_rmsnorm, added", lambda a: a.norm_backward(True), {"k": 3}, {"k": 1}, "k"),
    Call(
        "gather_add_rmsnorm, chained",
        lambda a: a.add_backward(grad_out=a.x),
        {"k": 3},
        {"k": 1},
        "k",
    ),
    Call(
        "gather_add_rmsnorm",
        lambda a: a.add_backward(a.grad_x, a.rows),
        {"k": 3},
        {"k": 2},
        "k",
    ),
    Call(
        "gather_add_rmsnorm, added",
        lambda a: a.add_backward(a.grad_x, a.rows, accumulate=True),
        {"k": 4},
        {"k": 2},
        "k",
    ),
    Call(
        "route",
        lambda a: ops.route_backward_(a.grad_x, None, a.gate, a.x, *a.saved, *a.router_gate),
        {"v": 2},
        {"v": 1},
        "n",
    ),
    Call(
        "route_gather, chained",
        lambda a: a.readers_backward(a.grad_kept_gate, a.rows, a.update),
        {"k": 3},
        {"k": 1},
        "nn",
    ),
    Call(
        "route_gather, copied rows",  # x is read for the router alone
        lambda a: a.readers_backward(a.grad_kept_gate, a.rows, a.update, norm=False),
        {"k": 2, "kept_v": 1},
        {"k": 1},
        "n",
    ),
    Call(
        "route_gather, skipped logits and added",
        lambda a: a.readers_backward(a.gate, a.rows, None, overwrite=False),
        {"k": 3, "v": 2, "kept_v": -2},
        {"k": 1, "v": 1, "kept_v": -1},
        "nn",
    ),
    # 2N but for the update of kept rows that no gate weighted
    Call(
        "weighted_scatter_add, chained",
        lambda a: a.scatter_backward(router=(a.weight, a.logits)),
        {"n": 1, "v": 1},
        {"n": 1},
        "n",
    ),
    Call(
        "weighted_scatter_add",
        lambda a: a.scatter_backward(write_residual=True, zero_kept=True),
        {"n": 1, "v": 1},
        {"n": 1, "k": 2},
    ),
    Call(
        "weighted_scatter_add, unweighted",
        lambda a: a.scatter_backward(False, False, write_residual=True),
        {"n": 1},
        {"n": 1, "k": 1},
    ),
)


def partial_rows(rows: int) -> int:
    """As parameter_partials of csrc/cuda/parameter_sum.cu: float rows written for one sum."""
    return min((rows + 3) // 4, 256)


def moved(emulated, layer: Layer, run: Callable[[Layer], object]) -> tuple[float, float]:
    """Rows read and written by a call."""
    row = HIDDEN * layer.x.element_size()
    emulated.reset_traffic()
    run(layer)
    read, written = emulated.traffic()
    return read / row, written / row


def float_rows(layer: Layer, rows: int) -> float:
    """Float rows, as so many rows of the layer's type."""
    return rows * 4 / layer.x.element_size()


def check(emulated, layer: Layer, call: Call) -> None:
    """Half a row is more than all integers, and 2 percent of any figure at most."""
    read, written = moved(emulated, layer, call.run)
    sums = float_rows(layer, sum(partial_rows(getattr(layer, size)) for size in call.summed))
    assert read == pytest.approx(layer.total(call.read), abs=0.5)
    assert written == pytest.approx(layer.total(call.written) + sums, abs=0.5)


def test_no_two_sizes_are_alike():
    layer = Layer(torch.float32)
    assert (layer.n, layer.k, layer.v, layer.kept_v) == (42, 25, 34, 17)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", FORWARD, ids=lambda call: call.name)
def test_forward(emulated, call, dtype):
    check(emulated, Layer(dtype), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", BACKWARD, ids=lambda call: call.name)
def test_backward(emulated, call, dtype):
    check(emulated, Layer(dtype), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filler_is_written_and_not_read(emulated, dtype):
    layer = Layer(dtype, PADDED)
    slots, k = layer.index.shape[0], layer.k
    assert slots > k
    by_name = {call.name: call for call in FORWARD}
    for name, times in (("gather", 1), ("gather_rmsnorm", 1), ("gather_add_rmsnorm", 2)):
        counted = moved(emulated, layer, by_name[name].run)
        assert counted == pytest.approx((times * k, times * slots), abs=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_a_layer(emulated, dtype):
    """3N + 4K rows for what is around attention and MLP, and 4K for the addition and norm between."""
    layer = Layer(dtype)
    leaves = leaves_of(layer.case)
    out = glue(pmod_ops, leaves, layer.case, True)
    read, written = moved(emulated, layer, lambda _: out.sum().backward())
    sums = float_rows(layer, 3 * partial_rows(layer.n) + partial_rows(layer.k))
    rows = read + written - sums
    assert rows <= 3 * layer.n + 4 * layer.k + 4 * layer.k
    assert rows >= 0.95 * (3 * layer.n + 8 * layer.k)  # else the backward was not the chained one
    assert all(leaf.grad is not None for leaf in leaves.values())
