"""Runs under the preloaded faults.c: saves that are killed or fail at every call, each in a fork.

Prints one JSON line: the number of calls of a save, and the cases that went wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import losses, make_trainer, weights

from pmod_model.data.errors import InputError
from pmod_model.training import checkpoints
from pmod_model.training.durable import Durability

EVERYTHING, WRITE, SYNC = 127, 2, 4
BEFORE, STEP, LAST = 2, 3, 4
faults = ctypes.CDLL(None)


def in_fork(action: Callable[[], Any]) -> tuple[int, Any]:
    """(status of waitpid, what `action` returned) of a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, json.dumps(action()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read()
    status = os.waitpid(child, 0)[1]
    return status, json.loads(text) if text else None


def facts(trainer: Any) -> list[Any]:
    digest = hashlib.sha256(weights(trainer).numpy().tobytes()).hexdigest()
    return [losses(trainer), digest]


def run(folder: Path, steps: int, resume: bool, arm: Any = None, policy: str = "stop") -> Any:
    told: list[str] = []
    durable = Durability(on_save_error=policy, tell=told.append)  # type: ignore[arg-type]
    trainer = make_trainer(folder, LAST, durable, save_total_limit=2)
    save, counted = trainer._save_checkpoint, []

    def save_with_fault(model: Any, trial: Any) -> None:
        if trainer.state.global_step == steps:
            trainer.control.should_training_stop = policy == "stop"
        if arm is None or trainer.state.global_step != STEP:
            return save(model, trial)
        faults.faults_arm(str(folder).encode(), *arm)
        try:
            return save(model, trial)
        finally:
            counted.append(faults.faults_disarm())

    trainer._save_checkpoint = save_with_fault  # type: ignore[method-assign]
    error = ""
    try:
        trainer.train(resume_from_checkpoint=resume)
    except InputError as problem:
        error = str(problem)
    return {"facts": facts(trainer), "calls": counted, "error": error, "told": told}


def check(
    work: Path, template: Path, expected: Any, kinds: int, call: int, error: int, policy: str
) -> str:
    """One case: a save of step 3 that fails at `call`, then a resumed run; "" or what went wrong."""
    folder = work / f"case-{kinds}-{call}-{error}-{policy}"
    shutil.copytree(template, folder)
    status, result = in_fork(lambda: run(folder, STEP, True, (kinds, call, error), policy))
    newest, _ = checkpoints.newest_complete(folder)
    if newest is None or newest.name not in {f"checkpoint-{n}" for n in (BEFORE, STEP, LAST)}:
        return f"call {call}: newest complete is {newest}"
    if (
        checkpoints.find_fault(folder / f"checkpoint-{BEFORE}") is not None
        and newest.name != f"checkpoint-{LAST}"
    ):
        return f"call {call}: checkpoint-{BEFORE} was lost"
    if error:
        if status:
            return f"call {call}: status {status}"
        message = result["error"] or " ".join(result["told"])
        if f"[Errno {error}]" not in message and "bytes to write" not in message:
            return f"call {call}: no error told: {message!r}"
        if policy == "continue" and result["facts"] != expected:
            return f"call {call}: losses differ where training went on"
        if policy == "stop" and (folder / f"checkpoint-{STEP}.tmp").exists():
            return f"call {call}: staging folder left"
    elif status != 9:
        return f"call {call}: not killed, status {status}"
    status, again = in_fork(lambda: run(folder, LAST, True))
    if status or again["facts"] != expected or again["error"]:
        return f"call {call}: resumed run differs from {newest.name}: {again}"
    shutil.rmtree(folder)
    return ""


def main() -> None:
    work, kind, stride = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    kinds, error, policy = {
        "kill": (EVERYTHING, 0, "stop"),
        "full": (WRITE, 28, "stop"),
        "full-continue": (WRITE, 28, "continue"),
        "broken": (SYNC, 5, "stop"),
    }[kind]
    run(work / "warm", 1, False)  # imports what a training imports on its way
    _, whole = in_fork(lambda: run(work / "whole", LAST, False))
    template = work / "template"
    in_fork(lambda: run(template, BEFORE, False))
    shutil.copytree(template, work / "count")
    _, counted = in_fork(lambda: run(work / "count", STEP, True, (kinds, -1, 0)))
    calls = counted["calls"][0]
    cases = range(0, calls, stride)
    wrong = [check(work, template, whole["facts"], kinds, call, error, policy) for call in cases]
    print(json.dumps({"calls": calls, "cases": len(cases), "wrong": [w for w in wrong if w]}))


main()
