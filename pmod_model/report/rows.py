"""Rows of a table of measures, p-MoD beside dense, and numbers in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measure of both models; `ratio` is p-MoD over dense, None where it has no meaning."""

    name: str
    note: str
    pmod: str
    dense: str
    ratio: float | None


def make_row(name: str, note: str, values: Sequence[float], show: Callable[[float], str]) -> Row:
    """A row of two values, p-MoD first."""
    ratio = values[0] / values[1] if values[1] else None
    return Row(name, note, show(values[0]), show(values[1]), ratio)


def operations(value: float) -> str:
    """FLOPs in millions, billions or trillions."""
    if value < 1e9:
        return f"{value / 1e6:,.1f} M"
    return f"{value / 1e9:,.1f} G" if value < 1e12 else f"{value / 1e12:,.2f} T"


def amount(value: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    if value < 10 * 2**20:
        return f"{value / 1024:,.0f} KiB"
    return f"{value / 2**20:,.1f} MiB" if value < 10 * 2**30 else f"{value / 2**30:,.1f} GiB"


def milliseconds(value: float) -> str:
    """Seconds in milliseconds."""
    return f"{value * 1e3:,.1f} ms"
