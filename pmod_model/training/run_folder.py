"""Folders that `pmod train` leaves: model, processor and `run.json`, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pmod_model.data.errors import InputError

RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"
FORMAT = "pmod-run"


def check_output(output: Path, overwrite: bool, place: str) -> None:
    """Refuse an output folder whose content must not be lost, before any work is done.

    A missing or empty folder is fine. One that holds a pmod run, and nothing that pmod did not
    write, may be replaced with `overwrite`.

    Raises:
        InputError: anything else is at `output`, or the run may not be replaced.
    """
    argument = f"--output {str(output)!r}"
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(place, argument, "a new or empty folder", "something that is not a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    known = _files_of_run(output)
    if known is None:
        got = f"a folder with other content ({_first_name(output)})"
        raise InputError(
            place, argument, "a new or empty folder, or a pmod run", got, "choose another"
        )
    foreign = sorted({entry.name for entry in output.iterdir()} - known)
    if foreign:
        got = f"one that also holds {foreign[0]!r}, which pmod did not write"
        raise InputError(place, argument, "a folder with a pmod run only", got, "choose another")
    if not overwrite:
        hint = "choose another, or pass --overwrite to replace it"
        raise InputError(place, argument, "a new or empty folder", "a pmod run", hint)


@contextmanager
def new_run_folder(output: Path, overwrite: bool, place: str) -> Iterator[Path]:
    """A folder beside `output` to write into; it takes its place when the block ends without error.

    The block must call `write_run`. After an error the folder is removed and `output` is as it was.
    """
    check_output(output, overwrite, place)
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise InputError(
            place, f"--output {str(output)!r}", "a folder to write", error.strerror
        ) from None
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp made it private
        check_output(output, overwrite, place)
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `run.json`: the facts of a run and the names of all files in its folder."""
    names = sorted({entry.name for entry in folder.iterdir()} | {RUN_FILE})
    write_json(folder / RUN_FILE, {"format": FORMAT, "files": names, **facts})


def read_run(folder: Path, place: str) -> dict[str, Any]:
    """Facts of the run in `folder`.

    Raises:
        InputError: there is no run.
    """
    facts = _read_object(folder / RUN_FILE)
    if facts is None or facts.get("format") != FORMAT:
        got = "no folder" if not folder.is_dir() else f"no valid {RUN_FILE} in it"
        hint = f"make one: pmod train --output {folder}"
        raise InputError(place, f"run {str(folder)!r}", "a folder made by pmod train", got, hint)
    return facts


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What `pmod evaluate` wrote into `folder`, or None."""
    return _read_object(folder / EVALUATION_FILE)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file beside `path`, then rename it: readers see the old file or the new one."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text beside `path`, then rename it."""
    write_bytes(path, content.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside `path`, then rename it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    staging = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.chmod(0o644)  # mkstemp made it private
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _replace(staging: Path, output: Path) -> None:
    if not output.exists():
        staging.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    output.rename(old / output.name)
    try:
        staging.rename(output)
    except BaseException:  # Ctrl-C too: the old run goes back to its place
        (old / output.name).rename(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(old)


def _files_of_run(folder: Path) -> set[str] | None:
    facts = _read_object(folder / RUN_FILE)
    if facts is None or facts.get("format") != FORMAT or not isinstance(facts.get("files"), list):
        return None
    return {*map(str, facts["files"]), EVALUATION_FILE}


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _first_name(folder: Path) -> str:
    return min(entry.name for entry in folder.iterdir())
