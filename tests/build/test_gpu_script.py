"""`make gpu` where there is no GPU: the dry run, and what it says without one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from on_gpu import matrix, report
from on_gpu.results import DRY, MODES

# Sizes, and what is known without a measurement.
NOT_FIGURES = ("rows", "B", "R", "D", "type", "step", "", "of")
OPTIONAL = ("xformers", "liger", "xformers_liger")  # they may be installed, and refuse a CPU


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return int(str(ended.value.code))


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(monkeypatch, "--output", str(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "there is no CUDA device" in said
    assert "--dry-run" in said
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, int]:
    """Results, report and exit status."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        status = call(patch, "--dry-run", "--output", str(folder))
    (found,) = folder.glob("results-*.json")
    return json.loads(found.read_text()), (folder / "report.md").read_text(), status


def test_a_dry_run_goes_through_every_step(dry_run: tuple[dict[str, Any], str, int]) -> None:
    results, _, status = dry_run
    steps = {step["name"]: step for step in results["steps"]}
    assert list(steps) == [step.name for step in gpu.STEPS]
    assert {step["status"] for step in steps.values()} == {"passed", "skipped"}, steps
    assert status == 0
    for name in ("facts", "tests", "benchmarks"):
        assert steps[name]["status"] == "passed"
    assert results["tests"]["tests"] > results["tests"]["skipped"]
    assert results["facts"]["backend"]["devices"]["cpu"]


def test_a_dry_run_calls_every_candidate(dry_run: tuple[dict[str, Any], str, int]) -> None:
    results, _, _ = dry_run
    cells = results["cells"]
    assert [cell["kind"] for cell in cells] == [cell.kind for cell in matrix.dry_cells()]
    assert {cell.kind for cell in matrix.cells()} == {cell["kind"] for cell in cells}
    assert not results["left_out"]
    for cell in cells:
        assert cell["error"] is None
        assert {"ours", "eager", "memcpy"} <= cell["candidates"].keys()
        for name, candidate in cell["candidates"].items():
            if name not in OPTIONAL:
                assert candidate["error"] is None, (cell["kind"], name)
                assert list(candidate["figures"]) == list(MODES)


def test_a_dry_run_claims_no_measurement(dry_run: tuple[dict[str, Any], str, int]) -> None:
    results, text, _ = dry_run
    assert results["measured"] is False
    assert {results["label"], *(cell["label"] for cell in results["cells"])} == {DRY}
    assert text == report.markdown(results)
    figures = 0
    for section in re.findall(r"##+ (?:Steps|.*?rows).*?(?=\n##|\Z)", text, re.DOTALL):
        header, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
        names = [name.strip() for name in header.split("|")]
        for row in rows:
            for name, value in zip(names, row.split("|"), strict=True):
                if name in NOT_FIGURES or not re.search(r"\d", value):
                    continue
                for number in re.split(r" / |, ", value.replace(f"({DRY})", "LABEL")):
                    assert "LABEL" in number, (name, value)
                    figures += 1
    assert figures > 100
    assert "measured" not in text.replace(DRY, "")
