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
            logits, gate, index, inverse, rows, rstd = torch.ops.pmod.route_gather(*arguments)
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


def test_given_logits_are_used():
    case = TABLE[0].make()
    logits = -routing_of(case).logits
    routing, rows = pmod_ops.route_gather(
        case.x, case.router_weight, None, case.plan, LAYER, case.norm_weight, logits=logits
    )
    index, _ = reference.select(logits, case.plan, LAYER)
    assert torch.equal(routing.index, index)
    assert torch.equal(rows, pmod_ops.gather_rmsnorm(case.x, routing, case.norm_weight))


def test_batch_layout_is_the_same_memory():
    case = TABLE[5].make()
    args = (case.router_weight, case.router_bias, case.plan, LAYER, case.norm_weight)
    _, rows = pmod_ops.route_gather(case.x, *args, layout="padded")
    _, batched = pmod_ops.route_gather(case.x.view(3, 28, -1), *args, layout="padded")
    assert torch.equal(rows, batched)
