"""weighted_scatter_add writes every row once, weighted as p-MoD says."""

import dataclasses

import pytest
import torch
from ops.checks import (
    Op,
    check_compiled,
    check_gradients,
    check_opcheck,
    check_values,
    eager_dtype,
    finite,
    routing_of,
    tensors,
)

import pmod_ops
from pmod_ops import reference
from pmod_ops.testing import DTYPES, LAYER, TABLE, Sample, assert_no_worse, strided, unaligned


def raw(t, routing, case):
    hidden = t.x.shape[1]
    flags = [case.sample.scatter.get(name, True) for name in ("gate_mlp", "scale_skipped")]
    residual, update = t.residual.reshape(-1, hidden), t.update.reshape(-1, hidden)
    maps = (routing.inverse, routing.index, routing.kind)
    leaves = [s.detach().clone().requires_grad_() for s in (t.x, residual, update, t.gate)]
    router = (t.router_weight.clone(), case.router_bias)
    backward = (t.x.flip(0), t.x, update, t.gate, *maps, *flags)
    forward = torch.ops.pmod.weighted_scatter_add.default
    in_place = torch.ops.pmod.weighted_scatter_add_.default
    to_leaves = torch.ops.pmod.weighted_scatter_add_backward.default
    rows = (t.x.clone(), residual, update, t.gate)
    return [
        (forward, (*leaves, *maps, *flags, None, None, False)),
        (forward, (*rows, *maps, *flags, *router, True)),
        (in_place, (*rows, *maps, *flags, *router, False)),
        (in_place, (*rows, *maps, *flags, None, None, True)),
        (to_leaves, (*backward, None, None, 0.0, 0, True, True)),
        (to_leaves, (*backward, router[0], routing.logits, 0.2, 1, False, True)),
    ]


def public(module, t, routing, case):
    routing = dataclasses.replace(routing, gate=t.gate)
    return (module.weighted_scatter_add(t.x, t.residual, t.update, routing, **case.sample.scatter),)


OP = Op("weighted_scatter_add", ("x", "residual", "update", "gate"), public, raw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
def test_values(sample, dtype):
    check_values(OP, sample, dtype)


@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_opcheck(sample):
    check_opcheck(OP, sample)


@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_gradcheck(sample):
    # the selection is given, so tied logits do not matter
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
    routing = routing_of(case)
    out = pmod_ops.weighted_scatter_add(case.x, case.attn_out, case.update, routing)
    moved = [storage(t) for t in (case.x, case.attn_out, case.update)]
    assert torch.equal(out, pmod_ops.weighted_scatter_add(*moved, routing))
    pmod_ops.weighted_scatter_add_(moved[0], *moved[1:], routing)
    assert torch.equal(out, moved[0])


def test_each_kind_of_row_gets_its_rule():
    case = TABLE[5].make()
    routing = routing_of(case)
    x, kind, kept = case.x, case.plan.kind, routing.inverse >= 0
    residual = torch.full_like(case.attn_out, 10.0)
    update = torch.full_like(case.update, 2.0)
    out = pmod_ops.weighted_scatter_add(x, residual, update, routing)
    gate = routing.gate[:, None]
    assert torch.equal(out[kind == 0], x[kind == 0])
    assert torch.equal(out[kind == 2], torch.full_like(out[kind == 2], 12.0))
    skipped = (kind == 1) & ~kept
    assert skipped.any()
    assert torch.equal(out[skipped], (gate * x)[skipped])
    chosen = (kind == 1) & kept
    assert torch.equal(out[chosen], (10.0 + 2.0 * gate).expand_as(out)[chosen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
def test_in_place_twin_and_next_logits(sample, dtype):
    case = sample.make(dtype)
    routing = routing_of(case)
    t = tensors(case, routing)
    router = (t.router_weight.flip(0), t.router_bias)
    arguments = (t.residual, t.update, routing)
    out, logits = pmod_ops.weighted_scatter_add(
        t.x, *arguments, next_router=router, **sample.scatter
    )
    x = t.x.clone()
    in_place = pmod_ops.weighted_scatter_add_(x, *arguments, next_router=router, **sample.scatter)
    torch.testing.assert_close(x, out, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(in_place, logits, rtol=0, atol=0, equal_nan=True)
    # the logits are those of the rows as written, i.e. after rounding
    routable = case.plan.kind == 1

    def score(dtype):
        weight, bias = (None if r is None else r.to(dtype) for r in router)
        return torch.where(routable, reference.score(out.to(dtype), weight, bias), 0)

    eager = score(eager_dtype(dtype) or dtype)
    assert_no_worse(logits, eager, score(torch.float64), "next logits")


def test_next_logits_equal_those_of_route_bitwise():
    case = TABLE[1].make(torch.bfloat16)
    routing = routing_of(case)
    router = (case.router_weight, case.router_bias)
    out, logits = pmod_ops.weighted_scatter_add(
        case.x, case.attn_out, case.update, routing, next_router=router
    )
    assert torch.equal(logits, pmod_ops.route(out, *router, case.plan, LAYER).logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])
def test_finite_flag(dtype, in_place):
    case = TABLE[5].make(dtype)
    routing = routing_of(case)
    skipped = ((case.plan.kind == 1) & (routing.inverse < 0)).nonzero()[0]
    padding = (case.plan.kind == 0).nonzero()[0]
    huge = torch.finfo(dtype).max
    changes = {
        "nothing": (True, None, None),
        "padding": (True, padding, float("nan")),
        "skipped": (False, skipped, float("-inf")),
        "overflow": (False, skipped, huge),  # finite in x, infinite when weighted by 1.1
    }
    routing = dataclasses.replace(routing, gate=torch.full_like(routing.gate, 1.1))
    for name, (expected, row, value) in changes.items():
        for start in (True, False):
            results = []
            for module in (pmod_ops, reference):
                x, flag = case.x.clone(), torch.tensor([start])
                if row is not None:
                    x[row, 3] = value
                op = module.weighted_scatter_add_ if in_place else module.weighted_scatter_add
                op(x, case.attn_out, case.update, routing, finite=flag)
                results.append(bool(flag))
            assert results == [start and expected] * 2, name
    update = case.update.clone()
    update[..., -1, -1] = float("inf")
    flag = torch.tensor([True])
    x = case.x.clone().requires_grad_()
    pmod_ops.weighted_scatter_add(x, case.attn_out, update, routing, finite=flag)
    assert not flag


def test_next_logits_of_an_infinite_row_are_infinite():
    """Lanes beyond a row whose width is no multiple of a block stay out of its score."""
    case = Sample("infinite_gate", ("v4",), hidden=12, options={"activation": "none"}).make()
    logits = torch.tensor([float("inf"), 1.0, 2.0, 3.0])
    routing = pmod_ops.route(
        case.x, case.router_weight, None, case.plan, LAYER, logits=logits, activation="none"
    )
    x, rows = case.x.abs() + 1, case.update.abs() + 1
    router = (torch.ones(12), None)
    out, scores = pmod_ops.weighted_scatter_add(x, rows, rows, routing, next_router=router)
    assert torch.equal(scores, pmod_ops.route(out, *router, case.plan, LAYER).logits)
    assert scores[0] == float("inf")


def test_padding_is_copied_bitwise_even_nan():
    case = TABLE[5].make()
    padding = case.plan.kind == 0
    x = case.x.masked_fill(padding[:, None], float("nan"))
    out = pmod_ops.weighted_scatter_add(x, case.attn_out, case.update, routing_of(case))
    assert out[padding].isnan().all()
    assert out[~padding].isfinite().all()


def test_threads_do_not_change_a_bit():
    # several tasks of 64 KB
    case = Sample("threads", ("t2 v90 t1", "v60 t3"), hidden=4096).make(torch.bfloat16)
    routing = routing_of(case)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 8):
            torch.set_num_threads(number)
            leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.router_weight)]
            routing, rows, x = pmod_ops.route_gather(
                *leaves, None, case.plan, LAYER, case.norm_weight, return_x=True
            )
            out = pmod_ops.weighted_scatter_add(x, case.attn_out, rows, routing)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_next_router_under_autograd_is_refused():
    case = TABLE[0].make()
    x = case.x.requires_grad_()
    with pytest.raises(ValueError, match="next_router: expected None where gradients are recorded"):
        pmod_ops.weighted_scatter_add(
            x, case.attn_out, case.update, routing_of(case), next_router=(case.router_weight, None)
        )


def test_in_place_is_noticed_by_autograd():
    case = TABLE[0].make()
    weight = torch.ones(64, requires_grad=True)
    out = case.x * weight
    pmod_ops.weighted_scatter_add_(case.x, case.attn_out, case.update, routing_of(case))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_gate_of_another_dtype_is_named():
    case = TABLE[0].make()
    routing = routing_of(case)
    routing = dataclasses.replace(routing, gate=routing.gate.bfloat16())
    with pytest.raises(TypeError, match=r"routing\.gate: expected dtype float32, got bfloat16"):
        pmod_ops.weighted_scatter_add(case.x, case.attn_out, case.update, routing)


def test_in_place_under_autograd_is_refused_before_anything_is_written():
    case = TABLE[0].make()
    before = case.x.clone()
    update = case.update.requires_grad_()
    with pytest.raises(ValueError, match="weighted_scatter_add_: x: expected tensors that need no"):
        pmod_ops.weighted_scatter_add_(case.x, case.attn_out, update, routing_of(case))
    assert torch.equal(case.x, before)


def test_in_place_on_shared_memory_is_refused():
    case = TABLE[0].make()
    rows = case.attn_out.shape[0]
    with pytest.raises(ValueError, match="update: expected memory of its own, got memory of x"):
        pmod_ops.weighted_scatter_add_(case.x, case.attn_out, case.x[:rows], routing_of(case))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": torch.zeros(25, 64)}, ValueError, r"residual: expected shape \[26, 64\], got \[25, 64\]"),
        ({"update": torch.zeros(26, 64).half()}, TypeError, "update: expected dtype float32, got float16"),
        ({"next_router": torch.zeros(64)}, TypeError, r"next_router: expected a tuple \(weight, bias\)"),
        ({"next_router": (torch.zeros(3), None)}, ValueError, r"next_router\[0\]: expected shape \[64\]"),
        ({"finite": torch.ones(1)}, TypeError, "finite: expected dtype bool, got float32"),
        ({"finite": torch.ones(2).bool()}, ValueError, r"finite: expected shape \[1\], got \[2\]"),
        ({"routing": None}, TypeError, "routing: expected a Routing, got NoneType"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    case = TABLE[0].make()
    arguments = {
        "x": case.x,
        "residual": case.attn_out,
        "update": case.update,
        "routing": routing_of(case),
        **change,
    }
    with pytest.raises(error, match=f"pmod_ops.weighted_scatter_add: {message}"):
        pmod_ops.weighted_scatter_add(**arguments)
