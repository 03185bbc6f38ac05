"""Every op and every sample on the emulated CUDA kernels, forward and backward."""

import dataclasses

import pytest
import torch
from ops import (
    test_gather,
    test_gather_add_rmsnorm,
    test_gather_rmsnorm,
    test_route,
    test_route_gather,
    test_weighted_scatter_add,
)
from ops.checks import check_values, routing_of, tensors

import pmod_ops
from pmod_ops import reference
from pmod_ops.route import scratch_bytes
from pmod_ops.testing import LAYER, TABLE, strided, unaligned

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 rows are for the CPU
OPS = (
    test_gather.OP,
    test_gather_rmsnorm.OP,
    test_gather_add_rmsnorm.OP,
    test_route.OP,
    test_route_gather.OP,
    test_weighted_scatter_add.OP,
)
GIVEN = test_route_gather.GIVEN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_values(op, sample, dtype):
    check_values(op, sample, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", test_route_gather.SCORED, ids=str)
def test_values_of_given_scores(sample, dtype):
    check_values(GIVEN, sample, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
def test_selection(sample, dtype):
    test_route.test_selection_is_a_stable_sort_of_the_ops_own_logits(sample, dtype)


@pytest.mark.parametrize("sample", TABLE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_equals_the_cpus(sample, dtype, simt):
    """Bit for bit, given the same logits."""
    case = sample.make(dtype)
    logits = routing_of(case).logits
    index, inverse = reference.select(logits, case.plan, LAYER)
    expected = dataclasses.replace(routing_of(case), index=index, inverse=inverse, layout="packed")
    expected = expected.padded() if sample.layout == "padded" else expected
    routing = pmod_ops.route(
        case.x,
        case.router_weight,
        None,
        case.plan,
        LAYER,
        logits=logits,
        layout=sample.layout,
        **sample.gate,
    )
    assert torch.equal(routing.index, expected.index)
    assert torch.equal(routing.inverse, expected.inverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [unaligned, strided], ids=["unaligned", "strided"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_storage_does_not_matter(op, storage, dtype):
    """Rows that are not aligned take another path: the values agree within rounding."""
    case = TABLE[0].make(dtype)
    routing = routing_of(case)
    t = tensors(case, routing)
    moved = {
        field.name: storage(value)
        for field in dataclasses.fields(t)
        if (value := getattr(t, field.name)) is not None and field.name != "gate"
    }
    usual = op.public(pmod_ops, t, routing, case)
    other = op.public(pmod_ops, dataclasses.replace(t, **moved), routing, case)
    for a, b in zip(usual, other, strict=True):
        # one unit in the last place of the largest entry: another order of summation
        unit = torch.finfo(a.dtype).eps * float(a.abs().max())
        assert float((a - b).abs().max()) <= 2 * unit


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_any_schedule_gives_the_same_bits(op, simt):
    case = TABLE[4].make(torch.bfloat16)
    results = []
    for seed in (0, 1, 2, 3):
        simt.set_schedule(seed=seed)
        routing = routing_of(case)
        t = tensors(case, routing)
        leaves = [getattr(t, n).requires_grad_() for n in op.leaves if getattr(t, n) is not None]
        outputs = op.public(pmod_ops, t, routing, case)
        loss = torch.stack([out.float().square().sum() for out in outputs]).sum()
        results.append((*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)))
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("max_length", [0, 1, 16384, 16385, 1 << 20])
@pytest.mark.parametrize(
    ("rows", "sequences", "pools"), [(0, 0, 0), (70000, 3, 3), (1 << 20, 1, 64)]
)
def test_the_fake_knows_the_scratch_of_the_kernels(rows, sequences, pools, max_length, simt):
    expected = simt.select_scratch_bytes(rows, sequences, pools, max_length)
    assert scratch_bytes(rows, sequences, pools, max_length) == expected
