"""Reads records from files: LLaVA json or jsonl, or a parquet file of messages and images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pmod_model.data.broken import BrokenRecords
from pmod_model.data.errors import InputError
from pmod_model.data.images import resolve_image
from pmod_model.data.records import Record, parse_record, parse_records, record_id

PARQUET = ".parquet"


class LazyRecords(Sequence[Record]):
    """Records of a map-style sequence, checked when they are asked for.

    Images of a `datasets.Dataset` stay encoded, so that their size is known before they are
    decoded.

    Args:
        rows: decoded records of either form: a `datasets.Dataset`, a list.
        name: of the data set, in errors.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = _encoded_images(rows)
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """Record `index`; raises InputError if it is malformed."""
        if isinstance(index, slice):
            return Selected(self, range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return parse_record(self.rows[index], f"{self.name} record {index}", index)


class Selected(Sequence[Record]):
    """Some of `records`, in the order of `indices`."""

    def __init__(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        self.records = records
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """Record `index` of those chosen."""
        if isinstance(index, slice):
            return Selected(self.records, self.indices[index])
        return self.records[self.indices[index]]


def id_at(records: Sequence[Record], index: int) -> str:
    """The id of record `index`, even if it is malformed."""
    if isinstance(records, Selected):
        return id_at(records.records, records.indices[index])
    if isinstance(records, LazyRecords):
        return record_id(records.rows[index], index)
    return records[index].id


def load_records(path: Path, broken: BrokenRecords | None = None) -> Sequence[Record]:
    """Read the records of a file; those of `.json` and `.jsonl` are checked at once.

    Args:
        path: a list of records in JSON, one record a line in `.jsonl`, or `.parquet` with columns
            `messages` and `images` (with the package datasets).
        broken: what to do about malformed records; None raises.

    Raises:
        InputError: the file is missing, not what its name says, or empty, or a record is malformed;
            the message names the line or the record.
    """
    place = path.name
    if path.suffix == PARQUET:
        return LazyRecords(_parquet(path), place)
    broken = broken or BrokenRecords()
    if path.suffix == ".jsonl":
        records = _lines(path, broken)
    else:
        raw = _decode(_read(path), place, "file")
        if not isinstance(raw, list) or not raw:
            got = "an empty list" if raw == [] else f"a JSON {type(raw).__name__}"
            raise InputError(place, "file", "a list of records", got)
        records = parse_records(raw, place, broken)
    if not records and not broken.total:
        raise InputError(place, "file", "a list of records", "no record")
    broken.check(len(records) + broken.total, place)
    return records


def check_images(records: Sequence[Record], folder: Path | None, place: str) -> None:
    """Check that every image exists inside `folder`, before a training run depends on it.

    Raises:
        InputError: one does not, or there is no folder.
    """
    seen: set[str] = set()
    for i, record in enumerate(records):
        for name in record.paths:
            where = record.place or f"{place} record {i} (id {record.id!r})"
            if folder is None:
                raise InputError(where, "--image-folder", "the folder of the images", "none")
            if name not in seen:
                resolve_image(folder, name, where)
                seen.add(name)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark at the beginning
    except OSError as error:
        raise InputError("data", f"file {str(path)!r}", "a readable file", error.strerror) from None
    except UnicodeDecodeError as error:
        raise InputError(path.name, "file", "JSON in UTF-8", error) from None


def _lines(path: Path, broken: BrokenRecords) -> list[Record]:
    records = []
    for number, line in _numbered(path):
        place = f"{path.name} line {number}"
        try:
            records.append(parse_record(_decode(line, place, "record"), place, number))
        except InputError as error:
            broken.add(str(number), error)
    return records


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError("data", f"file {str(path)!r}", "a readable file", error.strerror) from None
    except UnicodeDecodeError as error:
        raise InputError(path.name, "file", "JSON in UTF-8", error) from None


def _decode(text: str, place: str, argument: str) -> Any:
    hooks: dict[str, Any] = {
        "object_pairs_hook": lambda pairs: _object(pairs, place, argument),
        "parse_constant": lambda name: _refuse_constant(name, place, argument),
    }
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at line {error.lineno} column {error.colno}"
        hint = "a file of one record a line is named .jsonl" if "Extra data" in error.msg else ""
        raise InputError(place, argument, "JSON", got, hint) from None
    except RecursionError:
        raise InputError(place, argument, "JSON", "lists or objects nested too deep") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        # an integer of more digits than Python reads
        raise InputError(place, argument, "JSON", error) from None


def _object(pairs: list[tuple[str, Any]], place: str, argument: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(place, argument, "each key of an object once", f"{twice!r} twice")
    return found


def _refuse_constant(name: str, place: str, argument: str) -> Any:
    raise InputError(place, argument, "JSON", name)


def _parquet(path: Path) -> Any:
    if not path.is_file():
        raise InputError("data", f"file {str(path)!r}", "a readable file", "none")
    try:
        import datasets
    except ModuleNotFoundError:
        hint = "pip install datasets"
        raise InputError(path.name, "file", "the package datasets", "no package", hint) from None
    try:
        return datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # the library wraps what pyarrow raises in errors of its own
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(path.name, "file", "a parquet file", got) from None


def _encoded_images(rows: Any) -> Any:
    """`rows`, of which a `datasets.Dataset` hands out encoded images instead of decoding them."""
    features = getattr(rows, "features", None)
    for name in ("image", "images"):
        column = (features or {}).get(name)
        if column is None:
            continue
        import datasets

        encoded = datasets.Image(decode=False)
        if isinstance(column, datasets.Image):
            rows = rows.cast_column(name, encoded)
        elif isinstance(getattr(column, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(encoded))
    return rows
