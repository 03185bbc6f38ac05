"""The steps of a run: each has a share of the time, and a failed one does not stop the others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from on_gpu import report
from on_gpu.results import Results, dump, file_name, save


class Outcome(NamedTuple):
    """What became of a step, in a word (see `results.py`) and in a line."""

    status: str
    summary: str


@dataclass
class Run:
    """What the steps of one run share.

    Attributes:
        dry: go through everything without a device.
        output: the folder for the results.
        until: the time (of `time.time`) at which it should be over.
        results: see `results.py`; steps write into it.
    """

    dry: bool
    output: Path
    until: float
    results: Results

    @property
    def scratch(self) -> Path:
        """The folder for logs and what processes tell each other."""
        folder = self.output / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save(self) -> Path:
        """Write the results as they are now, and the report; returns the path of the results."""
        path = self.output / file_name(self.results)
        save(path, dump(self.results))
        save(self.output / "report.md", report.markdown(self.results))
        return path


@dataclass(frozen=True)
class Step:
    """One step: its part of the time that the steps which are left share, and what it does."""

    name: str
    share: float
    do: Callable[[Run, float], Outcome]


def say(line: str) -> None:
    """A line of status, at once."""
    print(line, flush=True)


def go(run: Run, steps: Sequence[Step]) -> None:
    """All steps in order. Time that one does not need is there for those after it."""
    for number, step in enumerate(steps):
        left = max(0.0, run.until - time.time())
        budget = left * step.share / sum(s.share for s in steps[number:])
        title = f"[{number + 1}/{len(steps)}] {step.name}"
        say(f"{title}: up to {budget:.0f} s")
        start = time.monotonic()
        try:
            outcome = step.do(run, budget)
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            run.save()
            raise
        seconds = time.monotonic() - start
        say(f"{title}: {outcome.status}, {outcome.summary} ({seconds:.1f} s)")
        run.results["steps"].append(
            {
                "name": step.name,
                "status": outcome.status,
                "summary": outcome.summary,
                "seconds": round(seconds, 1),
                "budget_s": round(budget, 1),
            }
        )
        run.save()
