"""Starts ranks with torchrun, and ends them if they make no progress."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("ranks_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
SHOWN = 4000

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is optional"
)


class Progress:
    """What a rank is at, in a file that the watchdog reads."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank-{rank}.json"
        self.note("start")

    def note(self, doing: str, step: int = 0) -> None:
        text = json.dumps({"pid": os.getpid(), "doing": doing, "step": step})
        staging = self.path.with_suffix(".new")
        staging.write_text(text)
        staging.replace(self.path)


def read_progress(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"rank-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {"doing": "nothing", "step": 0}


def environment(**values: str) -> dict[str, str]:
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    fixed = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "DS_ACCELERATOR": "cpu",  # DeepSpeed would look for a GPU
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **fixed, **values}


@dataclass
class Ranks:
    """Running processes: torchrun, or the ranks themselves."""

    processes: list[subprocess.Popen[bytes]]
    folder: Path
    number: int

    def kill(self) -> None:
        """End everything that was started, stopped ranks too."""
        for rank in range(self.number):
            pid = read_progress(self.folder, rank).get("pid")
            if pid is not None and _is_worker(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def where(self) -> str:
        places = [read_progress(self.folder, rank) for rank in range(self.number)]
        return "; ".join(
            f"rank {rank}: {at['doing']}, step {at['step']}" for rank, at in enumerate(places)
        )

    def wait(self, silence: float = 60.0) -> list[int]:
        """Exit codes, once all have ended.

        Fails, and kills them, if no rank has come further for `silence` seconds.
        """
        try:
            seen, since = "", time.monotonic()
            while any(process.poll() is None for process in self.processes):
                now = self.where()
                if now != seen:
                    seen, since = now, time.monotonic()
                if time.monotonic() - since > silence:
                    raise AssertionError(f"no progress for {silence:.0f} s: {now}\n{self.stacks()}")
                time.sleep(0.1)
            return [process.returncode for process in self.processes]
        finally:
            self.kill()

    def stacks(self) -> str:
        """Where the ranks are in their code, which they print at SIGUSR1."""
        for rank in range(self.number):
            pid = read_progress(self.folder, rank).get("pid")
            if pid is not None and _is_worker(pid):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        return self.log()[-SHOWN:]


def start_torchrun(folder: Path, *worker: str, ranks: int = 2) -> Ranks:
    """Run `ranks_worker.py ARGUMENTS FOLDER` on ranks of this machine."""
    command = [sys.executable, *TORCHRUN, f"--nproc-per-node={ranks}", str(WORKER), *worker]
    with (folder / "torchrun.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(folder)], env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
    return Ranks([process], folder, ranks)


def start_alone(folder: Path, *worker: str, port: int, ranks: int = 2) -> Ranks:
    """The same without torchrun, which ends the others as soon as one rank has died."""
    processes = []
    for rank in range(ranks):
        values = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with (folder / f"rank-{rank}.log").open("wb") as log:
            command = [sys.executable, str(WORKER), *worker, str(folder)]
            processes.append(
                subprocess.Popen(
                    command, env=environment(**values), stdout=log, stderr=subprocess.STDOUT
                )
            )
    return Ranks(processes, folder, ranks)


def run_torchrun(folder: Path, *worker: str, ranks: int = 2) -> str:
    """Output of ranks that must all succeed."""
    running = start_torchrun(folder, *worker, ranks=ranks)
    codes = running.wait()
    assert codes == [0], f"{running.where()}\n{running.log()[-SHOWN:]}"
    return running.log()


def _is_worker(pid: int) -> bool:
    try:
        return WORKER.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
