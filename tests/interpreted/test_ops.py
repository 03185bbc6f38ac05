"""Every op and every sample on the Triton kernels, forward and backward."""

import dataclasses

import pytest
import torch
from ops import (
    test_chain,
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
from pmod_ops.testing import LAYER, TABLE, strided, unaligned

pytestmark = pytest.mark.usefixtures("interpreted")

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
LAYERS = (
    "batch",
    "pad_right",
    "k_zero",
    "pools_padded",
    "hidden_17",
    "sigmoid",
    "softmax",
    "unscaled",
)
SCATTER = test_weighted_scatter_add
FEW_ROWS = 60  # a program takes about a millisecond


def in_types(samples):
    """Every sample in every type; those of more rows, which differ in size alone, in one."""
    pairs = [
        pytest.param(sample, dtype, id=f"{sample}-{dtype}")
        for sample in samples
        for dtype in (DTYPES if sample.plan().num_rows <= FEW_ROWS else DTYPES[1:2])
    ]
    return pytest.mark.parametrize(("sample", "dtype"), pairs)


@in_types(TABLE)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_values(op, sample, dtype):
    check_values(op, sample, dtype)


@in_types(test_route_gather.SCORED)
def test_values_of_given_scores(sample, dtype):
    check_values(GIVEN, sample, dtype)


@in_types(TABLE)
def test_selection(sample, dtype):
    test_route.test_selection_is_a_stable_sort_of_the_ops_own_logits(sample, dtype)


@in_types(TABLE)
def test_selection_equals_the_references(sample, dtype):
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
        assert torch.equal(a, b)


@pytest.mark.parametrize("chained", [False, True], ids=["plain", "chained"])
@in_types([sample for sample in TABLE if sample.name in LAYERS])
def test_gradients_of_a_layer(sample, dtype, chained):
    test_chain.check_layer(sample, dtype, chained)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_reader_hands_x_on(dtype):
    test_chain.test_every_reader_hands_x_on(dtype)


@in_types(TABLE)
def test_in_place_twin_and_next_logits(sample, dtype):
    SCATTER.test_in_place_twin_and_next_logits(sample, dtype)


@pytest.mark.parametrize(
    "check",
    [
        SCATTER.test_next_logits_equal_those_of_route_bitwise,
        SCATTER.test_next_logits_of_an_infinite_row_are_infinite,
        SCATTER.test_padding_is_copied_bitwise_even_nan,
        SCATTER.test_each_kind_of_row_gets_its_rule,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_rules_of_weighted_scatter_add(check):
    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])
def test_finite_flag(dtype, in_place):
    SCATTER.test_finite_flag(dtype, in_place)
