from __future__ import annotations

import shutil
from pathlib import Path

import check_all
import pytest

import pmod_ops


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;\n")
    (tmp_path / "setup.py").write_text("\n")
    return tmp_path


def test_hash_depends_on_contents_names_and_nothing_built(tree: Path) -> None:
    first = check_all.source_hash(tree)
    (tree / "csrc" / "__pycache__").mkdir()
    (tree / "csrc" / "__pycache__" / "a.txt").write_text("cached")
    (tree / "csrc" / "a.abi3.so").write_text("built")
    (tree / "notes.txt").write_text("not a source")
    assert check_all.source_hash(tree) == first
    (tree / "csrc" / "a.cpp").write_text("int b;\n")
    changed = check_all.source_hash(tree)
    shutil.move(tree / "csrc" / "a.cpp", tree / "csrc" / "b.cpp")
    assert len({first, changed, check_all.source_hash(tree)}) == 3


def test_description_names_both_hashes() -> None:
    record = {"sources": "a" * 64, "date": "2026-01-01 10:00 UTC"}
    assert check_all.describe(None, "b" * 64).startswith("missing")
    assert check_all.describe(record, "a" * 64).startswith("up to date")
    stale = check_all.describe(record, "b" * 64)
    assert stale.startswith("out of date")
    assert "aaaaaaaaaaaa" in stale
    assert "bbbbbbbbbbbb" in stale


def test_counts_are_read_from_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    suite = '<testsuite tests="5" failures="1" errors="0" skipped="2"/>'
    report.write_text(f"<testsuites>{suite}</testsuites>")
    expected = {"tests": 5, "failures": 1, "errors": 0, "skipped": 2}
    assert check_all.count_tests(report) == expected


def test_lower_levels_are_all_but_the_active_one() -> None:
    build = pmod_ops.backend_info()["build"]
    lower = check_all.lower_levels()
    assert sorted([*lower, build["active_isa"]]) == sorted(build["isa"])


def test_the_record_is_of_these_sources() -> None:
    line = check_all.describe(check_all.load_record(), check_all.source_hash())
    if not line.startswith("up to date"):
        # Not a failure: any change of the sources outdates the record; a release renews it.
        pytest.xfail(f"docs/check-all.json is {line}")
