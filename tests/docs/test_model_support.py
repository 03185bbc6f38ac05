"""docs/model_support.md names a test for every row, and the test is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "model_support.md"


def test_every_row_names_a_test_that_exists() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| test |")]
    assert len(rows) > 25
    for row in rows:
        found = re.search(r"`(tests/[\w/]+\.py)(?:::(\w+))?` \|$", row)
        assert found, row
        path, name = found.groups()
        text = (ROOT / path).read_text()
        assert name is None or f"def {name}(" in text, row
