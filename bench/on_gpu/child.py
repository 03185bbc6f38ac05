"""A child process with a time limit, which is ended with everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_TIME, STALLED = "out of time", "stalled"
POLL = 0.05
TAIL = 20  # lines


class Child:
    """A running command.

    Args:
        command: what to run. Not in the root of the sources: there Python would find the folder
            pmod_ops before the installed package.
        log: where its output goes; its folder is the working folder.
        until: the time (of `time.time`) at which it is ended.
        env: added to the environment.
        alive: a file that it writes to; if that does not grow for `stall` seconds, it is ended.
        stall: see `alive`.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        until: float,
        env: Mapping[str, str] | None = None,
        alive: Path | None = None,
        stall: float = 120,
    ) -> None:
        self.log, self.until, self.alive, self.stall = log, until, alive, stall
        paths = [str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
        path = {"PYTHONPATH": os.pathsep.join(paths)}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=log.parent,
                env={**os.environ, **path, **(env or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.ended: str | None = None
        self._size, self._grown = 0, time.time()

    def poll(self) -> str | None:
        """How it ended: "exit code N", "out of time" or "stalled"; None while it runs."""
        if self.ended is None:
            if self.process.poll() is not None:
                self.ended = f"exit code {self.process.returncode}"
            elif time.time() > self.until:
                self._end(OUT_OF_TIME)
            elif self._stalled():
                self._end(STALLED)
        return self.ended

    def tail(self) -> str:
        """The last lines of its output."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL:])

    def _stalled(self) -> bool:
        if self.alive is None:
            return False
        size = self.alive.stat().st_size if self.alive.is_file() else 0
        if size != self._size:
            self._size, self._grown = size, time.time()
        return time.time() - self._grown > self.stall

    def _end(self, how: str) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.ended = how


def wait(children: Iterable[Child]) -> None:
    """Until all of them have ended."""
    try:
        running = list(children)
        while running:
            running = [child for child in running if child.poll() is None]
            time.sleep(POLL if running else 0)
    finally:
        for child in children:
            if child.poll() is None:
                child.until = 0
                child.poll()


def python(module: str | Path, *arguments: str | Path) -> list[str | Path]:
    """The command that runs a module."""
    return [sys.executable, "-m", module, *arguments]
