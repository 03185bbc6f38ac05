"""The documentation is true: its code runs, and every op has its whole slice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pmod_ops

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
OPS = sorted(
    name
    for name in pmod_ops.__all__
    if callable(getattr(pmod_ops, name))
    and name == name.lower()
    and not name.endswith("_")
    and name != "backend_info"
)


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_code_blocks_run(page: Path) -> None:
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), {"__name__": "documentation"})


def test_the_ops_are_the_public_ones() -> None:
    assert OPS == [
        "gather",
        "gather_add_rmsnorm",
        "gather_rmsnorm",
        "route",
        "route_gather",
        "weighted_scatter_add",
    ]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "path",
    [
        "pmod_ops/{}.py",
        "csrc/cpu/{}.cpp",
        "tests/ops/test_{}.py",
        "bench/bench_{}.py",
        "docs/ops/{}.md",
    ],
)
def test_every_op_has_its_slice(op: str, path: str) -> None:
    assert (ROOT / path.format(op)).is_file()
    assert hasattr(pmod_ops.reference, op)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        assert link.startswith("http") or (page.parent / link).exists(), link
