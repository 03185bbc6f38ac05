"""Tables for the end of a command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pmod_model.report.rows import Row


def print_evaluation(result: dict[str, Any]) -> None:
    """Accuracy of one model beside what can be had without the image."""
    table = Table(title=f"{escape(result['model'])} on {escape(result['data'])}")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("questions", justify="right")
    rows = [("all questions", result), *result["by_kind"].items()]
    blind = result["blind"]
    if blind is not None:
        rows.append(("blind: best answer per question text", blind["per_question"]))
        rows.append((f'always "{escape(blind["majority_answer"])}"', blind["majority"]))
    for name, share in rows:
        table.add_row(name, percent(share), f"{share['total']:,}")
    Console().print(table)


def print_comparison(figures: dict[str, Any], output: Path) -> None:
    """The figures of a report, and where it is."""
    console = Console()
    table = Table(title="p-MoD and its dense twin")
    for name in ("", "p-MoD", "dense", "p-MoD / dense"):
        table.add_column(name, justify="left" if not name else "right")
    shares = {style: share for _, style, share in figures["accuracies"] if style != "blind"}
    table.add_row("accuracy", percent(shares["pmod"]), percent(shares["dense"]), "")
    _add_rows(table, figures["rows"])
    console.print(table)
    for name, style, share in figures["accuracies"]:
        if style == "blind":
            console.print(f"without the image, {escape(name)}: {percent(share)}")
    console.print(escape(figures["speed"]))
    console.print(f"report: {escape(str(output.absolute()))}", soft_wrap=True)


def print_efficiency(figures: dict[str, Any], output: Path) -> None:
    """What a model costs, and where the page is."""
    console = Console()
    table = Table(title=escape(figures["efficiency"].name))
    for name in ("", "p-MoD", "dense", "p-MoD / dense"):
        table.add_column(name, justify="left" if not name else "right")
    _add_rows(table, figures["rows"])
    console.print(table)
    for note in figures["notes"]:
        console.print(escape(note))
    console.print(f"report: {escape(str(output.absolute()))}", soft_wrap=True)


def percent(share: dict[str, Any] | None) -> str:
    """An accuracy and its standard error, or that there is none."""
    if share is None:
        return "not recorded"
    return f"{100 * share['accuracy']:.1f} ± {100 * share['standard_error']:.1f} %"


def _add_rows(table: Table, rows: Sequence[Row]) -> None:
    for row in rows:
        ratio = "" if row.ratio is None else f"{100 * row.ratio:.1f} %"
        table.add_row(f"{row.name}, {escape(row.note)}", row.pmod, row.dense, ratio)
