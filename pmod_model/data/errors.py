"""The one form in which the data, training and report rooms refuse an input."""

from __future__ import annotations


class InputError(ValueError):
    """An input that cannot be used: where it came from, what was expected and what came.

    Args:
        place: what was being read, for example `train` or `data.json record 5 (id "x")`.
        argument: the argument, field or file at fault.
        expected: what it should be.
        got: what it is.
        hint: what to do about it.
        kind: under which reports count it, for a record of a data set.
    """

    def __init__(
        self,
        place: str,
        argument: str,
        expected: str,
        got: object,
        hint: str = "",
        kind: str = "record",
    ) -> None:
        self.kind = kind
        message = f"pmod {place}: {argument}: expected {expected}, got {got}"
        super().__init__(f"{message}; {hint}" if hint else message)
