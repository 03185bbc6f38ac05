"""Gates and their slopes by the Triton kernels, against float64; the backward of what reads x."""

import pytest
import torch
from ops import test_route, test_route_gather
from ops.checks import routing_of, tensors

from pmod_ops._triton.gate import SOFTMAX
from pmod_ops.route import ACTIVATIONS
from pmod_ops.testing import Sample, assert_no_worse

INF, NAN = float("inf"), float("nan")
SIZES = torch.cat((torch.linspace(0, 12, 3001), torch.logspace(-38, 2, 2001)))
LOGITS = torch.cat((SIZES, -SIZES))
ROUTED = pytest.mark.parametrize("activation", ["none", "tanh", "sigmoid"])


def rows_of(logits, kind=None):
    """What pmod::select_backward takes of one sequence."""
    rows = logits.shape[0]
    kind = torch.ones(rows, dtype=torch.uint8) if kind is None else kind
    return logits, kind, torch.tensor([0, rows], dtype=torch.int32)


def gate(kernels, logits, activation, scale=1.0, bias=0.0):
    starts = torch.zeros(1, dtype=torch.int32)
    plan = (None, starts, starts, 0, logits.shape[0], scale, bias, ACTIVATIONS.index(activation))
    return kernels["select"](*rows_of(logits), *plan)[0]


def slope(kernels, logits, activation, grad=None):
    grad = torch.ones_like(logits) if grad is None else grad
    return kernels["select_backward"](grad, *rows_of(logits), 1.0, ACTIVATIONS.index(activation))


def eager(logits, activation):
    """Activation and slope, in the precision of the logits."""
    leaf = logits.clone().requires_grad_()
    function = {"none": lambda z: z * 1, "softmax": lambda z: z.softmax(0)}.get(activation)
    out = (function or getattr(torch, activation))(leaf)
    return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]


@ROUTED
def test_activations_and_slopes_are_as_near_as_those_of_eager(activation, kernels):
    exact, usual = (eager(z, activation) for z in (LOGITS.double(), LOGITS))
    assert_no_worse(gate(kernels, LOGITS, activation), usual[0], exact[0])
    assert_no_worse(slope(kernels, LOGITS, activation), usual[1], exact[1])


def test_tanh_is_near_where_it_is_small(kernels):
    """Relative to each value: two units, for three roundings and that of the polynomial."""
    exact = LOGITS.double().tanh()
    error = (gate(kernels, LOGITS, "tanh").double() - exact).abs()
    assert bool((error <= 2 * torch.finfo(torch.float32).eps * exact.abs()).all())


def test_exponentials_of_large_numbers_lose_no_digits(kernels):
    """Relative to each value, as far as they are normal numbers: sigmoid(-z) is about exp(-z)."""
    z = -torch.linspace(0, 87, 2001)
    exact = z.double().sigmoid()
    error = (gate(kernels, z, "sigmoid").double() - exact).abs()
    assert bool((error <= 2 * torch.finfo(torch.float32).eps * exact).all())


@pytest.mark.parametrize(
    ("activation", "expected"), [("tanh", [1, -1, NAN, 0]), ("sigmoid", [1, 0, NAN, 0.5])]
)
def test_infinities_and_nan(activation, expected, kernels):
    out = gate(kernels, torch.tensor([INF, -INF, NAN, 0.0]), activation)
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    slopes = slope(kernels, torch.tensor([INF, -INF, 3e38, -3e38, NAN]), activation)
    assert slopes[:4].tolist() == [0, 0, 0, 0]
    assert bool(slopes[4].isnan())


def test_softmax_and_its_gradient(kernels):
    generator = torch.Generator().manual_seed(0)
    logits, grad = 9 * torch.randn(2, 3000, generator=generator)
    logits[7] = -INF
    results = []
    for z in (logits, logits.double()):
        leaf = z.clone().requires_grad_()
        out = leaf.softmax(0)
        results.append((out.detach(), torch.autograd.grad(out, leaf, grad.to(z.dtype))[0]))
    ours = gate(kernels, logits, "softmax"), slope(kernels, logits, "softmax", grad)
    for a, b, c in zip(ours, *results, strict=True):
        assert_no_worse(a, b, c)
    assert ours[0][7] == 0


@pytest.mark.parametrize("logits", [[NAN, 1.0, 2.0], [INF, 1.0, 2.0], [-INF, -INF]], ids=str)
def test_a_softmax_of_nothing_finite_shows(logits, kernels):
    assert bool(gate(kernels, torch.tensor(logits), "softmax").isnan().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_are_not_routable_have_no_gradient(activation, kernels):
    kind = torch.tensor([1, 0, 2, 1], dtype=torch.uint8)
    logits, kind, bounds = rows_of(torch.tensor([1.0, NAN, INF, 2.0]), kind)
    grad = torch.tensor([1.0, NAN, NAN, 3.0])
    code = ACTIVATIONS.index(activation)
    out = kernels["select_backward"](grad, logits, kind, bounds, 0.5, code)
    expected = torch.ops.pmod.select_backward(grad, logits, kind, bounds, 0.5, code)
    assert out[[1, 2]].tolist() == [0, 0]
    assert bool(out[[0, 3]].isfinite().all())
    assert code == SOFTMAX.value or bool(out[0] != 0)
    # slopes of at most 1 times 3, each from a handful of roundings
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


BACKWARD = Sample("backward", ("t3 v20 t5", "v7 t2", ".2 v9"), ratio=0.4, hidden=48)


@pytest.mark.parametrize("raw", [test_route.raw, test_route_gather.raw], ids=["route", "gather"])
def test_backward_ops_equal_the_cpus_for_every_set_of_gradients(raw, kernels):
    case = BACKWARD.make()
    routing = routing_of(case)
    calls = raw(tensors(case, routing), routing, case)
    backward = [call for call in calls if "backward_" in str(call[0])]
    assert len(backward) >= 2
    for overload, (grad_x, *rest) in backward:
        ours, theirs = grad_x.clone(), grad_x.clone()
        name = overload.name().removeprefix("pmod::").partition(".")[0]
        results = (ours, *kernels[name](ours, *rest))
        for a, b in zip(results, (theirs, *overload(theirs, *rest)), strict=True):
            # sums of at most 48 terms in another order, each term rounded once more
            unit = torch.finfo(a.dtype).eps * (float(b.abs().max()) if b.numel() else 0)
            assert a.shape == b.shape
            assert not a.numel() or float((a - b).abs().max()) <= 48 * unit


def test_rows_without_a_gradient_are_not_read(kernels):
    """Infinities there reach no sum."""
    case = BACKWARD.make()
    routing = routing_of(case)
    x = case.x.clone()
    apart = (case.plan.kind == 0) | (routing.inverse < 0)
    x[apart] = INF
    logits, kind, bounds = routing.logits, case.plan.kind, case.plan.cu_seqlens
    grad_logits = torch.where(apart, 0, torch.ones_like(logits))
    grad_x, rows = torch.zeros_like(x), torch.ones(routing.index.shape[0], x.shape[1])
    saved = (x, case.router_weight, logits, kind, bounds, routing.index, routing.inverse)
    rest = (case.norm_weight, torch.ones(len(rows)), 0.2, 1, False)
    sums = kernels["route_gather_backward_"](grad_x, grad_logits, None, rows, None, *saved, *rest)
    assert all(bool(total.isfinite().all()) for total in (*sums, grad_x))
    assert not grad_x[apart].any()
