"""The steps that check: the tests of tests/gpu, and a few of them on the Triton kernels and under
compute-sanitizer.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from on_gpu.child import OUT_OF_TIME, ROOT, Child, python, wait
from on_gpu.steps import Outcome, Run

PYTEST = ("pytest", "-c", ROOT / "pyproject.toml", ROOT / "tests" / "gpu", "-q")
# What torch warns of on a GPU is not known beforehand, and no reason to fail.
OPTIONS = ("-m", "not slow", "-W", "default", "-p", "no:cacheprovider")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ERROR_EXIT = 86  # any code that pytest does not use
# Short and long selections, all ops on unaligned, padded and pooled rows of a few hundred elements.
SANITIZED = (
    "(test_values and bfloat16 and (batch or pad_right or pools or hidden_17))"
    " or (test_selection and tied and (576 or 65536))"
)
DRY_TESTS = "batch and not many_blocks and (float32 or repeats) or (test_selection and 576)"
# Each width and type is compiled for, seconds each.
ON_TRITON = (
    "test_ops and bfloat16 and (test_values and (batch or pad_right or pools or hidden_17"
    " or hidden_4096)) or (test_selection and tied and (576 or 65536))"
)
LISTED = 20  # failed tests that are named


def test(run: Run, seconds: float) -> Outcome:
    """Run all tests that need a GPU; in a dry run, a few of them on the CPU."""
    if run.dry:
        env = {"PMOD_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        return tested(run, seconds, "tests", ("-k", DRY_TESTS), env)
    return tested(run, seconds, "tests", (), {})


def test_triton(run: Run, seconds: float) -> Outcome:
    """Run a few tests of every op on the Triton kernels."""
    if run.dry:
        return Outcome("skipped", "there is no device to compile for in a dry run")
    if importlib.util.find_spec("triton") is None:
        return Outcome("skipped", "triton is not installed")
    env = {"PMOD_CUDA_IMPL": "triton"}
    return tested(run, seconds, "triton_tests", ("-k", ON_TRITON), env)


def tested(
    run: Run, seconds: float, name: str, arguments: tuple[str, ...], env: dict[str, str]
) -> Outcome:
    """Run tests in a process of their own, and keep the counts under `name`."""
    xml = run.scratch / f"{name}.xml"
    xml.unlink(missing_ok=True)
    command = python(*PYTEST, *OPTIONS, f"--junitxml={xml}", *arguments)
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **env}
    child = Child(command, run.scratch / f"{name}.log", time.time() + seconds, env)
    wait([child])
    if child.ended == OUT_OF_TIME:
        return Outcome(OUT_OF_TIME, child.tail().rsplit("\n", 1)[-1])
    if not xml.is_file():
        return Outcome("failed", f"pytest ended ({child.ended}): {child.tail()}")
    run.results[name] = found = read(xml)
    bad = found["failures"] + found["errors"]
    summary = f"{found['tests']} tests, {bad} failed, {found['skipped']} skipped"
    passed = child.ended == "exit code 0" and found["tests"] > found["skipped"]
    return Outcome("passed" if passed else "failed", summary)


def read(xml: Path) -> dict[str, Any]:
    """Counts and names of failed tests in a JUnit report."""
    found: dict[str, Any] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    root = ElementTree.parse(xml).getroot()
    for suite in root.iter("testsuite"):
        for name in list(found):
            found[name] += int(suite.get(name, 0))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**found, "failed": failed[:LISTED]}


def sanitize(run: Run, seconds: float) -> Outcome:
    """Run a short selection of tests under every tool, all tools at once."""
    program = sanitizer()
    if program is None:
        return Outcome("skipped", "compute-sanitizer is not installed")
    if run.dry:
        return Outcome("skipped", "there is no device to watch in a dry run")
    until = time.time() + seconds
    children = {tool: under(program, tool, run, until) for tool in TOOLS}
    wait(children.values())
    run.results["sanitizer"] = found = {
        tool: judge(tool, child.log.read_text(errors="replace"), str(child.ended))
        for tool, child in children.items()
    }
    states = {entry["status"] for entry in found.values()}
    summary = ", ".join(f"{tool} {entry['status']}" for tool, entry in found.items())
    order = ("failed", OUT_OF_TIME, "passed")
    return Outcome(next(state for state in order if state in states), summary)


def sanitizer() -> Path | None:
    """compute-sanitizer, from PATH or beside the toolkit."""
    found = shutil.which("compute-sanitizer")
    if found:
        return Path(found)
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return places[-1] if places else None


def under(program: Path, tool: str, run: Run, until: float) -> Child:
    """The tests under one tool.

    Memory comes straight from the driver, so that the end of a tensor is the end of an allocation.
    All tools but initcheck look at our kernels only; initcheck must see who initialises memory.
    """
    ours = [] if tool == "initcheck" else ["--kernel-name", "kns=pmod"]
    command = [program, "--tool", tool, "--error-exitcode", str(ERROR_EXIT), *ours]
    command += python(*PYTEST, *OPTIONS, "-x")
    env = {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PMOD_TEST_SANITIZER": tool,
    }
    return Child([*command, "-k", SANITIZED], run.scratch / f"{tool}.log", until, env)


def judge(tool: str, text: str, ended: str) -> dict[str, Any]:
    """What a tool found. Errors of initcheck count if they name a kernel of this package."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", text) or re.search(
        r"RACECHECK SUMMARY: (\d+) hazard", text
    )
    errors = int(summary[1]) if summary else None
    ours = len(re.findall(r"^=+ +at .*pmod::cuda::", text, re.MULTILINE))
    counted = ours if tool == "initcheck" else errors
    passed = re.search(r"^\d+ passed", text, re.MULTILINE) is not None
    if ended == OUT_OF_TIME:
        status = OUT_OF_TIME
    else:
        status = "passed" if passed and counted == 0 else "failed"
    tail = "\n".join(text.splitlines()[-10:])
    return {"status": status, "errors": errors, "ours": ours, "tail": tail}
