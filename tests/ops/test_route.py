"""route keeps what a stable sort of its own logits keeps, and its gate has the gradient of the gate."""

import dataclasses
import itertools

import pytest
import torch
from ops.checks import (
    Op,
    check_compiled,
    check_gradients,
    check_opcheck,
    check_values,
    finite,
    routing_of,
)

import pmod_ops
from pmod_ops import RoutingPlan, reference
from pmod_ops.route import ACTIVATIONS
from pmod_ops.testing import DTYPES, LAYER, TABLE, Sample, assert_no_worse, strided, unaligned


def sizes(case):
    sample, plan = case.sample, case.plan
    gate = {"gate_scale": 0.2, "gate_bias": 1.0, "activation": "tanh", **sample.gate}
    return (
        plan.kind,
        plan.cu_seqlens,
        plan.pool_id,
        plan.k(LAYER),
        plan.slot_start(LAYER, sample.layout),
        plan.num_slots(LAYER, sample.layout),
        plan.max_length,
        gate["gate_scale"],
        gate["gate_bias"],
        ACTIVATIONS.index(gate["activation"]),
    )


def raw(t, routing, case):
    *_, scale, _, activation = sizes(case)
    plan = case.plan
    gate = (routing.logits, plan.kind, plan.cu_seqlens, scale, activation)
    leaves = [
        None if leaf is None else leaf.clone().requires_grad_()
        for leaf in (t.x, t.router_weight, t.router_bias)
    ]
    return [
        (torch.ops.pmod.route.default, (*leaves, *sizes(case))),
        (torch.ops.pmod.select.default, (routing.logits.clone().requires_grad_(), *sizes(case))),
        (
            torch.ops.pmod.route_backward_.default,
            (torch.ones_like(t.x), None, t.gate, t.x, t.router_weight, *gate),
        ),
        (
            torch.ops.pmod.route_backward_.default,
            (torch.ones_like(t.x), t.gate, None, t.x, t.router_weight, *gate),
        ),
        (torch.ops.pmod.select_backward.default, (t.gate, *gate)),
    ]


def public(module, t, routing, case):
    router = (t.router_weight, t.router_bias)
    layout = case.sample.layout
    routing = module.route(t.x, *router, case.plan, LAYER, layout=layout, **case.sample.gate)
    return routing.logits, routing.gate


OP = Op("route", ("x", "router_weight", "router_bias"), public, raw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
def test_values(sample, dtype):
    check_values(OP, sample, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
def test_selection_is_a_stable_sort_of_the_ops_own_logits(sample, dtype):
    case = sample.make(dtype)
    routing = routing_of(case)
    index, inverse = reference.select(routing.logits, case.plan, LAYER)
    expected = dataclasses.replace(routing, index=index, inverse=inverse, layout="packed")
    expected = expected.padded() if sample.layout == "padded" else expected
    assert torch.equal(routing.index, expected.index)
    assert torch.equal(routing.inverse, expected.inverse)


@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_opcheck(sample):
    check_opcheck(OP, sample)


@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_gradcheck(sample):
    # logits and gate do not depend on which rows are selected, so ties do not matter
    check_gradients(OP, sample)


@pytest.mark.compile
@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_compile_aot_eager(sample):
    check_compiled(OP, sample, "aot_eager")


@pytest.mark.compile
def test_compile_inductor():
    check_compiled(OP, TABLE[0], "inductor")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [unaligned, strided], ids=["unaligned", "strided"])
def test_storage_does_not_matter(storage, dtype):
    case = TABLE[4].make(dtype)
    other = dataclasses.replace(case, x=storage(case.x), router_weight=storage(case.router_weight))
    a, b = routing_of(case), routing_of(other)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.index, b.index)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("logits", "k", "kept"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, 1.0, 0.0, 1.0], 3, [0, 1, 3]),
        ([-0.0, 0.0, -0.0, 0.0], 2, [0, 1]),
        ([0.0, -0.0, 0.0], 1, [0]),
        ([NAN, 1.0, INF, 2.0], 2, [0, 2]),
        ([1.0, -NAN, 3.0, NAN], 2, [1, 3]),
        ([NAN, NAN, NAN], 2, [0, 1]),
        ([-INF, -INF, -1e38], 2, [0, 2]),
        ([-INF, INF, 5.0], 1, [1]),
        ([1e-45, -1e-45, 0.0], 2, [0, 2]),
        ([3.0, 2.0, 1.0], 0, []),
        ([3.0, 2.0, 1.0], 3, [0, 1, 2]),
    ],
)
def test_ties_nan_and_infinities(logits, k, kept, dtype):
    n = len(logits)
    plan = RoutingPlan.from_counts(
        torch.ones(n, dtype=torch.uint8), [0, n], [n], [0], {0: (k + 0.5) / n if k < n else 1.0}
    )
    x = torch.zeros(n, 4, dtype=dtype)
    given = torch.tensor(logits, dtype=dtype)
    routing = pmod_ops.route(x, torch.zeros(4, dtype=dtype), None, plan, 0, logits=given)
    assert routing.index.tolist() == kept


def test_every_nan_payload_ranks_highest():
    bits = torch.tensor([0x7F800001, 0x7FC00000, -1, 0x7FFFFFFF], dtype=torch.int32)
    logits = torch.cat((torch.tensor([INF, 3e38]), bits.view(torch.float32)))
    plan = RoutingPlan.from_counts(torch.ones(6, dtype=torch.uint8), [0, 6], [6], [0], {0: 4.5 / 6})
    routing = pmod_ops.route(torch.zeros(6, 2), torch.zeros(2), None, plan, 0, logits=logits)
    assert routing.index.tolist() == [2, 3, 4, 5]


def test_all_small_selections_of_three_values():
    for values in itertools.product([-1.0, 0.0, 1.0], repeat=5):
        logits = torch.tensor(values)
        for k in range(6):
            plan = RoutingPlan.from_counts(
                torch.ones(5, dtype=torch.uint8), [0, 5], [5], [0], {0: min(1.0, (k + 0.1) / 5)}
            )
            _, index, *_ = torch.ops.pmod.select(
                logits,
                plan.kind,
                plan.cu_seqlens,
                None,
                plan.k(0),
                plan.slot_start(0),
                k,
                5,
                1.0,
                1.0,
                1,
            )
            best = torch.sort(logits, descending=True, stable=True).indices[:k]
            assert index.tolist() == sorted(best.tolist())


def test_a_million_rows():
    n = 1_000_000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 1000, (n,), generator=generator).float()
    plan = RoutingPlan.from_counts(torch.ones(n, dtype=torch.uint8), [0, n], [n], [0], {0: 0.3})
    routing = pmod_ops.route(torch.zeros(n, 1), torch.zeros(1), None, plan, 0, logits=logits)
    best = torch.sort(logits, descending=True, stable=True).indices[: plan.total_kept(0)]
    assert torch.equal(routing.index.long(), best.sort().values)


@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_given_logits_select_and_gate_like_scored_ones(sample):
    case = sample.make(torch.bfloat16)
    scored = routing_of(case)
    given = pmod_ops.route(
        case.x,
        case.router_weight,
        case.router_bias,
        case.plan,
        LAYER,
        logits=scored.logits,
        layout=sample.layout,
        **sample.gate,
    )
    assert torch.equal(given.index, scored.index)
    assert torch.equal(given.gate, scored.gate)


def test_gradient_reaches_given_logits():
    case = TABLE[0].make(torch.float64)
    logits = routing_of(case).logits.requires_grad_()

    def gate(logits):
        weights = case.router_weight, case.router_bias
        return pmod_ops.route(case.x, *weights, case.plan, LAYER, logits=logits).gate

    assert torch.autograd.gradcheck(gate, logits)


def test_rows_that_are_not_routable_have_gate_one_and_no_gradient():
    case = TABLE[5].make()
    x = case.x.clone().requires_grad_()
    routing = pmod_ops.route(x, case.router_weight, case.router_bias, case.plan, LAYER)
    other = case.plan.kind != 1
    assert bool((routing.gate[other] == 1).all())
    routing.gate.sum().backward()
    assert not x.grad[other].any()
    assert x.grad[~other].any()


def test_parameter_gradients_of_many_rows_stay_accurate():
    # a running float32 sum over 100,000 rows would lose three digits
    x = torch.randn(100_000, 8)
    plan = RoutingPlan.from_mask(torch.ones(1, 100_000, dtype=torch.bool), None, {0: 0.3})
    cotangent = torch.randn(100_000)

    def gradients(module, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, torch.ones(8) / 8, torch.zeros(1))]
        gate = module.route(*leaves, plan, 0).gate
        return torch.autograd.grad((gate * cotangent.to(dtype)).sum(), leaves)

    exact = gradients(reference, torch.float64)
    eager = gradients(reference, torch.float32)
    for a, b, c in zip(gradients(pmod_ops, torch.float32), eager, exact, strict=True):
        assert_no_worse(a, b, c)


def test_threads_do_not_change_a_bit():
    # several tasks of 64 KB, several pools
    case = Sample("threads", ("t2 v90 t1 | v50", "v60 t3"), hidden=4096).make(torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 8):
            torch.set_num_threads(number)
            results.append(routing_of(case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0].logits, other.logits)
        assert torch.equal(results[0].index, other.index)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"router_weight": torch.zeros(63)}, ValueError, r"router_weight: expected shape \[64\], got \[63\]"),
        ({"router_weight": torch.zeros(64).bfloat16()}, TypeError, "router_weight: expected dtype float32, got bfloat16"),
        ({"router_bias": torch.zeros(2)}, ValueError, "router_bias: expected one element"),
        ({"layer": 9}, ValueError, r"layer: expected one of \[3\], got 9"),
        ({"activation": "relu"}, ValueError, "activation: expected one of none, tanh, sigmoid, softmax, got 'relu'"),
        ({"gate_scale": NAN}, ValueError, "gate_scale: expected a finite number, got nan"),
        ({"layout": "ragged"}, ValueError, "layout: expected 'packed' or 'padded', got 'ragged'"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits: expected shape \[44\], got \[3\]"),
        ({"x": torch.zeros(43, 64)}, ValueError, "plan: expected one made for the 43 rows of x, got 44 rows"),
        ({"x": torch.zeros(44, 64, device="meta")}, ValueError, "plan: expected device meta like x, got cpu"),
        ({"x": torch.zeros(64)}, ValueError, "x: expected 2 or 3 dimensions"),
        ({"x": torch.zeros(44, 64).to_sparse()}, ValueError, "x: expected a dense tensor"),
        ({"plan": None}, TypeError, "plan: expected a RoutingPlan, got NoneType"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    case = TABLE[0].make()
    arguments = {
        "x": case.x,
        "router_weight": case.router_weight,
        "router_bias": case.router_bias,
        "plan": case.plan,
        "layer": LAYER,
        **change,
    }
    with pytest.raises(error, match=f"pmod_ops.route: {message}"):
        pmod_ops.route(**arguments)
