"""PMOD_CUDA_IMPL: who serves CUDA tensors, decided when pmod_ops is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest

LIBRARY = "pmod_ops._C_cuda"
HAS_LIBRARY = importlib.util.find_spec(LIBRARY) is not None
# Runs before the import: makes modules look as if they were not there.
WITHOUT = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {modules!r} else find_spec(name)
"""
CUDA_CALL = """
import torch
key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
index = torch.zeros(1, dtype=torch.int32)
try:
    torch.ops.pmod.gather.default.redispatch(key, torch.zeros(2, 4), index)
except (RuntimeError, ValueError) as error:
    print(error)
"""
SERVES = "import pmod_ops; print(pmod_ops.backend_info()['devices']['cuda'])"


def python(code: str, asked: str | None, *without: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a fresh interpreter."""
    names = ("PMOD_CUDA_IMPL", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if asked is not None:
        environment["PMOD_CUDA_IMPL"] = asked
    code = WITHOUT.format(modules=without) + code
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.skipif(not HAS_LIBRARY, reason="built without an nvcc")
@pytest.mark.parametrize("asked", [None, "", "cuda"])
def test_the_compiled_kernels_come_first(asked):
    assert python(SERVES, asked)[1].startswith("CUDA C++ (pmod_ops._C_cuda)")


def test_triton_serves_where_it_is_asked_for():
    assert python(SERVES, "triton")[1] == "Triton (pmod_ops._triton); PMOD_CUDA_IMPL=triton"


def test_triton_serves_where_there_are_no_compiled_kernels():
    said = python(SERVES, None, LIBRARY)[1]
    assert said.startswith("Triton (pmod_ops._triton); this build has no CUDA kernels")


def test_importing_pmod_ops_imports_no_triton_and_no_compiled_kernels():
    code = f"import sys, pmod_ops; print({{'triton', {LIBRARY!r}}} & sys.modules.keys())"
    assert python(code, "triton")[1] == "set()"


def test_a_call_reaches_triton():
    status, said, _ = python("import pmod_ops" + CUDA_CALL, "triton")
    assert (status, said) == (0, "pmod_ops.gather: x: expected a CUDA tensor, got device cpu")


def test_without_any_kernels_a_call_says_so():
    _, said, _ = python("import pmod_ops" + CUDA_CALL, None, LIBRARY, "triton")
    assert said == (
        "pmod_ops.gather: got CUDA tensors, but this build has no CUDA kernels; install it where"
        " there is an nvcc"
    )


@pytest.mark.parametrize(
    ("asked", "without", "message"),
    [
        ("CUDA", (), "PMOD_CUDA_IMPL: expected 'cuda', 'triton' or nothing, got 'CUDA'"),
        ("cuda", (LIBRARY,), "PMOD_CUDA_IMPL=cuda, but this build has no CUDA kernels"),
        ("triton", ("triton",), "PMOD_CUDA_IMPL=triton, but triton is not installed: pip install"),
    ],
)
def test_what_cannot_be_had_stops_the_import(asked, without, message):
    status, _, errors = python("import pmod_ops", asked, *without)
    assert status == 1
    assert f"ImportError: pmod_ops: {message}" in errors
