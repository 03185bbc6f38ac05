"""Counts how many small changes of the CUDA kernels the tests notice (`make mutate`).

Each mutant (tools/mutants.py) is built in a copy of the sources and run in the emulator: the
programs of tests/cuda, in one order of threads after the other, and, if none fails, tests/emulated.
A mutant is killed if a test fails, crashes or takes much longer than usual. This takes hours; what
is done is kept in build/mutation, so that --resume goes on after an interruption, or runs survivors
again after tests were added.

The record is docs/mutation.json (tools/mutation_record.py). To every survivor belongs a `reason`,
written into the record by hand: what test could kill it, or why none can, and then `equivalent` is
true. Later runs keep the reasons; --rescore counts again after they were edited.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
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
from mutants import Mutant, mutants_in
from mutation_record import KERNELS, ROOT, Result, kernel_hash
from toolchain import python_include

WORK = ROOT / "build" / "mutation"
RESULTS = WORK / "results.jsonl"
COPIED = ("csrc", "tests/cpp", "tests/cuda", "tests/emulator", "CMakeLists.txt")
PROGRAMS, MODULE = "tests/emulator/pmod_cuda_*_test", "tests/emulator/pmod_emulated.so"
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # tells nothing
SEEDS = (0, 1, 2)  # orders of threads; 0: as they are numbered


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


def copy_changed(source: Path, target: Path) -> None:
    """Makes a folder or file equal to another one; what is equal already keeps its time."""
    files = [f for f in source.rglob("*") if f.is_file()] if source.is_dir() else [source]
    copies = {target / f.relative_to(source): f for f in files}
    for old in set(target.rglob("*")) - set(copies):
        if old.is_file():
            old.unlink()
    for copy, file in copies.items():
        if not copy.is_file() or copy.read_bytes() != file.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


class Worker:
    """A copy of the sources and its build, for one mutant after the other."""

    def __init__(self, number: int) -> None:
        self.tree = WORK / f"worker-{number}"
        self.build = self.tree / "build"
        self.steps: list[Step] = []
        self.seconds: Mapping[Step, float] = {}  # of each step, without a mutant
        self.originals = {f.name: f.read_text() for f in KERNELS.glob("*.cuh")}
        self.mutated = min(self.originals)  # the file that may differ from the original
        self.kills: defaultdict[str, Counter[Step]] = defaultdict(Counter)  # by file

    def set_up(self) -> None:
        """Copies the sources, configures, builds, and finds the tests."""
        for name in COPIED:
            copy_changed(ROOT / name, self.tree / name)
        torch = torchfind.find()
        options = {
            "PMOD_EMULATED": "ON",
            "PMOD_TORCH_DIR": torch.folder if torch else "",
            "PMOD_PYTHON_INCLUDE": python_include(),
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
        }
        configure = ["cmake", "-S", self.tree, "-B", self.build, "-G", "Ninja", "-U", "PMOD_*"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["ninja", "-C", self.build, "-j1"], check=True, stdout=subprocess.DEVNULL)
        self.steps = self._find_steps()

    def _find_steps(self) -> list[Step]:
        """Every test case of tests/cuda in every order, and tests/emulated."""
        steps = []
        for program in sorted(self.build.glob(PROGRAMS)):
            list_cases = (program, "--list-test-cases")
            listed = subprocess.run(list_cases, capture_output=True, text=True, check=True)
            cases = [line for line in listed.stdout.splitlines() if line[:1] not in ("[", "=")]
            target = program.relative_to(self.build).as_posix()
            steps += [Step(target, case, seed) for case in cases for seed in SEEDS]
        return [*steps, Step(MODULE)]

    def _command(self, step: Step) -> tuple[list[str], dict[str, str]]:
        """What runs a step, and the environment that it needs."""
        target = str(self.build / step.target)
        if not step.case:
            pytest = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider"]
            env = {"PMOD_EMULATED_MODULE": target, "OMP_NUM_THREADS": "1"}
            return [*pytest, "tests/emulated"], env
        pattern = step.case.replace(",", "?")  # a comma would separate patterns
        env = {"PMOD_SIMT_SEED": str(step.seed), "PMOD_SIMT_THREADS": "1"}
        return [target, "--abort-after=1", f"--test-case={pattern}"], env

    def compiles(self, target: str) -> bool:
        """Builds a target, if that is possible; at the second attempt, if a compiler was killed."""
        build = ["ninja", "-C", self.build, "-j1", target]
        return quietly(build, None) == 0 or quietly(build, None) == 0

    def run(self, step: Step) -> str:
        """Runs what was built. Returns "" if it passed, else how it failed."""
        # The limit is on the processor's time, for the machine may do other things, too.
        limit = int(10 + 5 * self.seconds.get(step, 600))
        command, env = self._command(step)
        limits = ["prlimit", "--core=0", f"--cpu={limit}:{limit + 5}"]
        code = quietly([*limits, *command], 20 * limit, **env)
        if -code in FROM_OUTSIDE:
            code = quietly([*limits, *command], 20 * limit, **env)
        if code == -signal.SIGXCPU:
            return "time limit"
        return "crash" if code < 0 else "failure" if code else ""

    def measure(self) -> dict[Step, float]:
        """Runs all steps on the kernels as they are; returns how many seconds they take."""
        seconds = {}
        for step in self.steps:
            start = time.monotonic()
            if how := self.run(step):
                sys.exit(f"mutate: {how} without any mutant: {self._command(step)}")
            seconds[step] = time.monotonic() - start
        return seconds

    def judge(self, mutant: Mutant) -> Result:
        """Builds a mutant and runs the steps until one fails."""
        folder = self.tree / KERNELS.relative_to(ROOT)
        if self.mutated != mutant.file:
            (folder / self.mutated).write_text(self.originals[self.mutated])
        self.mutated = mutant.file
        (folder / mutant.file).write_text(mutant.apply(self.originals[mutant.file]))
        built = set()
        for step in self._in_order(self.kills[mutant.file]):
            if step.target not in built and not self.compiles(step.target):
                return Result("does not compile")
            built.add(step.target)
            if how := self.run(step):
                self.kills[mutant.file][step] += 1
                return Result("killed", step.name, how)
        return Result("survived")

    def _in_order(self, kills: Counter[Step]) -> list[Step]:
        """What killed most mutants of this file first, then what is fast; Python at the end."""
        return sorted(self.steps, key=lambda s: (s.target == MODULE, -kills[s], self.seconds[s]))


class Run:
    """Judges mutants with several workers, and keeps what is done in a file."""

    def __init__(self, mutants: Sequence[Mutant], sources: str) -> None:
        self.results: dict[Mutant, Result] = {}
        self.mutants = mutants
        self.sources = sources
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def take_over(self) -> None:
        """Takes results of an earlier run of the same kernels, but for survivors."""
        keys = {m.key: m for m in self.mutants}
        for line in RESULTS.read_text().splitlines() if RESULTS.is_file() else ():
            done = json.loads(line)
            mutant = keys.get(tuple(done["key"]))
            result = Result(*done["result"])
            if mutant and done["sources"] == self.sources:
                self.results[mutant] = result
        self.results = {m: r for m, r in self.results.items() if r.verdict != "survived"}

    def work(self, jobs: int) -> None:
        """Judges the mutants that have no result yet."""
        workers = [Worker(i) for i in range(jobs)]
        todo: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
        for mutant in self.mutants:
            if mutant not in self.results:
                todo.put(mutant)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(Worker.set_up, workers))
            measured = workers[0].measure()
            print(f"without mutants, all tests take {sum(measured.values()):.0f} s", flush=True)
            for worker in workers:
                worker.seconds = measured
            try:
                list(pool.map(lambda worker: self._drain(worker, todo), workers))
            except KeyboardInterrupt:
                print("mutate: stops after the mutants at hand; go on with --resume", flush=True)
                self.stopped.set()
                raise

    def _drain(self, worker: Worker, todo: queue.SimpleQueue[Mutant]) -> None:
        while not self.stopped.is_set():
            try:
                mutant = todo.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            result = worker.judge(mutant)
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
        run.take_over()
    elif len(chosen) == len(everything):
        RESULTS.unlink(missing_ok=True)
    run.work(arguments.jobs)
    made = mutation_record.make({m: run.results[m] for m in chosen}, sources, record)
    print(mutation_record.summary(made))
    if kernel_hash() != sources:
        sys.exit("mutate: the kernels changed meanwhile; nothing was recorded")
    if len(chosen) == len(everything):
        mutation_record.save(made)


if __name__ == "__main__":
    main()
