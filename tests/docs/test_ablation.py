"""docs/ablation.md says what the stored runs say, and every variant has the same seeds."""

from __future__ import annotations

from collections import defaultdict

import ablation


def test_the_table_is_what_the_runs_give() -> None:
    page = ablation.PAGE.read_text()
    assert page == ablation.filled(page), "run python tools/ablation.py --page"


def test_variants_differ_in_nothing_else() -> None:
    seeds, configs = defaultdict(list), set()
    for row in ablation.load():
        seeds[row["variant"]].append(row["seed"])
        shared = {k: v for k, v in row["config"].items() if k not in ("pmod", "seed")}
        configs.add((tuple(sorted(shared.items())), row["questions"]))
    assert dict(seeds) == {name: [0, 1, 2] for name in ablation.VARIANTS}
    assert len(configs) == 1
