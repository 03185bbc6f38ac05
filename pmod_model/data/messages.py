"""The records of Hugging Face datasets, as TRL takes them.

`{"messages": [{"role", "content"}, ...], "images": [...]}`: an optional system message, then `user`
and `assistant` in turn. `content` is a list of parts, `{"type": "image"}` or
`{"type": "text", "text"}`, or a text. Images are PIL images, encoded bytes, `{"bytes", "path"}`, or
paths relative to the image folder. If no message says where the images belong, they come before the
first question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from pmod_model.data.errors import InputError
from pmod_model.data.turns import IMAGE, Turn, check_text, kind_of

ImageSource = str | bytes | Image.Image


def image_sources(entry: Mapping[str, Any], place: str) -> tuple[ImageSource, ...]:
    """The images of a record, in `image` or `images`: one, a list, or none.

    Raises:
        InputError: something else is there.
    """
    names = [name for name in ("image", "images") if entry.get(name) is not None]
    if len(names) > 1:
        raise InputError(place, "record", "image or images", "both")
    value = entry[names[0]] if names else ""
    if isinstance(value, str) and not value:
        return ()
    images = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_source(image, names[0], value, place) for image in images)


def parse_messages(messages: Any, images: int, place: str) -> tuple[str, tuple[Turn, ...]]:
    """The system message and the turns of a record with so many images.

    Raises:
        InputError: a message is malformed or out of turn.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        got = "an empty list" if messages == [] else kind_of(messages)
        raise InputError(place, "messages", "a list of messages", got)
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            expected = "an object with role and content"
            raise InputError(place, f"messages[{i}]", expected, kind_of(message))
    first = 1 if messages[0].get("role") == "system" else 0
    system = _content(messages[0], "messages[0].content", place) if first else ""
    if IMAGE in system:
        expected = f"a text without {IMAGE}"
        raise InputError(place, "messages[0].content", expected, IMAGE, kind="image count")
    rest = messages[first:]
    if not rest or len(rest) % 2:
        got = f"{len(rest)} messages"
        raise InputError(place, "messages", "an answer to every question", got)
    values = []
    for i, message in enumerate(rest):
        at = f"messages[{i + first}]"
        role = "assistant" if i % 2 else "user"
        if message.get("role") != role:
            raise InputError(place, f"{at}.role", f'"{role}"', repr(message.get("role")))
        value = _content(message, f"{at}.content", place)
        if not value.replace(IMAGE, "").strip():
            raise InputError(place, f"{at}.content", "a text", "none", kind="no text")
        if i % 2 and IMAGE in value:
            expected = f"an answer without {IMAGE}"
            raise InputError(place, f"{at}.content", expected, IMAGE, kind="image count")
        values.append(value.strip())
    plain = all(isinstance(message.get("content"), str) for message in rest[::2])
    if plain and not any(IMAGE in value for value in values):
        values[0] = IMAGE * images + "\n" * bool(images) + values[0]
    return system.strip(), tuple(Turn(*values[i : i + 2]) for i in range(0, len(values), 2))


def _content(message: Mapping[str, Any], at: str, place: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        check_text(content, place, at)
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(place, at, "a text or a list of parts", kind_of(content))
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            texts.append(IMAGE)
            continue
        text = part.get("text") if isinstance(part, dict) and kind == "text" else None
        if not isinstance(text, str):
            raise InputError(place, f"{at}[{i}]", "a part of type image or text", repr(part)[:80])
        check_text(text, place, f"{at}[{i}]")
        if IMAGE in text:
            # a part says what it is: this one would become an image that is not there
            expected = f"a text without {IMAGE}"
            raise InputError(place, f"{at}[{i}]", expected, repr(text[:80]), kind="image count")
        texts.append(text)
    return "\n".join(texts)


def _source(image: Any, name: str, whole: Any, place: str) -> ImageSource:
    if isinstance(image, dict):
        data = image.get("bytes")
        image = image.get("path") if data is None else data
    if isinstance(image, str):
        check_text(image, place, name)
    if not isinstance(image, (str, bytes, Image.Image)):
        expected = "a path or a list of paths" if name == "image" else "a list of images or paths"
        raise InputError(place, name, expected, kind_of(whole))
    return image
