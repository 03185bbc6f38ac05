"""`pmod train` under torchrun: two ranks leave one run, and resume from what both saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.ranks import TORCHRUN, environment, needs_deepspeed

from pmod_model import load_pretrained

WORKER = Path(__file__).with_name("command_worker.py")
FIELDS = {"turns": 2, "hidden_size": 32, "layers": 4, "image_size": 32, "log_every": 1}
OPTIONS = [word for name, value in FIELDS.items() for word in ("--set", f"{name}={value}")]


def pmod_train(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *TORCHRUN, "--nproc-per-node=2", str(WORKER), "train", "demo"]
    command += ["--output", str(output), "--batch-size", "2", *OPTIONS, *arguments]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("", id="ddp"),
        pytest.param("zero1", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("zero3", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_two_ranks_leave_one_run(tmp_path: Path, engine: str) -> None:
    more = ["--set", f"deepspeed={engine}"] if engine else []
    ended = pmod_train(tmp_path / "run", "--steps", "3", "--set", "save_every=2", *more)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("3 steps of 2") == 1  # the first rank alone speaks
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == facts["files"]
    assert [row["step"] for row in facts["log"]] == [1, 2, 3]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())
    assert facts["parameters"] == sum(
        p.numel() for p in load_pretrained(tmp_path / "run").parameters()
    )
