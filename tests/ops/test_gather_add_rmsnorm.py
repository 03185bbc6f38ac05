"""gather_add_rmsnorm equals indexing, adding and the RMSNorm of a Llama."""

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
    attn, grad = t.attn_out.reshape(-1, hidden), t.update.reshape(-1, hidden)
    residual, rows, rstd = torch.ops.pmod.gather_add_rmsnorm(
        t.x, attn, routing.index, t.norm_weight, EPS
    )
    saved = (residual, routing.index, t.norm_weight.clone(), rstd)
    grad_x = torch.ones_like(t.x)
    backward = torch.ops.pmod.gather_add_rmsnorm_backward_.default
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (t.x, attn, t.norm_weight)]
    return [
        (
            torch.ops.pmod.gather_add_rmsnorm.default,
            (inputs[0], inputs[1], routing.index, inputs[2], EPS),
        ),
        (backward, (grad_x, grad, None, rows, *saved, True)),
        (backward, (grad_x, None, None, rows, *saved, False)),
        (backward, (grad_x, grad, t.x.clone(), None, *saved, True)),
        (backward, (None, grad, t.x.clone(), rows, *saved, False)),
    ]


OP = Op(
    name="gather_add_rmsnorm",
    leaves=("x", "attn_out", "norm_weight"),
    public=lambda m, t, routing, case: m.gather_add_rmsnorm(
        t.x, t.attn_out, routing, t.norm_weight, EPS
    ),
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
    args = (case.x, case.attn_out), (storage(case.x), storage(case.attn_out))
    out, other = (pmod_ops.gather_add_rmsnorm(*a, routing, case.norm_weight, EPS) for a in args)
    assert torch.equal(out[0], other[0])
    assert torch.equal(out[1], other[1])


def test_filler_slots_are_zero_whatever_attention_wrote_there():
    case = TABLE[5].make()
    routing = routing_of(case)
    filler = ~routing.mask
    assert filler.any()
    attn_out = case.attn_out.masked_fill(filler[..., None], float("nan")).requires_grad_()
    residual, rows = pmod_ops.gather_add_rmsnorm(case.x, attn_out, routing, case.norm_weight)
    assert not residual[filler].any()
    assert not rows[filler].any()
    (residual.sum() + rows.sum()).backward()
    assert not attn_out.grad[filler].any()


def test_autocast_converts_the_attention_output():
    case = TABLE[0].make(torch.float32)
    routing = routing_of(case)
    half = case.attn_out.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        residual, rows = pmod_ops.gather_add_rmsnorm(case.x, half, routing, case.norm_weight)
    expected = pmod_ops.gather_add_rmsnorm(case.x, half.float(), routing, case.norm_weight)
    assert residual.dtype == rows.dtype == torch.float32
    assert torch.equal(residual, expected[0])
    assert torch.equal(rows, expected[1])


@pytest.mark.parametrize(
    ("attn_out", "error", "message"),
    [
        (torch.zeros(26, 63), ValueError, r"attn_out: expected shape \[26, 64\], got \[26, 63\]"),
        (torch.zeros(25, 64), ValueError, r"attn_out: expected shape \[26, 64\], got \[25, 64\]"),
        (
            torch.zeros(26, 64).bfloat16(),
            TypeError,
            "attn_out: expected dtype float32, got bfloat16",
        ),
    ],
)
def test_bad_attention_output_is_named(attn_out, error, message):
    case = TABLE[0].make()
    with pytest.raises(error, match=message):
        pmod_ops.gather_add_rmsnorm(case.x, attn_out, routing_of(case), case.norm_weight)
