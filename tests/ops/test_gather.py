"""gather equals indexing."""

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
from pmod_ops.testing import DTYPES, TABLE, strided, unaligned

OP = Op(
    name="gather",
    leaves=("x",),
    public=lambda m, t, routing, case: (m.gather(t.x, routing),),
    raw=lambda t, routing, case: [
        (torch.ops.pmod.gather.default, (t.x.requires_grad_(), routing.index)),
        (
            torch.ops.pmod.gather_backward_.default,
            (torch.ones_like(t.x), t.attn_out.reshape(-1, t.x.shape[1]), routing.index, True),
        ),
    ],
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
    rows = pmod_ops.gather(storage(case.x), routing)
    assert torch.equal(rows, case.x[routing.index.long()])


def test_padded_layout_is_right_aligned_and_returns_its_mask():
    case = TABLE[4].make()
    routing = routing_of(case)
    packed = pmod_ops.gather(case.x, routing)
    rows, mask = pmod_ops.gather(case.x, routing, layout="padded")
    assert rows.shape == (4, 16, case.x.shape[1])
    assert mask.sum(1).tolist() == list(case.plan.kept_per_sequence(3))
    assert torch.equal(mask, mask.sort(1).values)
    assert torch.equal(rows[mask], packed)
    assert not rows[~mask].any()


def test_routing_of_another_batch_is_refused():
    routing = routing_of(TABLE[0].make())
    with pytest.raises(
        ValueError, match=r"gather: routing: expected one made for the 16 rows of x"
    ):
        pmod_ops.gather(torch.zeros(16, 64), routing)


@pytest.mark.parametrize(
    "x", [torch.zeros(44, 64, dtype=torch.int8), torch.zeros(44, 64, dtype=torch.complex64)]
)
def test_dtype_is_refused(x):
    with pytest.raises(TypeError, match="gather: x: expected dtype float32 or bfloat16"):
        pmod_ops.gather(x, routing_of(TABLE[0].make()))
