"""Holds the CUDA kernels to what docs/cuda-budgets.json allows each of them, per architecture.

`tools/cuda_budgets.py` reads the machine code of the built library and fails if a kernel spills
registers, needs more of them than its budget, has lost 128-bit accesses, adds floats atomically, or
is missing or new. `--write` makes the budgets anew from what the library has: the change is then
there to be read. No GPU is needed; cuobjdump is, which the triton package brings.

The figures are those of one nvcc release. With another one registers may be 10 % more, and an
aligned kernel must have 128-bit accesses, however many; nothing may spill in any case.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cuobjdump
from cuobjdump import Usage

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "docs" / "cuda-budgets.json"
LIBRARY = ROOT / "pmod_ops" / "_C_cuda.abi3.so"
LEEWAY = 1.1  # on the registers, of another nvcc

WARP = 32
SMALL_BLOCK = 256  # threads; the blocks that stream rows of 4096 elements in 16 bits
MOST_REGISTERS = 255  # of a thread
NO_CUOBJDUMP = "there is no cuobjdump; it is part of the CUDA toolkit and of: pip install triton"


class Limits(NamedTuple):
    """What a multiprocessor has: CUDA C++ Programming Guide, compute capabilities."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536
    register_unit: int = 256  # registers of a warp are allocated in these
    warp_unit: int = 4  # warps of a block, for its registers
    shared_unit: int = 128
    shared_reserved: int = 1024  # of each block, by the system


LIMITS = {
    "80": Limits(warps=64, blocks=32, shared=164 << 10),
    "90": Limits(warps=64, blocks=32, shared=228 << 10),
    "100": Limits(warps=64, blocks=32, shared=228 << 10),
    "120": Limits(warps=48, blocks=24, shared=100 << 10),
}


def up(value: int, unit: int) -> int:
    """`value`, rounded up to a multiple of `unit`."""
    return -(-value // unit) * unit


def occupancy(registers: int, shared: int, threads: int, limits: Limits) -> float:
    """The share of a multiprocessor's warps that blocks of one kernel can fill.

    Args:
        registers: of a thread.
        shared: bytes that a block declares.
        threads: of a block.
        limits: of the multiprocessor.
    """
    warps = up(threads, WARP) // WARP
    of_warp = up(max(registers, 1) * WARP, limits.register_unit)
    slots = limits.registers // of_warp // limits.warp_unit * limits.warp_unit
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        slots // warps,
        limits.shared // up(shared + limits.shared_reserved, limits.shared_unit),
    )
    return blocks * warps / limits.warps


# The columns of a kernel's figures on one architecture, in the order of the file.
COLUMNS = (
    *("registers", "shared", "loads_128", "stores_128", "atomics", "barriers"),
    *("occupancy", "occupancy_256"),
)

Budget = dict[str, Any]  # {"threads": ..., arch: {column: figure}}


def figures(usage: Usage, arch: str) -> dict[str, int]:
    """The columns of one kernel; occupancies in percent, with the largest block and a small one."""
    blocks = (usage.threads, min(usage.threads, SMALL_BLOCK))
    filled = [
        math.floor(100 * occupancy(usage.registers, usage.shared, threads, LIMITS[arch]))
        for threads in blocks
    ]
    measured = (getattr(usage, name) for name in COLUMNS[:-2])
    return dict(zip(COLUMNS, (*measured, *filled), strict=True))


def budgets_of(kernels: Mapping[str, Mapping[str, Usage]]) -> dict[str, Budget]:
    """The budgets of {kernel: {arch: usage}}: what each has now."""
    budgets: dict[str, Budget] = {}
    for name, usages in sorted(kernels.items()):
        threads = {usage.threads for usage in usages.values()}
        budget: Budget = {"threads": max(threads)}
        for arch in sorted(usages.keys() & LIMITS.keys(), key=int):
            budget[arch] = figures(usages[arch], arch)
        budgets[name] = budget
    return budgets


def encode(budgets: Mapping[str, Budget], release: str) -> str:
    """The file: a line per kernel, without the names of columns."""
    lines = []
    for name, budget in budgets.items():
        short = {
            key: list(value.values()) if isinstance(value, dict) else value
            for key, value in budget.items()
        }
        lines.append(f"{json.dumps(name)}: {json.dumps(short)}")
    head = f'"nvcc": {json.dumps(release)},\n"columns": {json.dumps(COLUMNS)},\n"kernels": {{\n'
    return "{\n" + head + ",\n".join(lines) + "\n}\n}\n"


def decode(text: str) -> tuple[str, dict[str, Budget]]:
    """The nvcc release and the budgets of a file."""
    document = json.loads(text)
    columns = document["columns"]
    budgets = {
        name: {
            key: dict(zip(columns, value, strict=True)) if isinstance(value, list) else value
            for key, value in budget.items()
        }
        for name, budget in document["kernels"].items()
    }
    return document["nvcc"], budgets


def is_aligned(name: str) -> bool:
    """Whether a kernel accesses rows 16 bytes at a time, by its short name."""
    return name.endswith(("<aligned>", ",aligned>"))


def broken_rules(name: str, usage: Usage) -> Iterator[str]:
    """What no kernel may do, whatever its budget."""
    if usage.stack or usage.local:
        yield f"spills: {usage.stack} bytes of stack, {usage.local} of local memory"
    if usage.float_atomics:
        yield f"{usage.float_atomics} atomic operations on floats"
    if is_aligned(name) and not (usage.loads_128 or usage.stores_128):
        yield "no 128-bit access, though its rows are aligned"


def overruns(usage: Usage, budget: Mapping[str, int], same_nvcc: bool) -> Iterator[str]:
    """Where a kernel is beyond its budget."""
    allowed = budget["registers"]
    if not same_nvcc:
        allowed = min(MOST_REGISTERS, math.ceil(allowed * LEEWAY))
    if usage.registers > allowed:
        yield f"{usage.registers} registers, {allowed} allowed"
    for column, what in (("loads_128", "loads"), ("stores_128", "stores")):
        found, expected = getattr(usage, column), budget[column]
        if found < (expected if same_nvcc else min(expected, 1)):
            yield f"{found} {what} of 128 bits, {expected} in the budget"
    for column in ("shared", "atomics", "barriers") if same_nvcc else ():
        found, expected = getattr(usage, column), budget[column]
        if found > expected:
            yield f"{column}: {found}, {expected} in the budget"


def compare(
    kernels: Mapping[str, Mapping[str, Usage]], budgets: Mapping[str, Budget], same_nvcc: bool
) -> tuple[list[str], list[str]]:
    """What is wrong with the kernels, and what is merely otherwise with another nvcc.

    Only architectures that the library was built for are looked at.
    """
    problems, notes = [], []
    built = sorted(
        {arch for usages in kernels.values() for arch in usages} & LIMITS.keys(), key=int
    )
    for name in sorted(kernels.keys() | budgets.keys()):
        usages, budget = kernels.get(name), budgets.get(name)
        if usages is None or budget is None:
            problems.append(f"{name}: {'not in the library' if budget else 'has no budget'}")
            continue
        for arch in built:
            here = f"{name}, sm_{arch}: "
            if arch not in usages or arch not in budget:
                problems.append(f"{here}{'not built' if arch in budget else 'has no budget'}")
                continue
            usage, allowed = usages[arch], budget[arch]
            problems += [here + text for text in broken_rules(name, usage)]
            problems += [here + text for text in overruns(usage, allowed, same_nvcc)]
            if usage.threads != budget["threads"]:
                problems.append(f"{here}{usage.threads} threads, {budget['threads']} in the budget")
            if not same_nvcc and usage.registers != allowed["registers"]:
                notes.append(f"{here}{usage.registers} registers, budget {allowed['registers']}")
    return problems, notes


def summary(kernels: Mapping[str, Mapping[str, Usage]]) -> str:
    """The library in short: a line per architecture."""
    lines = []
    for arch, limits in LIMITS.items():
        usages = [usages[arch] for usages in kernels.values() if arch in usages]
        if not usages:
            continue
        least = min(
            occupancy(u.registers, u.shared, min(u.threads, SMALL_BLOCK), limits) for u in usages
        )
        lines.append(
            f"sm_{arch}: {len(usages)} kernels, at most {max(u.registers for u in usages)} "
            f"registers, {sum(u.stack + u.local for u in usages)} bytes spilled, {100 * least:.0f} "
            f"% occupancy or more with blocks of {SMALL_BLOCK} threads"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, default=LIBRARY, help="_C_cuda.abi3.so")
    parser.add_argument("--write", action="store_true", help="make the budgets anew")
    arguments = parser.parse_args()
    program = cuobjdump.find()
    if program is None:
        sys.exit(f"cuda_budgets: {NO_CUOBJDUMP}")
    if not arguments.library.is_file():
        sys.exit(f"cuda_budgets: no {arguments.library}: build it where there is an nvcc")
    kernels = cuobjdump.read(arguments.library, program)
    release = cuobjdump.compiled_with(arguments.library)
    if arguments.write:
        if missing := LIMITS.keys() - set.intersection(*(set(u) for u in kernels.values())):
            sys.exit(f"cuda_budgets: not built for {sorted(missing)}: unset PMOD_CUDA_ARCHS")
        BUDGETS.write_text(encode(budgets_of(kernels), release))
    expected, budgets = decode(BUDGETS.read_text())
    problems, notes = compare(kernels, budgets, release == expected)
    print(summary(kernels))
    if release != expected:
        print(f"The budgets are of nvcc {expected}, this is {release}: {len(notes)} differences")
    print(*notes, *problems, sep="\n")
    sys.exit(f"cuda_budgets: {len(problems)} problems, see above" if problems else 0)


if __name__ == "__main__":
    main()
