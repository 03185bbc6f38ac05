"""Reads LLaVA-style records: `[{"id", "image", "conversations": [{"from", "value"}, ...]}, ...]`.

`image` is a path relative to the image folder, a list of them, or absent; each `<image>` in a
question stands for one of them, in order. Turns alternate, `human` (or `user`) first, `gpt` (or
`assistant`) second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_model.data.errors import InputError
from pmod_model.data.images import resolve_image

IMAGE = "<image>"
ASKS = ("human", "user")
ANSWERS = ("gpt", "assistant")


@dataclass(frozen=True)
class Turn:
    """One question, which may hold `<image>` markers, and its answer."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        """The question without its image markers."""
        return " ".join(self.question.replace(IMAGE, " ").split())


@dataclass(frozen=True)
class Record:
    """A conversation about `images` (paths relative to the image folder)."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as chat messages with content parts, the form that chat templates take."""
    messages = []
    for turn in turns:
        parts: list[dict[str, str]] = []
        for i, text in enumerate(turn.question.split(IMAGE)):
            if i:
                parts.append({"type": "image"})
            if text.strip():
                parts.append({"type": "text", "text": text.strip()})
        answer = [{"type": "text", "text": turn.answer}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": answer})
    return messages


def load_records(path: Path) -> list[Record]:
    """Read and check a LLaVA json file.

    Raises:
        InputError: the file is missing, not JSON, not a list, empty, or one of its records is
            malformed; the message names the line or the record.
    """
    place = path.name
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("data", f"file {str(path)!r}", "a readable file", error.strerror) from None
    except json.JSONDecodeError as error:
        got = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise InputError(place, "file", "JSON", got) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(place, "file", "JSON in UTF-8", error) from None
    if not isinstance(raw, list) or not raw:
        got = "an empty list" if raw == [] else f"a JSON {type(raw).__name__}"
        raise InputError(place, "file", "a list of records", got)
    return parse_records(raw, place)


def parse_records(raw: Sequence[Any], place: str) -> list[Record]:
    """Check decoded records; `place` is the name of their file in errors."""
    return [_record(entry, f"{place} record {i}") for i, entry in enumerate(raw)]


def check_images(records: Sequence[Record], folder: Path | None, place: str) -> None:
    """Check that every image exists inside `folder`, before a training run depends on it."""
    seen: set[str] = set()
    for i, record in enumerate(records):
        for name in record.images:
            if folder is None:
                where = f"{place} record {i} (id {record.id!r})"
                raise InputError(where, "--image-folder", "the folder of the images", "none")
            if name not in seen:
                resolve_image(folder, name, f"{place} record {i} (id {record.id!r})")
                seen.add(name)


def _record(entry: Any, place: str) -> Record:
    if not isinstance(entry, dict):
        raise InputError(place, "record", "an object", _kind(entry))
    name = entry.get("id", "")
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise InputError(place, "id", "a string or a number", _kind(name))
    place = f"{place} (id {str(name)!r})"
    images = entry.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InputError(place, "image", "a path or a list of paths", _kind(entry["image"]))
    turns = _turns(entry.get("conversations"), place)
    markers = sum(turn.question.count(IMAGE) for turn in turns)
    if markers != len(images):
        raise InputError(
            place, "conversations", f"{len(images)} {IMAGE} for {len(images)} images", markers
        )
    return Record(str(name), tuple(images), turns)


def _turns(messages: Any, place: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        got = "none" if messages is None else "an empty list" if messages == [] else _kind(messages)
        raise InputError(place, "conversations", "a list of messages", got)
    if len(messages) % 2:
        raise InputError(
            place, "conversations", "an answer to every question", f"{len(messages)} messages"
        )
    values = []
    for i, message in enumerate(messages):
        at = f"conversations[{i}]"
        if not isinstance(message, dict):
            raise InputError(place, at, "an object with from and value", _kind(message))
        roles = ANSWERS if i % 2 else ASKS
        if message.get("from") not in roles:
            wanted = " or ".join(f'"{role}"' for role in roles)
            raise InputError(place, f"{at}.from", wanted, repr(message.get("from")))
        value = message.get("value")
        if not isinstance(value, str) or not value.replace(IMAGE, "").strip():
            raise InputError(place, f"{at}.value", "a text", repr(value))
        if i % 2 and IMAGE in value:
            raise InputError(place, f"{at}.value", f"an answer without {IMAGE}", repr(value))
        values.append(value.strip())
    return tuple(Turn(*values[i : i + 2]) for i in range(0, len(values), 2))


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
