"""A save that is killed, or meets a full or failing disk, at every call that changes files.

https://github.com/Lightning-AI/pytorch-lightning/issues/688: a checkpoint half written is the newest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def crash(shim: Path, folder: Path, kind: str, stride: int) -> dict[str, object]:
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "crash_worker.py"), str(folder), kind, str(stride)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "stride"), [("kill", 40), pytest.param("full", 33, marks=pytest.mark.slow)]
)
def test_some_calls(shim: Path, tmp_path: Path, kind: str, stride: int) -> None:
    result = crash(shim, tmp_path, kind, stride)
    assert result["wrong"] == []
    assert int(str(result["cases"])) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "full", "full-continue", "broken"])
def test_every_call(shim: Path, tmp_path: Path, kind: str) -> None:
    result = crash(shim, tmp_path, kind, 1)
    assert result["wrong"] == []
    assert result["cases"] == result["calls"]
