"""The compiled CUDA library: it loads without a driver, and says what is wrong and what to do."""

import importlib.util

import pytest
import torch

import pmod_ops

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pmod_ops._C_cuda") is None, reason="built without an nvcc"
)
NO_KERNEL_IMAGE, INSUFFICIENT_DRIVER, ILLEGAL_ADDRESS = 209, 35, 700


def test_backend_info_says_what_was_compiled_and_what_serves():
    info = pmod_ops.backend_info()
    assert info["build"]["cuda"]["archs"]
    assert info["devices"]["cuda"].startswith("CUDA C++")
    assert info["build"]["cuda"]["devices"] == torch.cuda.device_count()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_missing_driver_is_named():
    assert "driver" in pmod_ops.backend_info()["devices"]["cuda"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            NO_KERNEL_IMAGE,
            [
                *("no kernel for this GPU", "built for architectures"),
                *("PMOD_CUDA_IMPL=triton", "PMOD_CUDA_ARCHS"),
            ],
        ),
        (INSUFFICIENT_DRIVER, ["driver", "too old", "update it", "older CUDA toolkit"]),
        (ILLEGAL_ADDRESS, ["the launch failed", "illegal memory access"]),
    ],
)
def test_an_error_says_what_to_do(status, words):
    said = torch.ops.pmod.cuda_error(status)
    for word in words:
        assert word in said


def test_the_kernels_refuse_tensors_of_another_device():
    """The kernel of the CUDA key, reached with CPU tensors: nothing is launched."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    index = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"pmod_ops\.gather: x: expected a CUDA tensor"):
        torch.ops.pmod.gather.default.redispatch(key, torch.zeros(2, 4), index)
