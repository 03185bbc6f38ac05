"""Checkpoints that are complete or not there: how they are written, verified, chosen and rotated.

A save goes into `checkpoint-N.tmp/checkpoint-N`. When all its files are flushed to the disk,
`manifest.json` with their sizes and SHA-256 sums is written last, and the folder is renamed to
`checkpoint-N`. A folder counts as complete only if its manifest verifies, whatever its times say.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pmod_model.data.errors import InputError
from pmod_model.training.guards import LOCK_FILE
from pmod_model.training.manifest import (
    Facts,
    Fault,
    Fingerprint,
    checkpoint_name,
    files_below,
    find_fault,
    read_manifest,
    write_manifest,
)

UNFINISHED, REPLACED, ROTATED = ".tmp", ".replaced", ".rotated"
FINGERPRINTS = ("config", "data", "world_size")
_NAME = re.compile(r"checkpoint-(\d+)")
_ABSENT = "nothing"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Durability:
    """How a run saves and resumes.

    Attributes:
        config: settings that a resumed run must share: JSON values, or one string.
        data: what identifies the data, likewise.
        allow_change: resume although `config`, `data` or the number of ranks differ.
        on_save_error: whether a full or failing disk stops training, or is a warning.
        tell: called with each line for the user.
    """

    config: Fingerprint = field(default_factory=dict)
    data: Fingerprint = field(default_factory=dict)
    allow_change: bool = False
    on_save_error: Literal["stop", "continue"] = "stop"
    tell: Callable[[str], None] = _say


def new_staging(folder: Path, step: int) -> Path:
    """An empty `checkpoint-N.tmp` in `folder`; a leftover of a crash at this step is removed."""
    staging = folder / (checkpoint_name(step) + UNFINISHED)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def commit(staging: Path, facts: Facts) -> Path:
    """Make the files in `staging/checkpoint-N` durable and give them their place beside `staging`.

    What is in that place already is renamed, not deleted.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: the disk is full or failing; checkpoints made before are as they were.
    """
    source = staging / checkpoint_name(facts.step)
    final = staging.parent / source.name
    for path in files_below(source):
        _refuse_cut_archive(path)
        sync(path)
    write_manifest(source, facts)
    for parent in {path.parent for path in files_below(source)} | {source}:
        sync(parent)
    if final.exists():
        set_aside(final)
    source.rename(final)
    sync(final.parent)
    staging.rmdir()
    return final


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that no run resumes from it or replaces it."""
    number = 1
    while (place := checkpoint.with_name(f"{checkpoint.name}{REPLACED}-{number}")).exists():
        number += 1
    checkpoint.rename(place)
    return place


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything named like a checkpoint, the highest step first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_complete(folder: Path) -> tuple[Path | None, list[Fault]]:
    """The complete checkpoint of the highest step, and why each newer one was passed over."""
    faults = []
    for _, path in checkpoints_in(folder):
        fault = find_fault(path)
        if fault is None:
            return path, faults
        faults.append(fault)
    return None, faults


def check_checkpoint(checkpoint: Path, place: str) -> dict[str, Any]:
    """The manifest of a checkpoint that a user named.

    Raises:
        InputError: it is not complete; says which is the last complete one beside it.
    """
    fault = find_fault(checkpoint)
    if fault is not None:
        last, _ = newest_complete(checkpoint.parent)
        hint = f"the last complete one is {last.name}" if last else "there is no complete one"
        try:
            argument = str(fault.path.relative_to(checkpoint.parent))
        except ValueError:
            argument = str(fault.path)
        raise InputError(place, argument, fault.expected, fault.got, hint)
    return read_manifest(checkpoint)


def size_of(checkpoint: Path) -> int:
    """Bytes of the files below a folder."""
    return (
        sum(path.stat().st_size for path in files_below(checkpoint)) if checkpoint.is_dir() else 0
    )


def check_unchanged(checkpoint: Path, facts: Facts, place: str) -> None:
    """Refuse to go on with other settings, data or number of ranks.

    Raises:
        InputError: lists every field that differs.
    """
    manifest = read_manifest(checkpoint)
    before: dict[str, Any] = {}
    now: dict[str, Any] = {}
    for name in FINGERPRINTS:
        _flatten(name, manifest[name], before)
        _flatten(name, json.loads(json.dumps(getattr(facts, name))), now)
    changed = [n for n in sorted({*before, *now}) if before.get(n, _ABSENT) != now.get(n, _ABSENT)]
    if changed:
        expected = ", ".join(f"{name} = {before.get(name, _ABSENT)!r}" for name in changed)
        got = ", ".join(f"{name} = {now.get(name, _ABSENT)!r}" for name in changed)
        hint = "resume with the settings of the checkpoint, or allow the change"
        raise InputError(place, f"resume from {checkpoint.name}", expected, got, hint)


def rotate(folder: Path, keep: int, protected: Path | None = None) -> None:
    """Delete old complete checkpoints; the newest `keep` (at least 2) complete ones stay.

    Two of them are verified byte by byte before anything is deleted. Damaged ones stay as well: to
    delete them is for the user.

    Args:
        folder: where the checkpoints are.
        keep: how many stay.
        protected: one that stays whatever its age, that of the best metric.
    """
    for leftover in folder.glob(f"checkpoint-*{ROTATED}"):
        shutil.rmtree(leftover, ignore_errors=True)
    complete = 0
    for _, path in checkpoints_in(folder):
        if find_fault(path, contents=complete < 2) is not None:
            continue
        complete += 1
        if complete <= max(keep, 2) or (protected is not None and path == protected):
            continue
        # renamed first: a half deleted folder must not look like a damaged checkpoint
        going = path.with_name(path.name + ROTATED)
        path.rename(going)
        shutil.rmtree(going)


def remove_complete(folder: Path) -> None:
    """Delete the complete checkpoints of a run that needs them no more, and the folder if empty.

    Damaged ones, those set aside and anything else in the folder stay.
    """
    for _, path in checkpoints_in(folder):
        if find_fault(path, contents=False) is None:
            shutil.rmtree(path)
    (folder / LOCK_FILE).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _refuse_cut_archive(path: Path) -> None:
    """`torch.save` does not notice when the last write of a file, at its closing, fails."""
    if path.suffix not in {".pt", ".pth", ".bin"}:
        return
    with open(path, "rb") as file:
        start = file.read(2)
    if not start or (start == b"PK" and not zipfile.is_zipfile(path)):
        raise OSError(errno.EIO, "was written incompletely", str(path))


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, into)
    else:
        into[name] = value
