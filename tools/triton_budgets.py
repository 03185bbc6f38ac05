"""Compiles the Triton kernels ahead of time and holds them to docs/triton-budgets.json.

`tools/triton_budgets.py` compiles every kernel for NVIDIA's architectures, as the ops launch it,
and fails if one spills registers, needs more registers or shared memory than its budget, adds
floats atomically, has lost accesses of 16 bytes, or multiplies a row by its width in 32 bits. For
AMD's gfx942 it fails if one does not compile or spills. `--write` makes the budgets anew from what
the kernels have: the change is then there to be read. No GPU is needed.

The figures are those of one triton release; with another one registers may be 10 % more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cuobjdump
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_variants import Variant, selections, variants

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "docs" / "triton-budgets.json"
LEEWAY = 1.1  # on the registers, of another triton
MOST_REGISTERS = 255  # of a thread
NVIDIA = ("80", "90", "100", "120")
AMD = "gfx942"
# Types and widths: one that models have, a shorter one, and one that is no whole number of vectors.
ROWS = {
    "bf16,4096": (torch.bfloat16, 4096),
    "fp32,2048": (torch.float32, 2048),
    "fp16,1031": (torch.float16, 1031),
}
WIDE = r"\b{}\.global\S*\.(?:v[48]\.b32|v[24]\.b64)"  # 16 bytes or more
EVERYWHERE = ("bf16,4096", "select")  # the others are compiled for one architecture
ONE = "90"
KINDS = (*ROWS, "select")


class Usage(NamedTuple):
    """What a kernel uses on one architecture: bytes, and numbers of instructions."""

    registers: int
    shared: int
    wide_loads: int  # of 16 bytes or more
    wide_stores: int
    spilled: int
    float_atomics: int = 0


COLUMNS = Usage._fields[:4]
Budgets = dict[str, dict[str, dict[str, int]]]  # of each kernel and architecture, by column


Kernels = dict[str, tuple[Variant, tuple[str, ...]]]  # and what each is compiled for


def kernels(kinds: Sequence[str], archs: Sequence[str]) -> Kernels:
    """By name and kind, everything that is compiled."""
    found: Kernels = {}
    for kind in kinds:
        for name, variant in (selections() if kind == "select" else variants(*ROWS[kind])).items():
            wanted = tuple(arch for arch in archs if kind in EVERYWHERE or arch == ONE)
            found[f"{name}<{kind}>"] = variant, wanted
    return found


def compiled(variant: Variant, arch: str) -> Any:
    """The kernel for an architecture; triton keeps what it compiled."""
    position = variant.kernel.arg_names.index
    source = ASTSource(
        variant.kernel,
        variant.signature,
        constexprs=variant.constants,
        attrs={(position(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    target = GPUTarget("hip", arch, 64) if arch == AMD else GPUTarget("cuda", int(arch), 32)
    return triton.compile(source, target=target, options=variant.options)


def usage_on_nvidia(kernel: Any, program: Path) -> Usage:
    """What cuobjdump says of a compiled kernel, and its PTX of the memory that it accesses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = cuobjdump.lines_of(program, "-res-usage", Path(file.name))
        ((registers, stack, _static, local),) = cuobjdump.resources(listing).values()
    ptx = kernel.asm["ptx"]
    loads, stores = (len(re.findall(WIDE.format(kind), ptx)) for kind in ("ld", "st"))
    atomics = len(re.findall(r"\b(?:atom|red)\.global\S*\.b?f(?:16|32|64)", ptx))
    return Usage(registers, kernel.metadata.shared, loads, stores, stack + local, atomics)


def usage_on_amd(kernel: Any) -> Usage:
    """What the assembler's notes say of a compiled kernel: registers are those of vectors.

    What scalar registers spill goes to lanes of those, not to memory, and does not count.
    """
    notes = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"]))
    spilled = int(notes["vgpr_spill_count"])
    return Usage(int(notes["vgpr_count"]), kernel.metadata.shared, 0, 0, spilled)


def narrow_offsets(text: str, hidden: int) -> list[str]:
    """Lines of Triton's IR that multiply something by the width of rows in 32 bits."""
    constants = re.findall(rf"(%\S+) = arith\.constant (?:dense<)?{hidden}>? : \S*i32", text)
    return [
        line.strip()
        for line in text.splitlines()
        if "arith.muli" in line and any(re.search(rf"{re.escape(c)}\b", line) for c in constants)
    ]


def broken_rules(variant: Variant, kernel: Any, usage: Usage) -> Iterator[str]:
    """What no kernel may do, whatever its budget."""
    if usage.spilled:
        yield f"spills {usage.spilled}"
    if usage.float_atomics:
        yield f"{usage.float_atomics} atomic operations on floats"
    hidden = variant.constants.get("HIDDEN")
    for line in narrow_offsets(kernel.asm["ttir"], hidden) if hidden else ():
        yield f"a row's place in 32 bits: {line}"


def overruns(usage: Usage, budget: Mapping[str, int], same_triton: bool) -> Iterator[str]:
    """Where a kernel is beyond its budget."""
    allowed = budget["registers"]
    if not same_triton:
        allowed = min(MOST_REGISTERS, math.ceil(allowed * LEEWAY))
    if usage.registers > allowed:
        yield f"{usage.registers} registers, {allowed} allowed"
    if usage.shared > budget["shared"]:
        yield f"{usage.shared} bytes of shared memory, {budget['shared']} allowed"
    for column in ("wide_loads", "wide_stores"):
        found, expected = getattr(usage, column), budget[column]
        if found < (expected if same_triton else min(expected, 1)):
            yield f"{column}: {found}, {expected} in the budget"


def measure(found: Kernels, program: Path) -> tuple[dict[str, dict[str, Usage]], list[str]]:
    """What every kernel uses on every architecture, and the rules that are broken."""
    usages: dict[str, dict[str, Usage]] = {}
    problems = []
    for name, (variant, archs) in found.items():
        usages[name] = {}
        for arch in archs:
            kernel = compiled(variant, arch)
            on_amd = arch == AMD
            usage = usage_on_amd(kernel) if on_amd else usage_on_nvidia(kernel, program)
            usages[name][arch] = usage
            here = f"{name}, {arch}: "
            problems += [here + text for text in broken_rules(variant, kernel, usage)]
    return usages, problems


def compare(
    usages: Mapping[str, Mapping[str, Usage]], budgets: Budgets, same_triton: bool
) -> list[str]:
    """Where kernels are beyond their budgets, or have none."""
    problems = []
    for name, by_arch in usages.items():
        for arch, usage in by_arch.items():
            if arch == AMD:
                continue
            budget = budgets.get(name, {}).get(arch)
            found = ["has no budget"] if budget is None else overruns(usage, budget, same_triton)
            problems += [f"{name}, {arch}: {text}" for text in found]
    return problems


def encode(usages: Mapping[str, Mapping[str, Usage]]) -> str:
    """The file: a line per kernel, without the names of columns."""
    lines = [
        f"{json.dumps(name)}: "
        + json.dumps({arch: usage[: len(COLUMNS)] for arch, usage in by_arch.items()})
        for name, by_arch in sorted(usages.items())
    ]
    head = f'"triton": {json.dumps(triton.__version__)},\n"columns": {json.dumps(COLUMNS)},\n'
    return "{\n" + head + '"kernels": {\n' + ",\n".join(lines) + "\n}\n}\n"


def decode(text: str) -> tuple[str, Budgets]:
    """The triton release and the budgets of a file."""
    document = json.loads(text)
    columns = document["columns"]
    budgets = {
        name: {arch: dict(zip(columns, row, strict=True)) for arch, row in by_arch.items()}
        for name, by_arch in document["kernels"].items()
    }
    return document["triton"], budgets


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--archs", nargs="+", choices=(*NVIDIA, AMD), default=[*NVIDIA, AMD])
    parser.add_argument("--write", action="store_true", help="make the budgets anew")
    arguments = parser.parse_args()
    program = cuobjdump.find()
    if program is None:
        sys.exit("triton_budgets: no cuobjdump, though triton brings one")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("triton_budgets: unset TRITON_INTERPRET: interpreted kernels are not compiled")
    everything = {*arguments.kinds, *arguments.archs} == {*KINDS, *NVIDIA, AMD}
    if arguments.write and not everything:
        sys.exit("triton_budgets: --write takes all kinds and architectures")
    usages, problems = measure(kernels(arguments.kinds, arguments.archs), program)
    if arguments.write:
        BUDGETS.write_text(encode(usages))
    release, budgets = decode(BUDGETS.read_text())
    problems += compare(usages, budgets, release == triton.__version__)
    most = max(usage.registers for by_arch in usages.values() for usage in by_arch.values())
    print(f"triton {triton.__version__}: {len(usages)} kernels, at most {most} registers")
    print(*problems, sep="\n")
    sys.exit(f"triton_budgets: {len(problems)} problems, see above" if problems else 0)


if __name__ == "__main__":
    main()
