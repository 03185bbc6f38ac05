"""Writes report.html: one file, no request leaves it, all text escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmod_model.data.errors import InputError
from pmod_model.report.comparison import (
    PLACE,
    Run,
    accuracy_gain,
    cost_rows,
    load_runs,
    speed_note,
)
from pmod_model.report.examples import choose_examples
from pmod_model.report.page import check_page_path, render_page
from pmod_model.report.pictures import loss_curves
from pmod_model.report.rows import Row
from pmod_model.training.answering import record_question
from pmod_model.training.run_folder import write_text
from pmod_model.training.sources import Source


def build_report(pmod: Path, dense: Path, output: Path, *, examples: int = 6) -> dict[str, Any]:
    """Compare two runs and write the page.

    Args:
        pmod: run folder of the p-MoD model.
        dense: run folder of its dense twin.
        output: the HTML file; an existing file is replaced only if it is such a report.
        examples: test images to draw.

    Returns:
        The figures of the page: accuracies, costs, gain.

    Raises:
        InputError: a run is missing, or `output` holds something else.
    """
    if examples < 1:
        raise InputError(PLACE, "--examples", "an integer >= 1", examples)
    check_page_path(output, PLACE)
    runs = load_runs(pmod, dense)
    data = Source.from_dict(_held_out(runs)).load("test")
    pictured = next((record for record in data.records if len(record.images) == 1), None)
    if pictured is None:
        raise InputError(PLACE, "data", "a record with one image", "none")
    rows = cost_rows(*runs, record_question(pictured, data.folder, data.name))
    figures = {
        "accuracies": accuracies(*runs),
        "gain": accuracy_gain(*runs),
        "kinds": _kinds(*runs),
        "rows": rows,
        "speed": speed_note(rows),
    }
    page = render(
        **figures,
        pmod=runs[0].facts,
        dense=runs[1].facts,
        data=data.name,
        curves=loss_curves({run.name: run.facts["losses"] for run in runs}),
        examples=choose_examples(*runs, data, examples),
    )
    check_page_path(output, PLACE)
    write_text(output, page)
    return figures


def accuracies(pmod: Run, dense: Run) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Name, style and share of each bar; None where nothing was recorded."""
    blind = next((run.evaluation["blind"] for run in (pmod, dense) if run.evaluation), None) or {}
    majority = blind.get("majority_answer")
    return [
        ("p-MoD", "pmod", pmod.evaluation),
        ("dense twin", "dense", dense.evaluation),
        ("blind: best answer per question text", "blind", blind.get("per_question")),
        (f'always "{majority}"' if majority else "majority", "blind", blind.get("majority")),
    ]


def render(**values: Any) -> str:
    """The page for these values; every text in them is escaped."""
    return render_page("report.html.j2", **values)


def _kinds(pmod: Run, dense: Run) -> list[Row]:
    if pmod.evaluation is None or dense.evaluation is None:
        return []
    rows = []
    for kind, share in pmod.evaluation["by_kind"].items():
        other = dense.evaluation["by_kind"].get(kind)
        if other is not None:
            shown = [f"{100 * s['accuracy']:.1f} %" for s in (share, other)]
            rows.append(Row(kind, f"{share['total']:,} questions", shown[0], shown[1], None))
    return rows


def _held_out(runs: tuple[Run, Run]) -> dict[str, Any]:
    evaluation = runs[0].evaluation or runs[1].evaluation
    return evaluation["source"] if evaluation else runs[0].facts["source"]
