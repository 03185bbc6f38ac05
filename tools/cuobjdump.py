"""Reads what compiled CUDA kernels use, with NVIDIA's cuobjdump, which needs no GPU.

It lies in a CUDA toolkit and in the triton package, which need not be importable for that.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

RESERVED = 1024  # bytes of shared memory of a block, which are in the figure from sm_90 on
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")
SHORT_NAMES = {"float": "fp32", "Bf16": "bf16", "F16": "fp16", "Absent": "none", "Either": "any"}
SHARE = r"Share<(?P<rows>\w+), (?P<aligned>\w+), \w+, (?P<long>\w+)>"  # of csrc/cuda/row.cuh


class Usage(NamedTuple):
    """What one kernel uses on one architecture: bytes, and numbers of instructions."""

    registers: int
    stack: int
    local: int
    shared: int  # as declared
    threads: int  # at most in a block, by its launch bounds
    loads_128: int
    stores_128: int
    atomics: int
    float_atomics: int
    barriers: int


def find() -> Path | None:
    """Returns the first cuobjdump: of CUDA_HOME, on PATH, in /usr/local/cuda, of triton."""
    places = [Path("/usr/local/cuda/bin/cuobjdump")]
    if found := shutil.which("cuobjdump"):
        places.insert(0, Path(found))
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, Path(home, "bin", "cuobjdump"))
    triton = importlib.util.find_spec("triton")  # does not import it
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        places.append(Path(folder, "backends", "nvidia", "bin", "cuobjdump"))
    return next((place for place in places if os.access(place, os.X_OK)), None)


def lines_of(program: Path, *arguments: str | Path) -> Iterator[str]:
    """Yields what cuobjdump prints, line by line: machine code takes hundreds of megabytes."""
    command = [str(program), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def archs(lines: Iterable[str]) -> list[str]:
    """The architectures in `-lelf`, without the sm_."""
    found = {match[1] for line in lines if (match := re.search(r"\.sm_(\d+[af]?)\.cubin", line))}
    return sorted(found, key=lambda arch: int(re.sub(r"\D", "", arch)))


def resources(lines: Iterable[str]) -> dict[str, tuple[int, int, int, int]]:
    """Registers, stack, shared and local memory of every function in `-res-usage`."""
    found, name = {}, ""
    for line in lines:
        if match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := RESOURCES.search(line):
            registers, stack, shared, local = map(int, match.groups())
            found[name] = registers, stack, shared, local
    return found


def launch_bounds(lines: Iterable[str]) -> dict[str, int]:
    """The most threads in a block of every kernel, in `-elf`."""
    found, name, attribute = {}, "", ""
    for line in lines:
        if line.startswith(".nv.info."):
            name = line.strip().removeprefix(".nv.info.")
        elif match := re.match(r"\s+Attribute:\s+(\w+)", line):
            attribute = match[1]
        elif attribute == "EIATTR_MAX_THREADS" and (match := re.match(r"\s+Value:(.*)", line)):
            x, y, z = (int(size, 16) for size in match[1].split())
            found[name] = x * y * z
            attribute = ""
    return found


def instructions(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """How many instructions of each kind every function in `-sass` has, such as "LDG.E.128"."""
    found: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    for line in lines:
        if match := INSTRUCTION.match(line):
            counts[match[1]] = counts.get(match[1], 0) + 1
        elif match := re.match(r"\s+Function : (\S+)", line):
            counts = found[match[1]] = {}
    return found


def is_float(parts: list[str]) -> bool:
    """Whether the modifiers of an instruction name a floating-point type."""
    return any(re.match(r"B?F(16|32|64)", part) for part in parts[1:])


def usage(
    arch: str, used: tuple[int, int, int, int], threads: int, counts: Mapping[str, int]
) -> Usage:
    """Puts together what the four listings say of one kernel."""
    registers, stack, shared, local = used
    if int(re.sub(r"\D", "", arch)) >= 90:
        shared = max(0, shared - RESERVED)
    kinds = {tuple(kind.split(".")): count for kind, count in counts.items()}
    wide = {kind: count for kind, count in kinds.items() if "128" in kind}
    atomics = {kind: count for kind, count in kinds.items() if kind[0] in ATOMICS}
    return Usage(
        registers,
        stack,
        local,
        shared,
        threads,
        loads_128=sum(count for kind, count in wide.items() if kind[0] == "LDG"),
        stores_128=sum(count for kind, count in wide.items() if kind[0] == "STG"),
        atomics=sum(atomics.values()),
        float_atomics=sum(count for kind, count in atomics.items() if is_float(list(kind))),
        barriers=sum(count for kind, count in kinds.items() if kind[0] == "BAR"),
    )


def split_arguments(text: str) -> list[str]:
    """The template arguments in "A, B<C, D>"."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "<") - (letter == ">")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def short_name(name: str) -> str:
    """A kernel in short: "gather_rmsnorm<bf16,fp32,aligned>" from its demangled name.

    The type of rows, those of weights (none: it has none; any: it finds out), other arguments,
    "short" if it is for rows that fit into registers only, and how rows are accessed.
    """
    text = re.sub(r"\w+::", "", name.removeprefix("void "))
    match = re.fullmatch(r"(\w+?)(?:_kernel)?(?:<(.*)>)?\(.*\)", text)
    if match is None:
        return text
    arguments = split_arguments(match[2]) if match[2] else []
    if share := re.fullmatch(SHARE, arguments[0] if arguments else ""):
        short = ["short"] if share["long"] == "false" else []
        arguments = [share["rows"], *arguments[1:], *short, share["aligned"]]
    if arguments and arguments[0] in SHORT_NAMES and arguments[-1] in ("true", "false"):
        arguments[-1] = "aligned" if arguments[-1] == "true" else "unaligned"
    shown = ",".join(SHORT_NAMES.get(re.sub("<.*", "", part), part) for part in arguments)
    return f"{match[1]}<{shown}>" if shown else match[1]


def demangle(names: Iterable[str]) -> dict[str, str]:
    """The readable form of mangled names, by the c++filt that comes with every compiler."""
    names = list(names)
    ran = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, ran.stdout.splitlines(), strict=True))


def read(library: Path, program: Path) -> dict[str, dict[str, Usage]]:
    """What every kernel of a library uses, as {short name: {architecture: usage}}.

    Raises:
        RuntimeError: if two kernels have one short name.
    """
    kernels: dict[str, dict[str, Usage]] = {}
    for arch in archs(lines_of(program, "-lelf", library)):
        only = ("-arch", f"sm_{arch}", library)
        threads = launch_bounds(lines_of(program, "-elf", *only))
        counts = instructions(lines_of(program, "-sass", *only))
        used = resources(lines_of(program, "-res-usage", *only))
        for mangled, name in demangle(used).items():
            short = short_name(name)
            usages = kernels.setdefault(short, {})
            if arch in usages:
                raise RuntimeError(f"two kernels are called {short}; one is {name}")
            most = threads.get(mangled, 1024)  # without launch bounds
            usages[arch] = usage(arch, used[mangled], most, counts[mangled])
    return kernels


def compiled_with(library: Path) -> str:
    """The release of the CUDA compiler that made a library, as its machine code says."""
    found = re.findall(rb"Cuda compilation tools, release (\d+\.\d+)", library.read_bytes())
    return " ".join(sorted({release.decode() for release in found})) or "unknown"
