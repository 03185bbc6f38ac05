"""gather_rmsnorm equals indexing followed by the RMSNorm of a Llama."""

import pytest
import torch
from ops.checks import (
    EPS,
    Op,
    check_compiled,
    check_gradients,
    check_opcheck,
    check_values,
    finite,
    routing_of,
)

import pmod_ops
from pmod_ops.testing import DTYPES, TABLE, strided, unaligned


def raw(t, routing, case):
    hidden = t.x.shape[1]
    grad_rows = t.attn_out.reshape(-1, hidden)
    _, rstd = torch.ops.pmod.gather_rmsnorm(t.x, routing.index, t.norm_weight, EPS)
    inputs = (t.x.detach().clone(), routing.index, t.norm_weight.clone(), rstd)
    return [
        (
            torch.ops.pmod.gather_rmsnorm.default,
            (t.x.requires_grad_(), routing.index, t.norm_weight.requires_grad_(), EPS),
        ),
        (
            torch.ops.pmod.gather_rmsnorm_backward_.default,
            (torch.ones_like(inputs[0]), grad_rows, *inputs, True),
        ),
    ]


OP = Op(
    name="gather_rmsnorm",
    leaves=("x", "norm_weight"),
    public=lambda m, t, routing, case: (m.gather_rmsnorm(t.x, routing, t.norm_weight, EPS),),
    raw=raw,
)


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
    rows = pmod_ops.gather_rmsnorm(case.x, routing, case.norm_weight, EPS)
    other = pmod_ops.gather_rmsnorm(storage(case.x), routing, storage(case.norm_weight), EPS)
    assert torch.equal(rows, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weight_of_half_precision_rows(dtype):
    case = TABLE[4].make(dtype)
    routing = routing_of(case)
    rows = pmod_ops.gather_rmsnorm(case.x, routing, case.norm_weight, EPS)
    with_float = pmod_ops.gather_rmsnorm(case.x, routing, case.norm_weight.float(), EPS)
    assert with_float.dtype == dtype
    assert torch.equal(rows, with_float)


def test_a_zero_row_stays_zero():
    case = TABLE[0].make()
    routing = routing_of(case)
    assert not pmod_ops.gather_rmsnorm(torch.zeros_like(case.x), routing, case.norm_weight).any()


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(63), ValueError, r"norm_weight: expected shape \[64\], got \[63\]"),
        (torch.ones(64, dtype=torch.float64), TypeError, "norm_weight: expected dtype float32"),
        (torch.ones(64, device="meta"), ValueError, "norm_weight: expected device cpu, got meta"),
        ([1.0], TypeError, "norm_weight: expected a tensor, got list"),
    ],
)
def test_bad_weight_is_named(weight, error, message):
    case = TABLE[0].make()
    with pytest.raises(error, match=message):
        pmod_ops.gather_rmsnorm(case.x, routing_of(case), weight)


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_bad_eps_is_named(eps):
    case = TABLE[0].make()
    with pytest.raises(ValueError, match="gather_rmsnorm: eps: expected a finite number >= 0"):
        pmod_ops.gather_rmsnorm(case.x, routing_of(case), case.norm_weight, eps)
