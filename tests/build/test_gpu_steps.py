"""The parts of `make gpu`: time, processes that die, peers that are not installed, profiles."""

from __future__ import annotations

import datetime
import json
import sys
import time
import types
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import Cell
from inputs import EPS
from on_gpu import benchmarks, contests, correctness, matrix, measure, results, steps
from on_gpu.child import Child, python, wait
from on_gpu.clocks import HostClock, in_windows
from peers import llama_rmsnorm

STARTED = datetime.datetime(2026, 1, 31, 12, 30, tzinfo=datetime.timezone.utc)


@pytest.fixture
def run(tmp_path: Path) -> steps.Run:
    found = results.new(dry=True, started=STARTED, minutes=1)
    return steps.Run(dry=True, output=tmp_path, until=time.time() + 60, results=found)


def test_a_failed_step_does_not_stop_the_others(
    run: steps.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = []

    def fail(run: steps.Run, seconds: float) -> steps.Outcome:
        budgets.append(seconds)
        raise RuntimeError("made up")

    def succeed(run: steps.Run, seconds: float) -> steps.Outcome:
        budgets.append(seconds)
        return steps.Outcome("passed", "well")

    steps.go(run, [steps.Step("bad", 1, fail), steps.Step("good", 2, succeed)])
    assert [step["status"] for step in run.results["steps"]] == ["failed", "passed"]
    assert run.results["steps"][0]["summary"] == "RuntimeError: made up"
    assert budgets == pytest.approx([20, 60], abs=2)  # what the first does not use is left
    assert "[1/2] bad: failed, RuntimeError: made up" in capsys.readouterr().out
    assert (run.output / "report.md").is_file()


@pytest.mark.parametrize(
    ("code", "ended"),
    [("print('well')", "exit code 0"), ("raise SystemExit(3)", "exit code 3"),
     ("import time; time.sleep(60)", "out of time")],
)  # fmt: skip
def test_how_a_child_ends(tmp_path: Path, code: str, ended: str) -> None:
    seconds = 1 if ended == "out of time" else 60
    child = Child([sys.executable, "-c", code], tmp_path / "log", time.time() + seconds)
    wait([child])
    assert child.ended == ended
    assert child.tail() == ("well" if "well" in code else "")


def test_a_child_that_stalls_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = Child(command, tmp_path / "log", time.time() + 60, alive=tmp_path / "events", stall=0.3)
    wait([child])
    assert child.ended == "stalled"


FAKE = """
import json, os, sys
orders = json.load(open(sys.argv[1]))
def tell(event, **what):
    print(json.dumps({"event": event, **what}), file=open(sys.argv[2], "a"))
tell("hello", backend="made up")
for number, cell in enumerate(orders["cells"]):
    tell("cell", number=number)
    for name in ("ours", "peer", None):
        if [cell["kind"], name] in orders["without"]:
            continue
        tell("candidate", name=name)
        if DIES:
            os._exit(9)
    tell("result", number=number, bytes=1, error=None, candidates={})
"""


def team(
    run: steps.Run, monkeypatch: pytest.MonkeyPatch, dies: str, cells: list[Cell]
) -> benchmarks.Team:
    """A team of fake workers, which die where `dies` is true."""
    script = run.scratch / "fake.py"
    script.write_text(FAKE.replace("DIES", dies))
    monkeypatch.setattr(
        benchmarks, "python", lambda module, *arguments: [sys.executable, script, *arguments]
    )
    found = benchmarks.Team(run, cells, time.time() + 60)
    found.go()
    return found


CELLS = [Cell("a", "tiny"), Cell("b", "tiny"), Cell("a", "tiny", 2)]


def test_a_peer_that_ends_the_process_is_left_out(
    run: steps.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = team(run, monkeypatch, "cell['kind'] == 'b' and name == 'peer'", CELLS)
    entries = found.entries()
    assert [entry["error"] for entry in entries] == [None] * 3
    assert list(found.dropped) == [("b", "peer")]
    assert entries[1]["candidates"]["peer"]["error"] == "the process ended: exit code 9"
    assert "peer" not in entries[0]["candidates"]


@pytest.mark.parametrize("culprit", ["'ours'", "None"])
def test_without_ours_there_is_no_cell(
    run: steps.Run, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    found = team(run, monkeypatch, f"cell['kind'] == 'b' and name == {culprit}", CELLS)
    assert [entry["error"] for entry in found.entries()] == [
        None, "the process ended: exit code 9", None,
    ]  # fmt: skip


def test_a_worker_that_does_not_start_is_an_error(
    run: steps.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "python", lambda *_: [sys.executable, "-c", "1/0"])
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        benchmarks.Team(run, CELLS, time.time() + 60).go()


def test_the_matrix_holds_every_cell_once_and_the_glue_comes_first() -> None:
    cells = matrix.cells()
    assert len(set(cells)) == len(cells)
    assert {cell.device for cell in cells} == {"cuda"}
    assert {cell.kind for cell in cells[:8]} == {"glue-forward", "glue-training"}
    assert {cell.ratio for cell in cells[:8]} == {0.5}
    assert max(cell.vision for cell in cells if cell.kind == "select-normal") == 1_000_000
    assert [matrix.from_json(json.loads(json.dumps(matrix.to_json(c)))) for c in cells] == cells


@pytest.mark.parametrize("ratio", [0.5, 0.15])
@pytest.mark.parametrize("kind", sorted(contests.BUILDERS))
def test_it_is_known_which_cells_have_compiled_peers(
    kind: str, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cell = Cell(kind, "tiny", 1, ratio)
    names = contests.contest(cell).peers
    assert contests.has_compiled(cell) == any(n.startswith("compile") for n in names)


class Stubs:
    """What xformers and Liger document, in plain torch."""

    @staticmethod
    def index_select_cat(sources: Any, indices: Any) -> Any:
        picked = [s[i.long()].flatten() for s, i in zip(sources, indices, strict=True)]
        return torch.cat(picked)

    @staticmethod
    def scaled_index_add(
        input: Any, index: Any, source: Any, scaling: Any = None, alpha: float = 1.0
    ) -> Any:
        return input.index_add_(0, index, source if scaling is None else scaling * source)

    @staticmethod
    def liger_rms_norm(X: Any, W: Any, eps: float, *, in_place: bool) -> Any:
        assert eps == EPS
        assert not in_place
        return llama_rmsnorm(X, W)

    @staticmethod
    def liger_fused_add_rms_norm(X: Any, R: Any, W: Any, eps: float, *, in_place: bool) -> Any:
        assert not in_place
        return llama_rmsnorm(X + R, W), X + R


@pytest.mark.parametrize("kind", sorted(contests.EXTRA))
def test_peers_made_of_other_packages_compute_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("xformers.ops", "liger_kernel.transformers.functional"):
        for name in (module.partition(".")[0], module.rpartition(".")[0], module):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for name in vars(Stubs):
            if not name.startswith("_"):
                monkeypatch.setattr(sys.modules[module], name, getattr(Stubs, name), raising=False)
    contest = contests.contest(Cell(kind, "tiny", 1, 0.5, 64))
    names = [name for name in contest.peers if "xformers" in name or "liger" in name]
    assert names
    with torch.set_grad_enabled(contest.grad):
        entries = measure.admit(contest, HostClock(), lambda name: None)
    for name in names:
        assert "error" not in entries[name].found, entries[name].found


def test_a_peer_that_fails_or_differs_is_recorded_and_not_timed() -> None:
    def fail(rows: Any) -> Any:
        raise ImportError("made up\nin two lines")

    contest = contests.contest(Cell("gather-forward", "tiny", 1, 0.5, 64))
    ours: Callable[[Any], Any] = contest.ours
    contest.peers = {"bad": fail, "wrong": lambda rows: ours(rows) + 1}
    found = measure.measure(contest, HostClock(), 0, lambda name: None)
    assert found["bad"]["error"] == "ImportError: made up"
    assert found["wrong"]["error"].startswith("AssertionError: wrong: result 0 is off by")
    assert not found["bad"]["figures"]
    assert found["ours"]["figures"]["cold"]["rounds"] == measure.LEAST_ROUNDS


def test_what_waits_for_the_device_is_not_captured() -> None:
    entry = measure.Entry(lambda: None, found={"waits": 3})
    measure.capture(entry, HostClock())
    assert entry.replay is None
    assert entry.found["graph_error"] == "it waits for the device 3 times a call"


def test_the_figures_of_another_process_are_told_apart() -> None:
    shape = matrix.to_json(Cell("a", "tiny"))
    cells = [{**shape, "candidates": {"ours": 1, "memcpy": 2}}]
    others = [{**shape, "candidates": {"ours": 3, "memcpy": 4}}, {**shape, "kind": "b"}]
    benchmarks.adopt_triton(cells, others)
    named = {"ours": 1, "memcpy": 2, "triton": 3, "triton_memcpy": 4}
    assert cells[0]["candidates"] == named


Event = namedtuple("Event", "name device_type time_range")
Span = namedtuple("Span", "start end")
CPU, CUDA = types.SimpleNamespace(name="CPU"), types.SimpleNamespace(name="CUDA")


def test_launches_are_counted_by_the_time_of_their_call() -> None:
    events = [
        Event("pmod count a", CPU, Span(1000, 1500)),
        Event("pmod count a", CUDA, Span(1100, 1400)),
        Event("cudaLaunchKernel", CPU, Span(1010, 1020)),
        Event("kernel", CUDA, Span(1100, 1200)),
        Event("Memcpy", CUDA, Span(1200, 1400)),
        Event("pmod count b", CPU, Span(2600, 2900)),
        Event("kernel", CUDA, Span(2590, 2700)),  # the clocks differ a little
    ]
    assert in_windows(["a", "b"], events) == {"a": 2, "b": 1}
    assert in_windows(["a"], events[:1]) == {"a": None}


def test_what_a_sanitizer_found() -> None:
    clean = "12 passed in 3.00s\n========= ERROR SUMMARY: 0 errors\n"
    torchs = (
        "========= Uninitialized __global__ memory read of size 4 bytes\n"
        "=========     at void at::native::made_up_kernel<float>(float *)+0x10\n"
        "12 passed in 3.00s\n========= ERROR SUMMARY: 1 error\n"
    )
    ours = torchs.replace("at::native", "pmod::cuda")
    race = "12 passed in 3.00s\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)\n"

    def status(tool: str, text: str, ended: str = "exit code 0") -> str:
        return correctness.judge(tool, text, ended)["status"]

    assert status("memcheck", clean) == "passed"
    assert status("memcheck", torchs) == "failed"
    assert status("initcheck", torchs) == "passed"
    assert status("initcheck", ours) == "failed"
    assert status("racecheck", race) == "failed"
    assert status("memcheck", clean.replace("12 passed", "1 failed, 11 passed")) == "failed"
    assert status("memcheck", "", "out of time") == "out of time"


def test_counts_and_names_of_failed_tests_are_read(tmp_path: Path) -> None:
    xml = tmp_path / "tests.xml"
    xml.write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">'
        '<testcase classname="tests.gpu.test_ops" name="test_a"><failure/></testcase>'
        '<testcase classname="tests.gpu.test_ops" name="test_b"/></testsuite></testsuites>'
    )
    found = correctness.read(xml)
    assert (found["tests"], found["failures"]) == (2, 1)
    assert found["failed"] == ["tests.gpu.test_ops::test_a"]


def test_the_command_runs_a_module_of_this_python() -> None:
    assert python("pytest", "x") == [sys.executable, "-m", "pytest", "x"]


def test_a_cell_on_another_device_has_the_name_that_it_has_here() -> None:
    cell = Cell("a", "tiny")
    assert str(replace(cell, device="cuda")) == str(cell)
