"""Runs everything that needs a GPU, in one go and in a given time (`make gpu`).

It looks at the device, runs tests/gpu, runs a part of them on the Triton kernels and under
compute-sanitizer, times every op and its peers, and writes build/gpu/results-<gpu>-<date>.json (its
schema: bench/on_gpu/results.py) and build/gpu/report.md. A step that fails is recorded, and the
others go on. `--dry-run` goes through the same steps without a device, at tiny sizes; nothing that
it writes is a measurement.

Exit status: 0 if every step passed or was skipped, 1 if not, 2 if there is no device.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from on_gpu import benchmarks, correctness, facts, results
from on_gpu.steps import Outcome, Run, Step, go

ROOT = Path(__file__).resolve().parents[1]


def note_facts(run: Run, seconds: float) -> Outcome:
    """Fails if the package has no kernels for the GPU; the steps after it will say more."""
    run.results["sources"] = facts.sources()
    run.results["facts"] = found = facts.collect()
    kernels, served = found["backend"]["build"]["cuda"], found["backend"]["devices"]["cuda"]
    compiled = kernels is not None and kernels["problem"] is None
    summary = f"{found['gpu'] or 'no GPU'}, torch {found['torch']}, kernels: {served}"
    usable = run.dry or compiled or served.startswith("Triton")
    return Outcome("passed" if usable else "failed", summary)


STEPS = (
    Step("facts", 0.05, note_facts),
    Step("tests", 0.2, correctness.test),
    Step("triton", 0.08, correctness.test_triton),
    Step("sanitizers", 0.17, correctness.sanitize),
    Step("compilation", 0.12, benchmarks.compile_peers),
    Step("benchmarks", 0.38, benchmarks.time_matrix),
)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for everything (default: 10)")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a device, measuring nothing"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="facts and these")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            f"gpu: there is no CUDA device that torch {torch.__version__} can use here; "
            "--dry-run goes through every step without one",
            file=sys.stderr,
        )
        sys.exit(2)
    started = datetime.now(timezone.utc)
    run = Run(
        dry=arguments.dry_run,
        output=arguments.output.resolve(),
        until=time.time() + 60 * arguments.minutes,
        results=results.new(dry=arguments.dry_run, started=started, minutes=arguments.minutes),
    )
    run.output.mkdir(parents=True, exist_ok=True)
    go(run, [step for step in STEPS if step.name in ("facts", *arguments.steps)])
    print(f"{run.results['label']}; written: {run.save()} and {run.output / 'report.md'}")
    bad = [step for step in run.results["steps"] if step["status"] not in ("passed", "skipped")]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
