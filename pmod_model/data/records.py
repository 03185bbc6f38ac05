"""Conversations in one form, and the records that they come from.

LLaVA: `{"id", "image", "conversations": [{"from", "value"}, ...]}`. `image` is a path relative to
the image folder, a list of them, or absent; each `<image>` in a question stands for one of them, in
order. Turns alternate, `human` (or `user`) first, `gpt` (or `assistant`) second.

Hugging Face: `{"messages", "images"}`, see `pmod_model.data.messages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pmod_model.data.broken import BrokenRecords
from pmod_model.data.errors import InputError
from pmod_model.data.messages import ImageSource, image_sources, parse_messages
from pmod_model.data.turns import IMAGE, Turn, check_text, kind_of

ASKS = ("human", "user")
ANSWERS = ("gpt", "assistant")


@dataclass(frozen=True)
class Record:
    """A conversation about `images`.

    Attributes:
        id: its own, or its number in the data set.
        images: paths relative to the image folder, encoded files, or images.
        turns: questions and answers.
        system: what the model is told before them.
        place: where it came from, in errors.
    """

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]
    system: str = ""
    place: str = field(default="", compare=False)

    @property
    def paths(self) -> tuple[str, ...]:
        """Those of `images` that are files."""
        return tuple(image for image in self.images if isinstance(image, str))

    @property
    def image_name(self) -> str | None:
        """The first image's path, or the record's id if the image came with it; None without."""
        if not self.images:
            return None
        return self.paths[0] if isinstance(self.images[0], str) else self.id


def messages_of(turns: Sequence[Turn], system: str = "") -> list[dict[str, Any]]:
    """The turns as chat messages with content parts, the form that chat templates take."""
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
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


def parse_records(
    raw: Sequence[Any], place: str, broken: BrokenRecords | None = None
) -> list[Record]:
    """Check decoded records.

    Args:
        raw: records of either form.
        place: the name of their file in errors.
        broken: what to do about malformed ones; None raises.

    Raises:
        InputError: a record is malformed; names its number and id.
    """
    broken = broken or BrokenRecords()
    records = []
    for i, entry in enumerate(raw):
        try:
            records.append(parse_record(entry, f"{place} record {i}", i))
        except InputError as error:
            broken.add(record_id(entry, i), error)
    return records


def parse_record(entry: Any, place: str, number: int) -> Record:
    """Check one decoded record of either form; `number` is its id if it has none.

    Raises:
        InputError: it is malformed.
    """
    if not isinstance(entry, dict):
        raise InputError(place, "record", "an object", kind_of(entry))
    name = entry.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise InputError(place, "id", "a string or a number", kind_of(name))
    check_text(str(name), place, "id")
    place = f"{place} (id {str(name)!r})"
    forms = [form for form in ("conversations", "messages") if entry.get(form) is not None]
    if len(forms) > 1:
        raise InputError(place, "record", "conversations or messages", "both")
    images = image_sources(entry, place)
    if forms == ["messages"]:
        system, turns = parse_messages(entry["messages"], len(images), place)
    else:
        system, turns = "", _turns(entry.get("conversations"), place)
    markers = sum(turn.question.count(IMAGE) for turn in turns)
    if markers != len(images):
        expected = f"{len(images)} {IMAGE} for {len(images)} images"
        argument = (forms or ["conversations"])[0]
        raise InputError(place, argument, expected, markers, kind="image count")
    return Record(str(name), images, turns, system, place)


def record_id(entry: Any, number: int) -> str:
    """The id of a record that may be malformed."""
    name = entry.get("id") if isinstance(entry, dict) else None
    return str(name) if isinstance(name, (str, int)) else str(number)


def _turns(messages: Any, place: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        absent = "none" if messages is None else "an empty list"
        got = kind_of(messages) if messages else absent
        raise InputError(place, "conversations", "a list of messages", got)
    if len(messages) % 2:
        raise InputError(
            place, "conversations", "an answer to every question", f"{len(messages)} messages"
        )
    values = []
    for i, message in enumerate(messages):
        at = f"conversations[{i}]"
        if not isinstance(message, dict):
            raise InputError(place, at, "an object with from and value", kind_of(message))
        roles = ANSWERS if i % 2 else ASKS
        if message.get("from") not in roles:
            wanted = " or ".join(f'"{role}"' for role in roles)
            raise InputError(place, f"{at}.from", wanted, repr(message.get("from")))
        value = message.get("value")
        if not isinstance(value, str) or not value.replace(IMAGE, "").strip():
            raise InputError(place, f"{at}.value", "a text", repr(value), kind="no text")
        check_text(value, place, f"{at}.value")
        if i % 2 and IMAGE in value:
            expected = f"an answer without {IMAGE}"
            raise InputError(place, f"{at}.value", expected, repr(value), kind="image count")
        values.append(value.strip())
    return tuple(Turn(*values[i : i + 2]) for i in range(0, len(values), 2))
