"""Says which lines of the CUDA kernels ran in the emulator, from the counts that gcov keeps.

`tools/cuda_coverage.py build/emulated`, after tests with a build that was configured with
`-DPMOD_COVERAGE=ON`. A line of a template ran if any instantiation in any source file ran it. Exits
with 1 if fewer than `--least` percent of the lines ran.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda"

Counts = dict[int, int]  # how often each line that has code ran


def read_gcov(folder: Path, program: str = "gcov") -> list[dict[str, Any]]:
    """What gcov says of every object file under `folder` that ran: one document each.

    Raises:
        RuntimeError: if nothing was counted, or gcov cannot read it.
    """
    data = sorted(path.resolve() for path in folder.rglob("*.gcda"))
    if not data:
        raise RuntimeError(
            f"no counts under {folder}: configure it with -DPMOD_COVERAGE=ON, build, run the tests"
        )
    command = [program, "--json-format", "--stdout", *map(str, data)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    documents = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode or len(documents) != len(data):
        raise RuntimeError(
            f"{program} read {len(documents)} of {len(data)} files, which need the gcov of the "
            f"compiler that built them (--gcov):\n{ran.stderr.strip()}"
        )
    return documents


def merge(documents: Iterable[dict[str, Any]], folder: Path) -> dict[str, Counts]:
    """The counts of each kernel header in `folder`, over instantiations and source files.

    gcov lists a line once per instantiation of the template that it belongs to.
    """
    merged: dict[str, Counts] = {}
    for document in documents:
        base = Path(document["current_working_directory"])
        for file in document["files"]:
            path = (base / file["file"]).resolve()  # an absolute path stays as it is
            if path.suffix != ".cuh" or path.parent != folder.resolve():
                continue
            counts = merged.setdefault(path.name, {})
            for line in file["lines"]:
                number = line["line_number"]
                counts[number] = counts.get(number, 0) + line["count"]
    return merged


def uncounted(merged: dict[str, Counts], folder: Path) -> list[str]:
    """The headers of `folder` that no object file has code of."""
    return sorted(path.name for path in folder.glob("*.cuh") if path.name not in merged)


def missed(counts: Counts) -> list[int]:
    """The lines that never ran."""
    return sorted(line for line, count in counts.items() if count == 0)


def percent(merged: dict[str, Counts]) -> float:
    """The share of lines that ran; 0 if there are none."""
    lines = sum(len(counts) for counts in merged.values())
    return 100 * (1 - sum(len(missed(c)) for c in merged.values()) / lines) if lines else 0.0


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short, as in "3-5, 9"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def table(merged: dict[str, Counts]) -> str:
    """A line per file, and one for all: how many lines have code, how many ran, which did not."""
    rows = [
        (name, len(counts), percent({name: counts}), ranges(missed(counts)))
        for name, counts in sorted(merged.items())
    ]
    total = ("all", sum(len(counts) for counts in merged.values()), percent(merged), "")
    width = max(len(row[0]) for row in (*rows, total))
    lines = [f"{'file':{width}}  lines      ran  missed"]
    for name, count, share, rest in (*rows, total):
        lines.append(f"{name:{width}}  {count:5}  {share:5.1f} %  {rest}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="the build folder, such as build/emulated")
    parser.add_argument("--least", type=float, default=98, help="percent of the lines (98)")
    parser.add_argument("--gcov", default="gcov", help="the gcov of the compiler (gcov)")
    arguments = parser.parse_args()
    try:
        merged = merge(read_gcov(arguments.build, arguments.gcov), KERNELS)
    except (RuntimeError, FileNotFoundError) as error:
        sys.exit(f"cuda_coverage: {error}")
    print(table(merged))
    unseen = uncounted(merged, KERNELS)
    if unseen:
        sys.exit(f"cuda_coverage: nothing was compiled of {', '.join(unseen)}")
    if percent(merged) < arguments.least:
        sys.exit(f"cuda_coverage: {percent(merged):.1f} % ran, at least {arguments.least:g} % must")


if __name__ == "__main__":
    main()
