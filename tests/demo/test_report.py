"""The page: hostile text stays text, nothing is fetched, missing figures are said to be missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pmod_model.data.errors import InputError
from pmod_model.report.build import render
from pmod_model.report.examples import Answer, Example, Tile
from pmod_model.report.page import MARK, check_page_path
from pmod_model.report.pictures import data_uri, kept_view, loss_curves, model_view
from pmod_model.report.rows import Row

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)></style>\"'&javascript:"


def values(text: str = "plain", share: dict[str, Any] | None = None) -> dict[str, Any]:
    facts = {
        "data": text,
        "steps": 10,
        "parameters": 5,
        "layers": 3,
        "ratios": {"1": 0.5},
        "batch_size": 2,
        "turns": 0,
        "learning_rate": 0.1,
        "seed": 0,
        "records": 4,
        "threads": 1,
        "versions": {"python": text, "torch": text, "transformers": text},
    }
    example = Example(
        text, "data:,", text, [Answer(text, text, text, None)], [Tile(text, text, "data:,")]
    )
    return {
        "accuracies": [(text, "pmod", share), (text, "dense", share), (text, "blind", None)],
        "gain": (-0.01, 0.02) if share else None,
        "kinds": [Row(text, text, text, text, None)],
        "rows": [Row(text, text, text, text, 0.5)] * 4,
        "speed": text,
        "pmod": facts,
        "dense": facts,
        "data": text,
        "curves": loss_curves({"p-MoD": [[1, 2.0], [2, 1.0]], "dense": []}),
        "examples": [example],
    }


def test_hostile_text_is_escaped() -> None:
    page = render(**values(HOSTILE))
    plain = render(**values())
    for tag in ("<script", "<img", "</style>"):
        assert page.count(tag) == plain.count(tag)
    assert "&lt;script&gt;alert(1)" in page


def test_nothing_is_fetched_or_run() -> None:
    page = render(**values())
    assert page.index(MARK) < 1000
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "<script" not in page
    sources = re.findall(r"""(?:src|xlink:href|href)\s*=\s*["']([^"']*)""", page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources), sources
    assert not re.search(r"url\((?!#)", page)


def test_missing_evaluation_is_said() -> None:
    assert render(**values()).count("not recorded") >= 3
    share = {"correct": 3, "total": 4, "accuracy": 0.75, "standard_error": 0.21651}
    page = render(**values(share=share))
    assert "75.0 ± 21.7 %" in page
    assert "1.0 ± 2.0 points\nfewer" in page


def test_figures_follow_the_colour_scheme() -> None:
    svg = loss_curves({"p-MoD": [[1, 2.0], [5, 1.0]], "dense": [[1, 2.5], [5, 1.5]]})
    assert svg.startswith("<svg")
    for variable in ("--ink", "--line", "--pmod", "--dense"):
        assert f"var({variable})" in svg
    assert loss_curves({"p-MoD": [], "dense": []}).startswith("<svg")


def test_skipped_patches_are_darkened() -> None:
    white = Image.new("RGB", (16, 16), "white")
    view = kept_view(white, torch.tensor([True, False, False, True]))
    corners = [view.getpixel(at) for at in ((0, 0), (15, 0), (0, 15), (15, 15))]
    assert corners == [(255,) * 3, (46,) * 3, (46,) * 3, (255,) * 3]


def test_model_view_undoes_normalisation() -> None:
    pixels = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1).expand(3, 4, 4)
    assert model_view(pixels, [0.5] * 3, [0.5] * 3).getpixel((1, 2)) == (255, 128, 0)
    assert data_uri(Image.new("RGB", (64, 64))).startswith("data:image/png;base64,iVBOR")


def test_report_never_replaces_another_file(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(f"<html>{MARK}")
    check_page_path(page, "report")
    page.write_text("<html>")
    for path, message in (
        (page, "another file"),
        (tmp_path, "a folder or a link"),
        (tmp_path / "absent" / "report.html", "an existing folder"),
    ):
        with pytest.raises(InputError, match=message):
            check_page_path(path, "report")
