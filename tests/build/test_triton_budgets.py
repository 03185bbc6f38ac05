"""The Triton kernels compile for GPUs, and use no more of them than their budgets."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "triton_budgets.py"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*command: object) -> "subprocess.CompletedProcess[str]":
    """In a process in which nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TOOL.parent), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# A process per kind of rows: together they would be the longest test of all.
@pytest.mark.parametrize(
    ("kind", "arch"),
    [("bf16,4096", "90"), ("fp16,1031", "90"), ("select", "90"), ("bf16,4096", "gfx942")],
)
def test_kernels_keep_their_budgets(kind, arch):
    done = run(TOOL, "--kinds", kind, "--archs", arch)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_all_kernels_keep_their_budgets_on_all_architectures():
    done = run(TOOL)
    assert done.returncode == 0, done.stdout + done.stderr


RULES = """
import json
import triton_budgets as t
usage = t.Usage(32, 1024, 4, 2, 0)
budget = dict(zip(t.COLUMNS, usage[:len(t.COLUMNS)]))
def found(same, **changes):
    return list(t.overruns(usage._replace(**changes), budget, same))
narrow = '''
    %c64_i32 = arith.constant 64 : i32
    %c64_i64 = arith.constant 64 : i64
    %a = arith.muli %row, %c64_i64 : i64
    %b = arith.muli %row, %c64_i32 : i32
    %c = arith.muli %row, %c64_i320 : i32
'''
print(json.dumps({
    "same": found(True),
    "less": found(True, registers=8, shared=0, wide_loads=5),
    "registers": found(True, registers=33),
    "another triton": found(False, registers=35, wide_loads=1),
    "far": found(False, registers=37, wide_loads=0),
    "shared": found(True, shared=2048),
    "loads": found(True, wide_loads=3),
    "narrow": t.narrow_offsets(narrow, 64),
    "no budget": t.compare({"k": {"90": usage, "gfx942": usage}}, {}, True),
    "file": t.decode(t.encode({"k": {"90": usage}})),
}))
"""


def test_what_is_beyond_a_budget():
    done = run("-c", RULES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] == found["less"] == found["another triton"] == []
    assert found["registers"] == ["33 registers, 32 allowed"]
    assert found["far"] == ["37 registers, 36 allowed", "wide_loads: 0, 4 in the budget"]
    assert found["shared"] == ["2048 bytes of shared memory, 1024 allowed"]
    assert found["loads"] == ["wide_loads: 3, 4 in the budget"]
    assert found["narrow"] == ["%b = arith.muli %row, %c64_i32 : i32"]
    assert found["no budget"] == ["k, 90: has no budget"]
    _release, budgets = found["file"]
    expected = {"registers": 32, "shared": 1024, "wide_loads": 4, "wide_stores": 2}
    assert budgets == {"k": {"90": expected}}


EQUAL_SUMS = """
import re
import triton_budgets as t
kernels = t.kernels(["bf16,4096", "fp16,1031"], ["90"])
def layouts(name):
    text = t.compiled(kernels[name][0], "90").asm["ttgir"]
    names = dict(re.findall(r"^(#\\w+) = (.*)$", text, re.MULTILINE))
    return {names[name] for name in re.findall(r"\\}\\) : \\(tensor<\\d+xf32, (#\\w+)>\\) -> f32", text)}
for kind in ("bf16,4096", "fp16,1031"):
    score = layouts(f"route: score<{kind}>")
    assert len(score) == 1, score
    assert layouts(f"weighted_scatter_add, scored: weighted_scatter_add<{kind}>") == score
"""


def test_a_score_is_summed_alike_wherever_it_is_taken():
    """Equal layouts: the same products meet in the same order, in threads, lanes and warps."""
    done = run("-c", EQUAL_SUMS)
    assert done.returncode == 0, done.stderr
