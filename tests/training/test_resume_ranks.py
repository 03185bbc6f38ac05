"""Two gloo ranks: a resumed run is the whole run; one rank that fails in a save ends both.

https://github.com/NVIDIA-NeMo/Automodel/issues/3254: the other ranks hang.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pmod_model.training.checkpoints import newest_complete

HERE = Path(__file__).parent


def launch(
    folder: Path, steps: int, how: str, failing: int = -1
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "resume_worker.py"), str(folder), str(steps), how, str(failing)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def results(folder: Path) -> list[Any]:
    return [
        json.loads((folder.parent / f"{folder.name}-{rank}.json").read_text()) for rank in (0, 1)
    ]


@pytest.mark.slow
def test_a_resume_of_two_ranks_is_bitwise(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, steps, how in ((whole, 5, "new"), (halves, 4, "new"), (halves, 5, "resume")):
        ended = launch(folder, steps, how)
        assert ended.returncode == 0, ended.stderr
    for once, again in zip(results(whole), results(halves), strict=True):
        assert again["losses"] == once["losses"]
        assert again["digest"] == once["digest"]
        assert again["seen"] == once["seen"][4:]
    first = sorted(sample for result in results(whole) for sample in result["seen"][:3])
    assert first == [[0, index] for index in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_that_fails_in_a_save_ends_both(tmp_path: Path, failing: int) -> None:
    begin = time.monotonic()
    ended = launch(tmp_path / "run", 5, "new", failing)
    assert ended.returncode != 0
    # starting two processes takes most of it; a hang would last as long as gloo's 30 minutes
    assert time.monotonic() - begin < 60 + 60
    assert "No space left on device" in ended.stderr
    newest, _ = newest_complete(tmp_path / "run")
    assert newest == tmp_path / "run" / "checkpoint-1"
