"""A rank that dies or stops ends the others with an error that says so, and no rank waits on."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from training.ranks import Ranks, read_progress, start_alone, start_torchrun
from training.ranks_tasks import TIMEOUT_OF_ENDLESS

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def send(running: Ranks, rank: int, number: signal.Signals) -> float:
    """Wait until the ranks train, then signal one of them; returns when."""
    end = time.monotonic() + 240  # imports take long on a busy machine
    try:
        while read_progress(running.folder, rank)["step"] < 3:
            assert time.monotonic() < end, running.log()
            time.sleep(0.05)
        os.kill(read_progress(running.folder, rank)["pid"], number)
    except BaseException:
        running.kill()
        raise
    return time.monotonic()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(rank: int, tmp_path: Path) -> None:
    running = start_alone(tmp_path, "endless", port=free_port())
    since = send(running, rank, signal.SIGKILL)
    codes = running.wait(silence=30)
    assert time.monotonic() - since < 60
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    log = (tmp_path / f"rank-{1 - rank}.log").read_text()
    assert "RuntimeError" in log
    assert "onnection" in log  # "Connection closed by peer" or "reset by peer"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_other_after_the_timeout(rank: int, tmp_path: Path) -> None:
    running = start_alone(tmp_path, "endless", port=free_port())
    since = send(running, rank, signal.SIGSTOP)
    try:
        code = running.processes[1 - rank].wait(timeout=120)
    finally:
        running.kill()
    assert time.monotonic() - since > TIMEOUT_OF_ENDLESS - 1
    assert code == 1
    log = (tmp_path / f"rank-{1 - rank}.log").read_text()
    assert "RuntimeError" in log
    assert f"Timed out waiting {TIMEOUT_OF_ENDLESS * 1000}ms" in log


def test_torchrun_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    running = start_torchrun(tmp_path, "endless")
    send(running, 1, signal.SIGKILL)
    assert running.wait(silence=60) == [1]
    log = running.log()
    assert "ChildFailedError" in log
    assert "Signal 9 (SIGKILL)" in log
    assert "rank      : 1" in log


def test_the_watchdog_names_rank_and_step(tmp_path: Path) -> None:
    running = start_torchrun(tmp_path, "endless")
    send(running, 0, signal.SIGSTOP)
    with pytest.raises(AssertionError, match=r"no progress for 3 s: rank 0: endless, step \d+"):
        running.wait(silence=3)
    assert all(process.poll() is not None for process in running.processes)
