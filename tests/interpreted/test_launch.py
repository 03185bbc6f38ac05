"""Block sizes, partial sums, and what launchers refuse before they write anything."""

import pytest
import torch

import pmod_ops
from pmod_ops import _library
from pmod_ops._triton import MODULES, OPS, launch, weighted_scatter_add_backward
from pmod_ops._triton import route as route_module
from pmod_ops._triton import weighted_scatter_add as scatter_module

INDEX = torch.tensor([2, -1, 0], dtype=torch.int32)


def test_every_op_that_has_kernels_is_there():
    assert list(OPS) == [name for module in MODULES for name in module.OPS]
    assert set(OPS) == {op for op in _library._ops if not op.endswith("_info")}


@pytest.mark.parametrize(
    ("hidden", "elements", "expected"),
    [
        (1, 16, (1, 1)),
        (17, 16, (32, 1)),
        (1024, 16, (1024, 2)),
        (1031, 16, (2048, 4)),
        (4096, 16, (4096, 8)),
        (4096, 8, (4096, 16)),
        (16384, 8, (16384, 16)),  # 1024 threads, where a warp has 64 lanes
    ],
)
def test_a_block_covers_a_row(hidden, elements, expected):
    config = launch.row_config(hidden, elements)
    assert tuple(config) == expected
    assert config.options == {"num_warps": expected[1], "enable_fp_fusion": False}


@pytest.mark.parametrize("hidden", [1, 17, 1031, 4096, 16384])
def test_scores_are_taken_in_equal_blocks(hidden):
    assert route_module.launch_config(hidden) == scatter_module.launch_config(hidden)


@pytest.mark.parametrize("hidden", [1, 4096])
def test_kernels_that_sum_a_parameter_have_more_threads(hidden):
    module = weighted_scatter_add_backward
    assert module.router_config(hidden).block == module.launch_config(hidden).block
    assert module.router_config(hidden).num_warps >= module.launch_config(hidden).num_warps


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (1021, 256), (1024, 256), (10**6, 256)]
)
def test_partial_sums_depend_on_the_rows_alone(rows, expected):
    assert launch.parameter_partials(rows) == expected


def call_gather(x, index=INDEX):
    return torch.ops.pmod.gather(x, index)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            TypeError,
            r"gather: x: expected float32, bfloat16 or float16 on a GPU, got float64; float64 rows are for the CPU",
            lambda: call_gather(torch.zeros(3, 4, dtype=torch.float64)),
        ),
        (
            ValueError,
            r"gather: x: expected 1 to 16384 columns, got 16385",
            lambda: call_gather(torch.zeros(3, 16385)),
        ),
        (
            ValueError,
            r"gather: x: expected 2 dimensions, got shape \[4\]",
            lambda: call_gather(torch.zeros(4)),
        ),
        (
            TypeError,
            r"gather: index: expected dtype int32, got int64",
            lambda: call_gather(torch.zeros(3, 4), INDEX.long()),
        ),
        (
            ValueError,
            r"gather_rmsnorm: norm_weight: expected shape \[4\], got \[3\]",
            lambda: torch.ops.pmod.gather_rmsnorm(torch.zeros(3, 4), INDEX, torch.zeros(3), 1e-6),
        ),
        (
            ValueError,
            r"gather_backward_: grad_x: expected a contiguous tensor, because it is written in place",
            lambda: torch.ops.pmod.gather_backward_(
                torch.zeros(4, 3).t(), torch.zeros(3, 4), INDEX, False
            ),
        ),
        (
            ValueError,
            r"gather_backward_: grad_rows: expected 3 rows, got 2",
            lambda: torch.ops.pmod.gather_backward_(
                torch.zeros(3, 4), torch.zeros(2, 4), INDEX, False
            ),
        ),
        (
            ValueError,
            r"gather_backward_: grad_rows: expected 4 columns, got 5",
            lambda: torch.ops.pmod.gather_backward_(
                torch.zeros(3, 4), torch.zeros(3, 5), INDEX, False
            ),
        ),
    ],
    ids=["float64", "wide", "flat", "int64", "weight", "strided", "rows", "columns"],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=rf"^pmod_ops\.{message}"):
        call()


@pytest.mark.usefixtures("interpreted")
def test_an_index_that_is_out_of_range_leads_nowhere():
    x = torch.randn(3, 4)
    index = torch.tensor([3, 1, -2, 2**31 - 1], dtype=torch.int32)
    rows = torch.ops.pmod.gather(x, index)
    assert torch.equal(rows[1], x[1])
    assert not rows[[0, 2, 3]].any()
    residual, rows, rstd = torch.ops.pmod.gather_add_rmsnorm(
        x, torch.full((4, 4), float("nan")), index, torch.full((4,), float("inf")), 0.0
    )
    for out in (residual, rows, rstd):
        assert not out[[0, 2, 3]].any()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", launch.ROW_DTYPES, ids=str)
def test_copies_are_bitwise(dtype):
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    x = torch.randint(torch.iinfo(bits).min, torch.iinfo(bits).max, (3, 5), dtype=bits).view(dtype)
    rows = torch.ops.pmod.gather(x, INDEX)
    assert torch.equal(rows[[0, 2]].view(bits), x[[2, 0]].view(bits))


def test_where_nothing_is_interpreted_a_cpu_tensor_is_refused(monkeypatch):
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="x: expected a CUDA tensor, got device cpu"):
        OPS["gather"](torch.zeros(3, 4), INDEX)


def test_the_ops_of_the_package_are_the_compiled_ones():
    assert pmod_ops.backend_info()["devices"]["cpu"].startswith("C++")
