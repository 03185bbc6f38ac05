from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cuda_coverage
import pytest


def document(folder: str, **files: dict[str, list[tuple[int, int]]]) -> dict[str, Any]:
    """What gcov prints for one object file: {file: {function: [(line, count)]}}."""
    return {
        "current_working_directory": folder,
        "files": [
            {
                "file": name.replace("__", "/") + ".cuh",
                "lines": [
                    {"line_number": line, "count": count, "function_name": function}
                    for function, lines in functions.items()
                    for line, count in lines
                ],
            }
            for name, functions in files.items()
        ],
    }


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    for name in ("row.cuh", "norm.cuh"):
        (folder / name).touch()
    return folder


def test_any_instantiation_in_any_object_file_counts(kernels: Path) -> None:
    folder = str(kernels)
    documents = [
        document(folder, row={"f<bf16>": [(1, 3), (2, 0), (3, 0)], "f<float>": [(1, 0), (2, 4)]}),
        document(folder, row={"f<float>": [(2, 1), (3, 0), (9, 0)]}),
    ]
    merged = cuda_coverage.merge(documents, kernels)
    assert merged == {"row.cuh": {1: 3, 2: 5, 3: 0, 9: 0}}
    assert cuda_coverage.missed(merged["row.cuh"]) == [3, 9]
    assert cuda_coverage.percent(merged) == 50


def test_relative_names_and_other_files(kernels: Path) -> None:
    build = kernels.parents[1] / "build"
    counted = document(str(build), **{"..__csrc__cuda__row": {"f": [(1, 1)]}})
    elsewhere = document(str(build), other={"f": [(1, 0)]})
    source = document(str(kernels), row={"f": [(2, 0)]})
    source["files"][0]["file"] = "row.cu"
    merged = cuda_coverage.merge([counted, elsewhere, source], kernels)
    assert merged == {"row.cuh": {1: 1}}
    assert cuda_coverage.uncounted(merged, kernels) == ["norm.cuh"]


def test_nothing_counted_is_no_coverage() -> None:
    assert cuda_coverage.percent({}) == 0


def test_the_table_lists_missed_lines() -> None:
    merged = {"row.cuh": {1: 1, 2: 0, 3: 0, 4: 0, 7: 0, 8: 2}, "norm.cuh": {1: 1, 2: 1}}
    lines = cuda_coverage.table(merged).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["norm.cuh", "2", "100.0", "%"],
        ["row.cuh", "6", "33.3", "%", "2-4,", "7"],
        ["all", "8", "50.0", "%"],
    ]


def fake_gcov(folder: Path, *lines: str, status: int = 0) -> str:
    """A program that prints these lines, and what it was asked for to stderr."""
    program = folder / "gcov"
    text = f"import sys\nprint({chr(10).join(lines)!r})\nsys.stderr.write('gcov says why')\n"
    program.write_text(f"#!{sys.executable}\n{text}sys.exit({status})\n")
    program.chmod(0o755)
    return str(program)


def test_gcov_gives_a_document_per_object_file(tmp_path: Path) -> None:
    (tmp_path / "a.gcda").touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.gcda").touch()
    expected = [document("/a"), document("/b")]
    program = fake_gcov(tmp_path, *map(json.dumps, expected))
    assert cuda_coverage.read_gcov(tmp_path, program) == expected


def test_a_gcov_that_cannot_read_the_counts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.gcda").touch()
    with pytest.raises(RuntimeError, match=r"read 0 of 1 files(?s:.*)gcov says why"):
        cuda_coverage.read_gcov(tmp_path, fake_gcov(tmp_path, status=1))


def test_a_folder_without_counts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="-DPMOD_COVERAGE=ON"):
        cuda_coverage.read_gcov(tmp_path)


@pytest.mark.parametrize(("least", "status"), [(50, None), (51, 1)])
def test_too_few_lines_fail(
    least: int, status: int | None, kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gcda").touch()
    both = {"f": [(1, 1), (2, 0)]}
    program = fake_gcov(tmp_path, json.dumps(document(str(kernels), row=both, norm=both)))
    monkeypatch.setattr(cuda_coverage, "KERNELS", kernels)
    arguments = ["cuda_coverage.py", str(tmp_path), "--least", str(least), "--gcov", program]
    monkeypatch.setattr(sys, "argv", arguments)
    if status is None:
        cuda_coverage.main()
        return
    with pytest.raises(SystemExit, match=r"50\.0 % ran, at least 51 % must"):
        cuda_coverage.main()
