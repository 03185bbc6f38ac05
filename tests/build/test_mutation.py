from __future__ import annotations

from pathlib import Path

import mutation_record
import pytest
from mutants import Mutant, mutants_in, mutants_of
from mutation_record import Record, Result

MUTANTS = mutants_of("a.cuh", "void f() {\n  __syncthreads();\n  a[i] = b < c - d;\n}\n")
KILLED = Result("killed", "rows_test", "failure")
SURVIVED = Result("survived")
SOURCES = "a" * 64


def record_of(*results: Result, earlier: Record | None = None) -> Record:
    return mutation_record.make(dict(zip(MUTANTS, results, strict=True)), SOURCES, earlier)


def test_the_record_is_of_these_kernels() -> None:
    kernels = mutants_in(mutation_record.KERNELS)
    problems = mutation_record.problems(
        mutation_record.load(), kernels, mutation_record.kernel_hash()
    )
    assert problems == [], "see tools/mutate.py"


def test_scores_leave_out_what_does_not_compile_and_what_is_equivalent() -> None:
    record = record_of(KILLED, KILLED, SURVIVED, Result("does not compile"))
    assert record["score"] == 66.6
    assert record["score_without_equivalent"] == 66.6
    assert record["kinds"]["comparison"]["survived"] == 1
    assert record["kinds"]["all"] == {
        **{"mutants": 4, "killed": 2, "survived": 1, "does not compile": 1, "equivalent": 0}
    }
    assert record["killed_by"] == {"rows_test": 2}
    record["survivors"][0]["equivalent"] = True
    record = mutation_record.rescored(record)
    assert record["score"] == 66.6
    assert record["score_without_equivalent"] == 100
    assert record["kinds"]["comparison"]["equivalent"] == 1


def test_reasons_are_kept_while_a_mutant_survives() -> None:
    first = record_of(KILLED, SURVIVED, SURVIVED, KILLED)
    for number, survivor in enumerate(first["survivors"]):
        survivor |= {"equivalent": True, "reason": f"reason {number}"}
    again = record_of(SURVIVED, KILLED, SURVIVED, KILLED, earlier=first)
    assert [(s["kind"], s["reason"]) for s in again["survivors"]] == [
        ("barrier", ""),
        ("comparison", "reason 1"),
    ]
    assert again["kinds"]["all"]["equivalent"] == 1


def test_a_good_record_has_no_problems() -> None:
    record = record_of(KILLED, KILLED, KILLED, SURVIVED)
    record["survivors"][0] |= {"equivalent": True, "reason": "c is 0"}
    assert mutation_record.problems(mutation_record.rescored(record), MUTANTS, SOURCES) == []


def problems_after(change: str) -> list[str]:
    record = record_of(KILLED, KILLED, KILLED, SURVIVED)
    record["survivors"][0] |= {"equivalent": True, "reason": "c is 0"}
    record = mutation_record.rescored(record)
    mutants: list[Mutant] = list(MUTANTS)
    if change == "kernels":
        record["sources"] = "b" * 64
    elif change == "no reason":
        record["survivors"][0]["reason"] = " "
    elif change == "not rescored":
        record["survivors"][0]["equivalent"] = False
    elif change == "low score":
        record["survivors"][0]["equivalent"] = False
        record = mutation_record.rescored(record)
    elif change == "more mutants":
        mutants.append(MUTANTS[0])
    return mutation_record.problems(record, mutants, SOURCES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("kernels", "make mutate"),
        ("no reason", "no reason: a.cuh:3:16: sign"),
        ("not rescored", "--rescore"),
        ("low score", "75.0 % is under 95.0 %"),
        ("more mutants", "4 mutants; now there are 5"),
    ],
)
def test_what_is_wrong_is_said(change: str, words: str) -> None:
    (problem,) = problems_after(change)
    assert words in problem


def test_no_record_is_a_problem() -> None:
    assert mutation_record.problems(None, MUTANTS, SOURCES) != []


def test_the_record_survives_its_file(tmp_path: Path) -> None:
    record = record_of(KILLED, SURVIVED, KILLED, KILLED)
    mutation_record.save(record, tmp_path / "record.json")
    assert mutation_record.load(tmp_path / "record.json") == record
    assert mutation_record.load(tmp_path / "none.json") is None


def test_the_hash_is_of_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text("int a;\n")
    first = mutation_record.kernel_hash(tmp_path)
    (tmp_path / "a.cu").write_text("int a;\n")
    assert mutation_record.kernel_hash(tmp_path) == first
    (tmp_path / "a.cuh").rename(tmp_path / "b.cuh")
    assert mutation_record.kernel_hash(tmp_path) != first
