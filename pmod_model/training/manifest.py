"""The manifest of a checkpoint: what it says, and whether the files are those it means."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
FORMAT, VERSION = "pmod-checkpoint", 1

Fingerprint = Mapping[str, Any] | str


class Fault(NamedTuple):
    """Why a checkpoint is not complete: the file at fault, what it should be and what it is."""

    path: Path
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Facts:
    """What a manifest says about a run besides its files.

    Attributes:
        step: optimiser steps done.
        config: settings that a resumed run must share, as JSON values.
        data: what identifies the data, as JSON values.
        world_size: ranks that saved.
        versions: of the libraries, for information.
    """

    step: int
    config: Fingerprint
    data: Fingerprint
    world_size: int
    versions: Mapping[str, str]


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"checkpoint-{step}"


def write_manifest(folder: Path, facts: Facts) -> None:
    """Write the manifest of the files in `folder`, and flush it."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": facts.step,
        "config": facts.config,
        "data": facts.data,
        "world_size": facts.world_size,
        "versions": dict(facts.versions),
        "files": {p.relative_to(folder).as_posix(): _entry(p) for p in files_below(folder)},
    }
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(_signed(content))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def find_fault(checkpoint: Path, *, contents: bool = True) -> Fault | None:
    """What is wrong with a checkpoint, or None.

    Args:
        checkpoint: its folder.
        contents: whether to compare SHA-256 sums, which reads every byte, or sizes only.
    """
    try:
        return _find_fault(checkpoint, contents)
    except OSError as error:
        return Fault(Path(error.filename or checkpoint), "a readable file", str(error.strerror))


def _find_fault(checkpoint: Path, contents: bool) -> Fault | None:
    path = checkpoint / MANIFEST
    if not path.is_file():
        return Fault(path, "a manifest, written last", "none: the save did not end")
    text = path.read_bytes()
    manifest = _parse(text)
    if manifest is None:
        return Fault(path, "a manifest with its own SHA-256 sum", "another sum, or no JSON")
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        got = f"{manifest['format']} {manifest['version']}"
        return Fault(path, f"{FORMAT} {VERSION}", got)
    if checkpoint.name != checkpoint_name(manifest["step"]):
        return Fault(path, f"the step of {checkpoint.name}", f"step {manifest['step']}")
    present = {item.relative_to(checkpoint).as_posix(): item for item in files_below(checkpoint)}
    del present[MANIFEST]
    for name in sorted({*manifest["files"], *present}):
        if name not in present:
            return Fault(checkpoint / name, "a file", "none")
        if name not in manifest["files"]:
            return Fault(checkpoint / name, "no such file", "one that the manifest lacks")
        fault = _compare(present[name], manifest["files"][name], contents)
        if fault is not None:
            return fault
    return None


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        manifest = json.loads(text)
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        return manifest if text == _signed(rest).encode("utf-8") else None
    except (ValueError, AttributeError):
        return None


def _compare(path: Path, entry: Mapping[str, Any], contents: bool) -> Fault | None:
    if path.is_symlink() or not path.is_file():
        return Fault(path, "a regular file", "something else")
    if path.stat().st_size != entry["size"]:
        return Fault(path, f"{entry['size']} bytes", f"{path.stat().st_size}")
    if contents and (digest := sha256_of(path)) != entry["sha256"]:
        return Fault(path, f"sha256 {entry['sha256'][:12]}...", f"{digest[:12]}...")
    return None


def files_below(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is not a folder, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def sha256_of(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _signed(content: Mapping[str, Any]) -> str:
    """The one text of a manifest: a change of any byte of it is noticed."""
    text = json.dumps(content, sort_keys=True)
    signed = {**content, "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}
    return json.dumps(signed, indent=1, sort_keys=True) + "\n"
