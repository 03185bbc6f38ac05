"""Runs every check there is and records the outcome in docs/check-all.json (`make check-all`).

The record holds a hash of the sources it was made from, so that anyone can tell whether it still
speaks of the sources at hand (`make check-all-status`). It is written only if every step passed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "check-all.json"
WORK = ROOT / "build" / "check-all"
BIN = Path(sys.executable).parent
SOURCES = (
    *("csrc", "pmod_ops", "pmod_model", "tests", "bench", "tools", ".ci"),
    *("CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "Makefile"),
    *(".clang-format", ".clang-tidy"),
)
PACKAGES = ("torch", "numpy", "transformers", "accelerate", "pytest", "hypothesis", "ruff")
STATUS_TEST = "tests/build/test_check_all.py::test_the_record_is_of_these_sources"
# Run in a folder without sources, so that only the installed package can answer.
SMOKE = """
import torch, pmod_ops
plan = pmod_ops.RoutingPlan.from_mask(torch.ones(1, 4, dtype=torch.bool), ratios={0: 0.5})
routing = pmod_ops.route(torch.eye(4), torch.arange(4.0), None, plan, 0)
assert routing.index.tolist() == [2, 3], routing.index
print("pmod_ops", pmod_ops.__version__, "works in", pmod_ops.__file__)
"""


def source_files(root: Path) -> Iterator[Path]:
    """Yields every file that can change the outcome of a check, in a fixed order."""
    for name in SOURCES:
        path = root / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            built = file.suffix in (".so", ".pyc") or "__pycache__" in file.parts
            if file.is_file() and not built:
                yield file


def source_hash(root: Path = ROOT) -> str:
    """Returns the SHA-256 of the names and contents of all source files."""
    digest = hashlib.sha256()
    for file in source_files(root):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def describe(record: dict[str, Any] | None, current: str) -> str:
    """Says in one line what the record is worth for sources whose hash is `current`.

    The line starts with "up to date", "out of date" or "missing".
    """
    if record is None:
        return "missing: `make check-all` has not been recorded yet"
    if record["sources"] != current:
        return (
            f"out of date: recorded on {record['date']} from sources {record['sources'][:12]}; "
            f"these are {current[:12]}"
        )
    return f"up to date: recorded on {record['date']} from these sources ({current[:12]})"


def load_record(path: Path = RECORD) -> dict[str, Any] | None:
    """Returns the record, or None if there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def run(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] = {}) -> None:
    """Runs a command, with `env` added to this process's environment; raises if it fails."""
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **env}, check=True)


def count_tests(report: Path) -> dict[str, int]:
    """Returns the counts of a JUnit report: tests, failures, errors, skipped."""
    totals: dict[str, int] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    return totals


def pytest_step(name: str, *arguments: str, env: Mapping[str, str] = {}) -> dict[str, int]:
    """Runs pytest with nothing left out but the test of the record; returns its counts."""
    report = WORK / f"{name}.xml"
    run(
        *(BIN / "pytest", "-n", "logical", "--maxprocesses", "4", "-m", ""),
        f"--junitxml={report}",
        *("--deselect", STATUS_TEST, *arguments),
        env=env,
    )
    return count_tests(report)


def check_sanitized() -> dict[str, int]:
    """Runs everything under sanitizers; returns the counts of the op tests."""
    report = WORK / "sanitized.xml"
    run("make", "sanitize-ops", f"ARGS=--junitxml={report}")
    run(
        "make", "sanitize-cpp", "sanitize-threads", "sanitize-emulated", "sanitize-emulated-threads"
    )
    return count_tests(report)


def check_emulated() -> dict[str, int]:
    """Runs all tests of the CUDA kernels; checks their coverage and the record of mutants."""
    report = WORK / "emulated.xml"
    run("make", "coverage", f"ARGS=--junitxml={report}")
    run(sys.executable, "tools/mutate.py", "--check")
    return count_tests(report)


def lower_levels() -> list[str]:
    """Returns the instruction sets of this machine that the tests use only if told to."""
    from pmod_ops import backend_info  # here, so that all else works without torch

    build = backend_info()["build"]
    return [name for name in build["isa"] if name != build["active_isa"]]


def check_fresh_install(torch: str) -> dict[str, int]:
    """Installs the folder, and a wheel built from the sdist, into empty environments."""
    constraint = WORK / "constraint.txt"
    constraint.write_text(f"{torch}\n")
    env = {"PIP_CONSTRAINT": str(constraint)}
    dist = WORK / "dist"
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", dist)
    (sdist,) = dist.glob("*.tar.gz")
    for name in ("source", "wheel"):
        venv = WORK / f"venv-{name}"
        run(sys.executable, "-m", "venv", venv)
        pip = (venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet")
        what: Path = ROOT
        if name == "wheel":
            run(*pip, "wheel", "--no-deps", "-w", dist, sdist, env=env)
            (what,) = dist.glob("pmod-*-cp310-abi3-linux_*.whl")
        run(*pip, "install", what, env=env)
        run(venv / "bin" / "python", "-c", SMOKE, cwd=WORK)
        shutil.rmtree(venv)
    return {}


def main() -> None:
    """Entry point of `make check-all` and `make check-all-status`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--status", action="store_true", help="only say what the record is worth")
    parser.add_argument("--torch", default="torch==2.13.0", help="torch of the fresh installs")
    arguments = parser.parse_args()
    if arguments.status:
        line = describe(load_record(), source_hash())
        print(f"docs/check-all.json is {line}")
        sys.exit(0 if line.startswith("up to date") else 1)

    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    sources = source_hash()
    parity = os.environ.get("PMOD_PARITY_DIR")
    steps: dict[str, Callable[[], dict[str, int]]] = {
        "lint": lambda: run("make", "lint") or {},
        "tests": lambda: pytest_step("tests"),
        "emulated CUDA kernels, their coverage and mutants": check_emulated,
        "sanitized tests": check_sanitized,
        "C++ tests, x86 and ARM": lambda: run("make", "test-aarch64") or {},
        "fresh installs": lambda: check_fresh_install(arguments.torch),
    }
    for isa in lower_levels():
        steps[f"op tests on {isa}"] = partial(
            pytest_step,
            *(isa, "tests/ops", "-m", "not compile"),
            env={"PMOD_CPU_ISA": isa},
        )
    results: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        start = time.monotonic()
        counts = step()
        results[name] = {"seconds": round(time.monotonic() - start, 1), **counts}
    if source_hash() != sources:
        sys.exit("check-all: the sources changed while it ran; nothing was recorded")
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "sources": sources,
        "parity": "all fixtures" if parity else "the fixtures in tests/data/parity only",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "steps": results,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(results, indent=2), f"\nrecorded in {RECORD.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
