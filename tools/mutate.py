"""Counts how many small changes of the CUDA kernels the tests notice (`make mutate`).

A copy of the sources is built that holds all mutants (tools/mutants.py, tests/emulator/mutant.h).
Each is run in the emulator by the tests that come by it: the programs of tests/cuda, in one order
of threads after the other, and, if none fails, tests/emulated. A mutant is killed if a test fails,
crashes or takes much longer than usual. This takes an hour; what is done is kept in build/mutation,
so that --resume goes on after an interruption, or, after tests were added, runs the survivors again
that have no reason yet.

The record is docs/mutation.json (tools/mutation_record.py). To every survivor belongs a `reason`,
written into the record by hand: what test could kill it, or why none can, and then `equivalent` is
true. Later runs keep the reasons; --rescore counts again after they were edited.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mutation_record
import torchfind
from mutants import Mutant, mutants_in, weave
from mutation_record import KERNELS, ROOT, Result, kernel_hash
from toolchain import python_include

WORK = ROOT / "build" / "mutation"
TREE, BUILD, RESULTS = WORK / "tree", WORK / "build", WORK / "results.jsonl"
COPIED = ("csrc", "tests/cpp", "tests/cuda", "tests/emulator", "CMakeLists.txt")
PROGRAMS, MODULE = "tests/emulator/pmod_cuda_*_test", "tests/emulator/pmod_emulated.so"
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # tells nothing
NO_CODE, NO_CODE_VERDICT = 77, "does not compile"  # the sum of two pointers (mutant.h)
SEEDS = (0, 1)  # orders of threads; 0: as they are numbered
REACHED = WORK / "reached.txt"


class Step(NamedTuple):
    """A test case of a program in one order of threads, or all tests that need Python."""

    target: str  # what has to be built, in the folder of the build
    case: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """What the record calls it."""
        return f"{Path(self.target).name}: {self.case}" if self.case else "tests/emulated"


def quietly(command: Sequence[str | Path], seconds: float | None, **env: str) -> int:
    """Runs a command; returns its exit code, or minus the number of the signal that ended it."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
            start_new_session=True,  # Ctrl-C is for this program: no test may seem to fail of it
        )
    except subprocess.TimeoutExpired:
        return -signal.SIGXCPU
    return done.returncode


def copy_changed(source: Path, target: Path, instead: Mapping[str, str]) -> None:
    """Makes a folder or file equal to another one; what is equal already keeps its time.

    `instead`: text for files of these names.
    """
    files = [f for f in source.rglob("*") if f.is_file()] if source.is_dir() else [source]
    copies = {target / f.relative_to(source): f for f in files}
    for old in set(target.rglob("*")) - set(copies):
        if old.is_file():
            old.unlink()
    for copy, file in copies.items():
        content = instead[file.name].encode() if file.name in instead else file.read_bytes()
        if not copy.is_file() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)


def cpu_seconds() -> float:
    """Processor time of the commands that have run: the machine may do other things, too."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Suite:
    """A build of the kernels with all mutants in them, and the tests that may kill one."""

    def __init__(self, mutants: Sequence[Mutant]) -> None:
        self.numbers = {mutant: number for number, mutant in enumerate(mutants)}
        self.seconds: dict[Step, float] = {}  # of the processor for each step, without a mutant
        self.reached: dict[Step, set[int]] = {}  # the mutants that a step comes by
        self.kills: defaultdict[str, Counter[Step]] = defaultdict(Counter)  # by file

    def build(self) -> None:
        """Copies the sources, puts the mutants in, and builds."""
        woven = {
            file.name: weave(
                file.read_text(), {n: m for m, n in self.numbers.items() if m.file == file.name}
            )
            for file in KERNELS.glob("*.cuh")
        }
        for name in COPIED:
            copy_changed(ROOT / name, TREE / name, woven)
        torch = torchfind.find()
        options = {
            "PMOD_EMULATED": "ON",
            "PMOD_TORCH_DIR": torch.folder if torch else "",
            "PMOD_PYTHON_INCLUDE": python_include(),
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            # a < Other<7>{} < b looks like a mistake; an array's end is passed without a trace
            "CMAKE_CXX_FLAGS": "-w -fsanitize=bounds -fsanitize-undefined-trap-on-error",
        }
        configure = ["cmake", "-S", TREE, "-B", BUILD, "-G", "Ninja", "-U", "PMOD_*"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["ninja", "-C", BUILD], check=True, stdout=subprocess.DEVNULL)

    def measure(self) -> None:
        """Finds the steps, and runs them without a mutant."""
        for step in self._find_steps():
            REACHED.write_text("")
            start = cpu_seconds()
            if how := self.run(step):
                sys.exit(f"mutate: {how} without any mutant: {self._command(step)}")
            self.seconds[step] = cpu_seconds() - start
            self.reached[step] = {int(number) for number in REACHED.read_text().split()}

    def _find_steps(self) -> list[Step]:
        """Every test case of tests/cuda in every order, and tests/emulated."""
        steps = []
        for program in sorted(BUILD.glob(PROGRAMS)):
            list_cases = (program, "--list-test-cases")
            listed = subprocess.run(list_cases, capture_output=True, text=True, check=True)
            cases = [line for line in listed.stdout.splitlines() if line[:1] not in ("[", "=")]
            target = program.relative_to(BUILD).as_posix()
            steps += [Step(target, case, seed) for case in cases for seed in SEEDS]
        return [*steps, Step(MODULE)]

    def _command(self, step: Step) -> tuple[list[str], dict[str, str]]:
        """What runs a step, and the environment that it needs."""
        target = str(BUILD / step.target)
        if not step.case:
            pytest = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider"]
            env = {"PMOD_EMULATED_MODULE": target, "OMP_NUM_THREADS": "1"}
            return [*pytest, "tests/emulated"], env
        pattern = step.case.replace(",", "?")  # a comma would separate patterns
        env = {"PMOD_SIMT_SEED": str(step.seed), "PMOD_SIMT_THREADS": "1"}
        return [target, "--abort-after=1", f"--test-case={pattern}"], env

    def run(self, step: Step, mutant: Mutant | None = None) -> str:
        """Runs a step. Returns "" if it passed, else how it failed."""
        limit = int(3 + 3 * self.seconds.get(step, 600))
        command, env = self._command(step)
        if mutant is None:
            env["PMOD_MUTANTS_REACHED"] = str(REACHED)
        else:
            env["PMOD_MUTANT"] = str(self.numbers[mutant])
        limits = ["prlimit", "--core=0", f"--cpu={limit}:{limit + 5}"]
        code = quietly([*limits, *command], 20 * limit, **env)
        if -code in FROM_OUTSIDE:
            code = quietly([*limits, *command], 20 * limit, **env)
        if code == NO_CODE:
            return NO_CODE_VERDICT
        if code == -signal.SIGXCPU:
            return "time limit"
        return "crash" if code < 0 else "failure" if code else ""

    def judge(self, mutant: Mutant) -> Result:
        """Runs the steps that come by the mutant until one fails."""
        for step in self._in_order(self.kills[mutant.file]):
            if self.numbers[mutant] not in self.reached[step]:
                continue
            if how := self.run(step, mutant):
                if how == NO_CODE_VERDICT:
                    return Result(how)
                self.kills[mutant.file][step] += 1
                return Result("killed", step.name, how)
        return Result("survived")

    def _in_order(self, kills: Counter[Step]) -> list[Step]:
        """What killed most mutants of this file first, then what is fast; Python at the end."""
        return sorted(self.seconds, key=lambda s: (s.target == MODULE, -kills[s], self.seconds[s]))


class Run:
    """Judges mutants with several workers, and keeps what is done in a file."""

    def __init__(self, mutants: Sequence[Mutant], sources: str) -> None:
        self.results: dict[Mutant, Result] = {}
        self.mutants = mutants
        self.sources = sources
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def take_over(self, record: mutation_record.Record | None) -> None:
        """Takes results of an earlier run of the same kernels, but survivors only with a reason."""
        keys = {m.key: m for m in self.mutants}
        explained = {
            mutation_record.key_of(s)
            for s in (record or {"survivors": []})["survivors"]
            if s["reason"]
        }
        for line in RESULTS.read_text().splitlines() if RESULTS.is_file() else ():
            done = json.loads(line)
            mutant = keys.get(tuple(done["key"]))
            result = Result(*done["result"])
            if mutant and done["sources"] == self.sources:
                self.results[mutant] = result
        self.results = {
            m: r for m, r in self.results.items() if r.verdict != "survived" or m.key in explained
        }

    def work(self, suite: Suite, jobs: int) -> None:
        """Judges the mutants that have no result yet."""
        todo: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
        for mutant in self.mutants:
            if mutant not in self.results:
                todo.put(mutant)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(lambda _: self._drain(suite, todo), range(jobs)))
            except KeyboardInterrupt:
                print("mutate: stops after the mutants at hand; go on with --resume", flush=True)
                self.stopped.set()
                raise

    def _drain(self, suite: Suite, todo: queue.SimpleQueue[Mutant]) -> None:
        while not self.stopped.is_set():
            try:
                mutant = todo.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            result = suite.judge(mutant)
            with self.lock:
                self.results[mutant] = result
                line = {"sources": self.sources, "key": mutant.key, "result": result}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                progress = f"[{len(self.results)}/{len(self.mutants)}]"
                seconds = f"{time.monotonic() - start:.0f} s:"
                print(progress, seconds, *filter(None, result), "|", mutant, flush=True)


def select(mutants: Sequence[Mutant], only: Sequence[str], limit: int | None) -> list[Mutant]:
    """Returns the mutants of some files, and of those so many, evenly spread."""
    chosen = [m for m in mutants if not only or m.file in only]
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[i * len(chosen) // limit] for i in range(limit)]


def main() -> None:
    """Entry point of `make mutate`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="file, such as select.cuh")
    parser.add_argument("--limit", type=int, help="as many mutants, evenly spread")
    parser.add_argument("--resume", action="store_true", help="keep what build/mutation holds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--check", action="store_true", help="only check the record")
    parser.add_argument("--rescore", action="store_true", help="only count the record's reasons")
    arguments = parser.parse_args()
    everything, sources, record = mutants_in(KERNELS), kernel_hash(), mutation_record.load()
    chosen = select(everything, arguments.only, arguments.limit)
    if arguments.list:
        print(*chosen, sep="\n")
        return
    if arguments.rescore and record is not None:
        mutation_record.save(mutation_record.rescored(record))
        return
    if arguments.check:
        found = mutation_record.problems(record, everything, sources)
        sys.exit("\n".join(f"docs/mutation.json: {problem}" for problem in found) or None)

    WORK.mkdir(parents=True, exist_ok=True)
    run = Run(chosen, sources)
    if arguments.resume:
        run.take_over(record)
    elif len(chosen) == len(everything):
        RESULTS.unlink(missing_ok=True)
    suite = Suite(everything)
    suite.build()
    suite.measure()
    print(f"without mutants, all tests take {sum(suite.seconds.values()):.0f} s", flush=True)
    run.work(suite, arguments.jobs)
    made = mutation_record.make({m: run.results[m] for m in chosen}, sources, record)
    print(mutation_record.summary(made))
    if kernel_hash() != sources:
        sys.exit("mutate: the kernels changed meanwhile; nothing was recorded")
    if len(chosen) == len(everything):
        mutation_record.save(made)


if __name__ == "__main__":
    main()
