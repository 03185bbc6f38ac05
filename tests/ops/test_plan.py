"""RoutingPlan: budgets known on the host, one upload, errors that name the argument."""

import pytest
import torch
from torch.utils import _pytree as pytree

import pmod_ops
from pmod_ops import RoutingPlan


def masks():
    target = torch.zeros(3, 10, dtype=torch.bool)
    target[0, 2:8] = True
    target[1, 1:8] = True
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[1, 6:] = False
    return target, valid


def test_counts_of_a_padded_batch():
    plan = RoutingPlan.from_mask(*masks(), {4: 0.5, 7: 0.0, 9: 1.0})
    assert plan.layers == (4, 7, 9)
    assert plan.k(4).tolist() == [3, 2, 0]
    assert plan.kept_per_sequence(4) == (7, 3, 10)
    assert plan.cu_kept(4).tolist() == [0, 7, 10, 20]
    assert plan.total_kept(4) == 20
    assert plan.max_kept(4) == 10
    assert plan.slot_start(4, "padded").tolist() == [3, 17, 20]
    assert plan.num_slots(4, "padded") == 30
    assert plan.kept_per_sequence(7) == (4, 1, 10)
    assert plan.kept_per_sequence(9) == (10, 6, 10)
    assert plan.kind.view(3, 10)[1].tolist() == [2, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_integer_masks_mean_the_same():
    target, valid = masks()
    plan = RoutingPlan.from_mask(target, valid, {0: 0.5})
    other = RoutingPlan.from_mask(target, valid.long(), {0: 0.5})
    assert torch.equal(plan.kind, other.kind)
    assert plan.kept == other.kept


@pytest.mark.parametrize(
    ("n", "ratio", "k"),
    # in float64 the first two would truncate to 1007 and 1807
    [(2880, 0.35, 1008), (2365, 0.7644820051634812, 1808), (576, 0.5, 288), (7, 0.5, 3)],
)
def test_budget_is_a_float32_product_truncated(n, ratio, k):
    plan = RoutingPlan.from_mask(torch.ones(1, n, dtype=torch.bool), None, {0: ratio})
    assert plan.total_kept(0) == k == int(torch.tensor(n, dtype=torch.int32) * ratio)


def test_pools_never_cross_sequences():
    target, valid = masks()
    pool = torch.zeros(3, 10, dtype=torch.long)
    pool[0, 5:] = 70
    plan = RoutingPlan.from_mask(target, valid, {0: 0.5}, pool_id=pool)
    assert plan.num_pools == 3
    assert plan.k(0).tolist() == [1, 1, 2]
    assert plan.pool_id.view(3, 10)[0, 2:8].tolist() == [0, 0, 0, 1, 1, 1]
    assert plan.pool_id.view(3, 10)[1, 1:6].tolist() == [2] * 5


def test_counts_given_by_the_host_make_the_same_plan():
    target, valid = masks()
    plan = RoutingPlan.from_mask(target, valid, {0: 0.3, 1: 0.6})
    other = RoutingPlan.from_counts(
        plan.kind, [0, 10, 20, 30], [6, 5, 0], [4, 1, 10], {0: 0.3, 1: 0.6}
    )
    for a, b in zip(pytree.tree_leaves(plan), pytree.tree_leaves(other), strict=True):
        assert (a is b is None) or torch.equal(a, b)
    assert plan.kept == other.kept


def test_empty_batch():
    plan = RoutingPlan.from_mask(torch.zeros(0, 5, dtype=torch.bool), None, {0: 0.5})
    assert plan.num_sequences == plan.total_kept(0) == plan.max_kept(0) == 0


def test_plan_is_a_pytree():
    plan = RoutingPlan.from_mask(*masks(), {4: 0.5})
    leaves, spec = pytree.tree_flatten(plan)
    again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))
    assert again.kept == plan.kept
    assert again.layers == plan.layers
    assert torch.equal(again.k(4), plan.k(4))


def test_which_package_is_tested():
    assert pmod_ops.backend_info()["devices"]["cpu"].startswith("C++")


ONES = torch.ones(2, 3, dtype=torch.bool)
KIND = torch.tensor([1, 1, 2], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ONES.long(),), TypeError, "target_mask: expected dtype bool, got int64"),
        ((ONES[0],), ValueError, r"target_mask: expected 2 dimensions, got shape \[3\]"),
        ((ONES, ONES.float()), TypeError, "valid_mask: expected dtype bool or uint8"),
        ((ONES, ONES[:, :2]), ValueError, r"valid_mask: expected shape \[2, 3\], got \[2, 2\]"),
        ((ONES, None, {0: 1.2}), ValueError, r"ratios\[0\]: expected a number in \[0, 1\], got 1.2"),
        ((ONES, None, {0: -0.1}), ValueError, r"ratios\[0\]: expected a number in \[0, 1\], got -0.1"),
        ((ONES, None, {0: float("nan")}), ValueError, r"ratios\[0\]: expected a number in \[0, 1\], got nan"),
        ((ONES, None, {0: "0.5"}), TypeError, r"ratios\[0\]: expected a number in \[0, 1\], got '0.5'"),
        ((ONES, None, {-1: 0.5}), ValueError, "ratios: expected layer indices >= 0 as keys, got -1"),
        ((ONES, None, {0: 0.5}, ONES), TypeError, "pool_id: expected dtype uint8 or"),
    ],
)  # fmt: skip
def test_bad_masks_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        RoutingPlan.from_mask(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((KIND, [0, 3], [2, 0], [1], {}), ValueError, "routable_per_pool: expected 1 entries"),
        ((KIND, [0, 3], [-2], [1], {}), ValueError, r"routable_per_pool\[0\]: expected a count >= 0, got -2"),
        ((KIND, [0, 3], [1], [1], {}), ValueError, r"routable_per_pool\[0\]: expected \[2\] rows of kind 1, got \[1\]"),
        ((KIND, [0, 3], [2], [2], {}), ValueError, r"always_per_sequence\[0\]: expected 1 rows of kind 2, got 2"),
        ((KIND, [0, 3], [2.5], [1], {}), TypeError, r"routable_per_pool\[0\]: expected an integer >= 0, got 2.5"),
        ((KIND, [0, 3], [2], [1], [0.5]), TypeError, "ratios: expected a mapping, got list"),
        ((KIND, [0, 2], [2], [1], {}), ValueError, "cu_seqlens: expected ascending offsets from 0 to 3"),
        ((KIND, [0, 4, 3], [1, 1], [0, 1], {}), ValueError, "cu_seqlens: expected ascending offsets"),
        ((KIND, [0], [2], [1], {}), ValueError, "cu_seqlens: expected 2 entries, got 1"),
        ((KIND, [0, 3], [[1, 1]], [1], {}), ValueError, "pool_id: expected an int32 tensor"),
        ((KIND, [0, 3], [[1, 1]], [1], {}, torch.tensor([0, 2, 0], dtype=torch.int32)), ValueError, "pool_id: expected ids 0..1"),
        ((KIND + 6, [0, 3], [2], [1], {}), ValueError, r"kind\[0\]: expected 0, 1 or 2, got 7"),
        ((KIND.int(), [0, 3], [2], [1], {}), TypeError, "kind: expected dtype uint8, got int32"),
    ],
)  # fmt: skip
def test_bad_counts_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        RoutingPlan.from_counts(*arguments)


def test_unknown_layer_is_named():
    plan = RoutingPlan.from_mask(ONES, None, {4: 0.5})
    with pytest.raises(ValueError, match=r"layer: expected one of \[4\], got 40"):
        plan.k(40)
