"""Every op and every sample on CUDA tensors, forward and backward, and long selections."""

import os

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
from ops.checks import check_values, checkable, finite, routing_of, run
from ops.test_chain import check_layer

import pmod_ops
from pmod_ops.testing import LAYER, TABLE, Sample

DEVICE = os.environ.get("PMOD_TEST_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.cuda]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 rows are for the CPU
OPS = (
    test_gather.OP,
    test_gather_rmsnorm.OP,
    test_gather_add_rmsnorm.OP,
    test_route.OP,
    test_route_gather.OP,
    test_weighted_scatter_add.OP,
)
# One block per sequence up to 16,384 rows, several launches above.
LENGTHS = (576, 2880, 16384, 16385, 65536, 1_000_000)
REPEATS = 10
REPEATED = (*TABLE[3:5], Sample("many_blocks", ("t60 v576", "t60 v576"), hidden=4096))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_values(op, sample, dtype):
    check_values(op, sample, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", checkable(TABLE), ids=str)
def test_values_of_given_scores(sample, dtype):
    check_values(test_route_gather.GIVEN, sample, dtype, DEVICE)


@pytest.mark.parametrize("chained", [False, True], ids=["plain", "chained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_gradients_of_a_layer(sample, dtype, chained):
    check_layer(sample, dtype, chained, DEVICE)


def select(sample, logits, device):
    """Index and inverse for these logits, on a device."""
    plan = sample.plan(device)
    x = torch.zeros(plan.num_rows, 1, device=device)
    weight = torch.zeros(1, device=device)
    options = {"logits": logits.to(device), "layout": sample.layout}
    routing = pmod_ops.route(x, weight, None, plan, LAYER, **options)
    return routing.index.cpu(), routing.inverse.cpu()


def assert_selects_like_the_cpu(sample, logits):
    for ours, cpus in zip(
        select(sample, logits, DEVICE), select(sample, logits, "cpu"), strict=True
    ):
        assert torch.equal(ours, cpus)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", TABLE, ids=str)
def test_selection_of_a_sample(sample, dtype):
    assert_selects_like_the_cpu(sample, routing_of(sample.make(dtype)).logits)


def spread(kind, n):
    """Logits of a kind, always the same."""
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, generator=generator)
    if kind == "tied":
        return torch.zeros(n)
    if kind == "few":
        return torch.randint(-3, 4, (n,), generator=generator).float()
    if kind == "special":
        values = (torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45)
        which = torch.randint(0, 2 * len(values), (n,), generator=generator)
        for i, value in enumerate(values):
            logits[which == i] = value
    return logits


@pytest.mark.parametrize("ratio", [0.15, 0.85])
@pytest.mark.parametrize("kind", ["normal", "tied", "few", "special"])
@pytest.mark.parametrize("n", LENGTHS)
def test_selection(n, kind, ratio):
    sample = Sample("long", (f"v{n}",), ratio)
    assert_selects_like_the_cpu(sample, spread(kind, n))


@pytest.mark.parametrize("kind", ["normal", "few"])
@pytest.mark.parametrize(
    "sequences",
    [
        ("t9 v2880 t30", "v100", "t5", "t1 v16384"),
        ("t9 v40000 t30", "v100", "", "t1 v20000 t2"),
        ("v9000 | t5 v9000 | v40000 t7", "v300 | v20 t3"),
    ],
    ids=["short", "long", "pools"],
)
def test_selection_of_a_ragged_batch(sequences, kind):
    sample = Sample("ragged", sequences, 0.4)
    assert_selects_like_the_cpu(sample, spread(kind, sample.plan().num_rows))


@pytest.mark.parametrize("sample", REPEATED, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_repeats_are_bitwise_equal(op, sample):
    case = sample.make(torch.bfloat16, DEVICE)
    results = []
    for _ in range(REPEATS):
        outputs, grads = run(op, pmod_ops, case, routing_of(case))
        results.append((*outputs, *grads))
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert torch.equal(a, b)
