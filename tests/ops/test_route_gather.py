"""route_gather equals route followed by gather or gather_rmsnorm."""

import dataclasses

import pytest
import torch
from ops.checks import (
    EPS,
    Op,
    check_compiled,
    check_gradients,
    check_opcheck,
    check_values,
    checkable,
    finite,
    routing_of,
)
from ops.test_route import sizes

import pmod_ops
from pmod_ops import reference
from pmod_ops.testing import DTYPES, LAYER, TABLE


def raw(t, routing, case):
    *_, scale, _, activation = sizes(case)
    calls = []
    for norm in (t.norm_weight, None):
        leaves = [
            None if leaf is None else leaf.clone().requires_grad_()
            for leaf in (t.x, t.router_weight, t.router_bias, norm)
        ]
        arguments = (*leaves[:3], *sizes(case), leaves[3], EPS)
        calls.append((torch.ops.pmod.route_gather.default, arguments))
        with torch.no_grad():
            logits, gate, index, inverse, rows, rstd, _ = torch.ops.pmod.route_gather(*arguments)
        given = logits.clone().requires_grad_()
        arguments = (leaves[0], given, *sizes(case), leaves[3], EPS)
        calls.append((torch.ops.pmod.select_gather.default, arguments))
        saved = (t.x, t.router_weight, logits, case.plan.kind, case.plan.cu_seqlens, index, inverse)
        kept = rows.clone()
        for *grads, overwrite in (
            (gate, gate, rows, kept, False),
            (None, gate, None, None, False),
            (None, None, rows, None, False),
            (None, gate, rows, kept, True),
            (None, None, None, kept, True),
        ):
            gates = (scale, activation, overwrite)
            backward = (torch.ones_like(t.x), *grads, *saved, norm, rstd, *gates)
            calls.append((torch.ops.pmod.route_gather_backward_.default, backward))
    return calls


def frozen(t, routing, case):
    """The specification, for the rows that the op selected."""
    router = (t.router_weight, t.router_bias)
    own = reference.route(t.x, *router, case.plan, LAYER, **case.sample.gate)
    routing = dataclasses.replace(routing, logits=own.logits, gate=own.gate)
    rows = reference.gather_rmsnorm(t.x, routing, t.norm_weight, EPS)
    return routing.logits, routing.gate, rows


def public(module, t, routing, case):
    if module is reference:
        return frozen(t, routing, case)
    routing, rows = module.route_gather(
        t.x,
        t.router_weight,
        t.router_bias,
        case.plan,
        LAYER,
        t.norm_weight,
        EPS,
        layout=case.sample.layout,
        **case.sample.gate,
    )
    return routing.logits, routing.gate, rows


OP = Op("route_gather", ("x", "router_weight", "router_bias", "norm_weight"), public, raw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
def test_values(sample, dtype):
    check_values(OP, sample, dtype)


@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_opcheck(sample):
    check_opcheck(OP, sample)


@pytest.mark.parametrize("sample", checkable(TABLE), ids=str)
def test_gradcheck(sample):
    check_gradients(OP, sample)


@pytest.mark.compile
@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_compile_aot_eager(sample):
    check_compiled(OP, sample, "aot_eager")


@pytest.mark.compile
def test_compile_inductor():
    check_compiled(OP, TABLE[0], "inductor")


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("sample", TABLE, ids=str)
def test_equals_its_two_halves_bitwise(sample, normed):
    case = sample.make(torch.bfloat16)
    routing = routing_of(case)
    together, rows = pmod_ops.route_gather(
        case.x,
        case.router_weight,
        case.router_bias,
        case.plan,
        LAYER,
        case.norm_weight if normed else None,
        EPS,
        layout=sample.layout,
        **sample.gate,
    )
    if normed:
        apart = pmod_ops.gather_rmsnorm(case.x, routing, case.norm_weight, EPS)
    else:
        apart = pmod_ops.gather(case.x, routing)
    assert torch.equal(together.index, routing.index)
    assert rows.shape == apart.shape
    torch.testing.assert_close(together.gate, routing.gate, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rows, apart, rtol=0, atol=0, equal_nan=True)


def given(module, t, routing, case):
    """The op for scores that are there: those of the routing, as a leaf."""
    arguments = (case.plan, LAYER, t.norm_weight, EPS)
    options = {"layout": case.sample.layout, **case.sample.gate}
    if module is reference:  # for the rows that the op selected
        own = reference.route(t.x, None, None, case.plan, LAYER, logits=t.gate, **case.sample.gate)
        chosen = dataclasses.replace(routing, gate=own.gate)
        return own.gate, reference.gather_rmsnorm(t.x, chosen, t.norm_weight, EPS)
    chosen, rows = module.route_gather(t.x, None, None, *arguments, logits=t.gate, **options)
    return chosen.gate, rows


# The leaf `gate` serves as the scores: the gate itself is an output here.
GIVEN = Op("select_gather", ("x", "gate", "norm_weight"), given, raw)


# Not a single column: its norm is a sign, and the weight's gradient a sum of signs that cancels.
SCORED = [sample for sample in checkable(TABLE) if sample.hidden > 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SCORED, ids=str)
def test_values_of_given_scores(sample, dtype):
    check_values(GIVEN, sample, dtype)


@pytest.mark.parametrize("sample", checkable(TABLE), ids=str)
def test_gradcheck_of_given_scores(sample):
    check_gradients(GIVEN, sample)


@pytest.mark.parametrize("chained", [False, True])
def test_given_logits_are_used(chained):
    case = TABLE[0].make()
    logits = -routing_of(case).logits
    x = case.x.clone().requires_grad_(chained)
    arguments = (x, case.router_weight, None, case.plan, LAYER, case.norm_weight)
    routing, rows, passed = pmod_ops.route_gather(*arguments, logits=logits, return_x=True)
    index, _ = reference.select(logits, case.plan, LAYER)
    assert routing.logits is logits
    assert torch.equal(routing.index, index)
    assert torch.equal(rows, pmod_ops.gather_rmsnorm(case.x, routing, case.norm_weight))
    assert torch.equal(passed, case.x)
    if chained:
        (rows.sum() + passed.sum()).backward()
        leaf = case.x.clone().requires_grad_()
        (pmod_ops.gather_rmsnorm(leaf, routing, case.norm_weight).sum() + leaf.sum()).backward()
        assert torch.equal(x.grad, leaf.grad)


def test_batch_layout_is_the_same_memory():
    case = TABLE[5].make()
    args = (case.router_weight, case.router_bias, case.plan, LAYER, case.norm_weight)
    _, rows = pmod_ops.route_gather(case.x, *args, layout="padded")
    _, batched = pmod_ops.route_gather(case.x.view(3, 28, -1), *args, layout="padded")
    assert torch.equal(rows, batched)
