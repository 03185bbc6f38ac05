"""A question and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pmod_model.data.errors import InputError

IMAGE = "<image>"


@dataclass(frozen=True)
class Turn:
    """One question, which may hold `<image>` markers, and its answer."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        """The question without its image markers."""
        return " ".join(self.question.replace(IMAGE, " ").split())


def check_text(value: str, place: str, argument: str) -> None:
    """Refuse text that UTF-8 cannot hold, which no tokenizer takes.

    Raises:
        InputError: `value` has a lone surrogate.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        got = f"a lone surrogate at character {error.start}"
        raise InputError(place, argument, "Unicode text", got) from None


def kind_of(value: Any) -> str:
    """The type of a value from JSON, for errors."""
    return "null" if value is None else type(value).__name__
