"""Reads and writes the files of a checkpoint folder. A folder is complete or not there."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SHOWN = 20


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, on the CPU.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a key that the index lists is in no shard.
    """
    for name, load in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.exists():
            wanted: dict[str, str] = read_json(index)["weight_map"]
            state: dict[str, Tensor] = {}
            for shard in sorted(set(wanted.values())):
                state |= load(existing(folder / Path(shard).name))
            missing = sorted(wanted.keys() - state.keys())
            if missing:
                fail(f"{index.name}", "shards with every key", f"none for {listed(missing)}")
            return state
        if (folder / name).exists():
            return load(folder / name)
    names = " or ".join(name for name, _ in WEIGHTS)
    raise FileNotFoundError(f"convert: {folder}: expected {names}, or an index of shards, got none")


def check_absent(destination: Path) -> None:
    """Refuse a destination that exists."""
    if destination.exists():
        fail("destination", "a folder to make", f"{destination}, which exists")


@contextmanager
def beside(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that becomes it when the block ends, and goes if it fails."""
    check_absent(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy those of the named files that are in `source` and not yet in `folder`."""
    for name in names:
        if (source / name).exists() and not (folder / name).exists():
            shutil.copy(source / name, folder / name)


def existing(file: Path) -> Path:
    """`file`, if it is one."""
    if not file.is_file():
        raise FileNotFoundError(f"convert: {file}: expected a file, got none")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        return json.loads(existing(file).read_text())
    except json.JSONDecodeError as error:
        fail(str(file), "JSON", str(error))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, readable."""
    file.write_text(json.dumps(values, indent=2) + "\n")


def listed(keys: Collection[str]) -> str:
    """Keys for a message, not too many of them."""
    shown = sorted(keys)[:SHOWN]
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return (", ".join(shown) or "none") + more


def fail(name: str, expected: str, got: object) -> NoReturn:
    """Raise the error of a conversion."""
    raise ValueError(f"convert: {name}: expected {expected}, got {got}")


def _load_safe(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        fail(str(file), "a whole safetensors file", error)


def _load_pickled(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, EOFError, RuntimeError):
        fail(str(file), "tensors alone", "a broken file, or objects that are not unpickled")


WEIGHTS: tuple[tuple[str, Callable[[Path], dict[str, Tensor]]], ...] = (
    ("model.safetensors", _load_safe),
    ("pytorch_model.bin", _load_pickled),
)
