"""Runs the ops of the package as Triton kernels, which Triton's interpreter executes in numpy.

Triton decides when it is imported whether it interprets, so TRITON_INTERPRET is set in the conftest
of all tests; see there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pmod_ops


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("interpret")


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to nearest, ties to even, as GPUs do; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


@contextmanager
def interpreter_of_a_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the interpreter (3.8, 3.9) does otherwise than a GPU, and what it does too often.

    It truncates float32 to bfloat16. What it says is the type of a comparison is that of its
    operands, so that a scalar one becomes integers when it meets a block: no mask. And it replaces
    the functions of triton.language at every call of a function, two thirds of the time it takes.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, splat = InterpreterBuilder.cast_impl, InterpreterBuilder.create_splat

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(rounded_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_splat(self, ret_ty, arg):
        out = splat(self, ret_ty, arg)
        if arg.data.dtype == np.bool_:
            return TensorHandle(out.data.astype(np.bool_), tl.int1)
        return out

    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "create_splat", create_splat)
    modules = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(modules)
    patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    yield
    scope.restore()


@pytest.fixture
def kernels() -> Iterator[dict[str, Callable[..., Any]]]:
    """The raw ops by name, as Triton kernels that are interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set: where there is a GPU, it runs the kernels")
    from pmod_ops._triton import OPS

    # numpy warns of what a GPU does in silence: of NaN, infinity and integers that wrap around
    errors = np.errstate(all="ignore")
    with pytest.MonkeyPatch.context() as patch, interpreter_of_a_gpu(patch), errors:
        yield OPS


@pytest.fixture
def interpreted(kernels: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """For the length of a test, CPU tensors are served by the Triton kernels."""
    override = torch.library.Library("pmod", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*other operators may also be overridden")
        for name, op in kernels.items():
            override.impl(name, op, "CPU", allow_override=True)
    yield
    override._destroy()
    assert pmod_ops.backend_info()["devices"]["cpu"].startswith("C++")
