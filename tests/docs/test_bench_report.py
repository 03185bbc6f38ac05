"""docs/benchmarks.md says what the stored results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_report
import figures
import pytest

FACTS = {"cpu": "A CPU", "cores": 2, "isa": "avx2", "torch": "2.13", "python": "3.11", "load": 0.1}


def entry(
    cell: str, ours: float = 1.0, rows: int = 636, allocator: str = "retained", **ratios: float
) -> dict[str, Any]:
    times = {"ours": ours} | {name: ours * ratio for name, ratio in ratios.items()}
    info = {"rows": rows, "kept": 348, "wall_ms": times, "wall_ratio": ratios, "GB/s": 20.0}
    info |= {"cpu_ms": times, "cpu_ratio": ratios, "allocator": allocator, **FACTS}
    if "memcpy" in ratios:
        info["of_memcpy"] = ratios["memcpy"]
    return {"name": f"bench_x[{cell}]", "extra_info": info}


FORWARD = "glue-forward-llava15-b1-r0.5-d4096-bfloat16-t"
RESULTS = [
    entry(f"{FORWARD}1", 2.0, eager=9, compile_copy=2.4, compile_where=2.2, official=20, memcpy=1),
    entry(f"{FORWARD}2", eager=4, compile_copy=3.0, compile_where=0.9, official=30, memcpy=0.8),
    entry(
        "glue-forward-llava_next-b1-r0.5-d4096-bfloat16-t1", rows=2940, memcpy=0.95, in_place=0.7
    ),
    entry("glue-forward-video-b1-r0.5-d2048-float32-t1", eager=4, memcpy=0.5),
    entry("select-growth-n576-b1-r0.5-d8-float32-t1", 0.1, op=0.5, topk=2.0, topk_sorted=4.0),
    entry("select-growth-n2880-b1-r0.5-d8-float32-t1", 0.5, op=0.5, topk=3.5, topk_sorted=3.2),
    entry("glue-growth-n576-b1-r0.5-d1024-bfloat16-t1", 0.5),
    entry("glue-growth-n2304-b1-r0.5-d1024-bfloat16-t1", 2.0),
    entry(
        "layer-llava_next-b1-r0.5-d2048-bfloat16-t1",
        layer=100,
        own_parts=0.5,
        official=20,
        memcpy=1,
    ),
    entry("gather-forward-llava_next-b1-r0.5-d4096-bfloat16-t1", eager=1.5, memcpy=1.0),
]


def store(folder: Path, number: int, name: str, entries: list[dict[str, Any]]) -> Path:
    path = folder / "Linux-CPython-3.11-64bit" / f"{number:04}_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    commit = {"id": "0123456789abcdef", "dirty": False}
    document = {"commit_info": commit, "datetime": "2026-01-02T03:04:05", "benchmarks": entries}
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> figures.Runs:
    store(tmp_path, 1, "default-allocator-baseline", [entry(f"{FORWARD}1", allocator="default")])
    store(tmp_path, 2, "baseline", RESULTS)
    store(tmp_path, 3, "run", [])
    loaded = figures.load(tmp_path)
    assert loaded is not None
    return loaded


def row(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return found


def test_the_page_is_what_the_results_give() -> None:
    stored = figures.load(bench_report.RESULTS)
    assert bench_report.up_to_date(stored, bench_report.PAGE), "run python tools/bench_report.py"
    if stored is None:
        pytest.skip("no baseline is committed yet: the page was only checked to say so")


def test_a_cell_is_read_from_its_name(runs: figures.Runs) -> None:
    first = runs.of("glue-forward")[0]
    assert (first.geometry, first.batch, first.ratio) == ("llava15", 1, 0.5)
    assert (first.hidden, first.dtype, first.threads) == (4096, "bfloat16", 1)
    assert first.headline
    assert not runs.of("glue-forward")[-1].headline
    assert "A CPU, 2 cores" in runs.about
    assert "2026-01-02, commit 0123456789;" in runs.about


def test_the_fastest_form_of_a_peer_counts(runs: figures.Runs) -> None:
    first = runs.of("glue-forward")[0]
    assert first.against("compile") == 2.2
    assert first.against("topk") is None


def test_threads_share_a_row_of_the_main_table(runs: figures.Runs) -> None:
    text = bench_report.glue_table(runs.of("glue-forward", headline=True), "in_place")
    assert row(text, "llava15 | 1 | 0.5") == (
        "| llava15 | 1 | 0.5 | 2 / 1 | 9 / 4 | 2.2 / 0.9 | 20 / 30 | - / - | 100 % / 80 % | 20 / 20 |"
    )
    assert "0.7" in row(text, "llava_next")


def test_goals_are_judged_by_the_worst_row(runs: figures.Runs) -> None:
    text = bench_report.summary(runs)
    assert row(text, "forward, eager").endswith(
        "| >= 8 | 4 (llava15, B = 1, R = 0.5, 2 threads) | 6 | **not met** |"
    )
    assert row(text, "forward, official").endswith("| 24.5 | met |")
    assert "0.95 (llava_next" in row(text, "forward, rate")  # llava15 has fewer than 2000 rows
    assert row(text, "torch.topk").endswith("| 6.4 | met |")
    assert row(text, "training, best").endswith("| - | - | not measured |")


def test_a_goal_on_the_mean_is_judged_by_the_mean(runs: figures.Runs) -> None:
    goal = figures.Goal("x", 1.4, figures.ratio("glue-forward", "compile"), averaged=True)
    worst, _, average, met = goal.judge(goal.figures(runs))
    assert (worst, met) == (0.9, True)
    assert average == pytest.approx((2.2 * 0.9) ** 0.5)


def test_the_share_of_a_layer_counts_what_it_replaces(runs: figures.Runs) -> None:
    (layer,) = runs.of("layer")
    assert layer.layer_shares() == (0.01, 0.005, 0.2)
    text = bench_report.summary(runs)
    assert row(text, "glue / layer, R = 0.5").endswith("| 1 % | **not met** |")
    assert row(text, "glue, net / layer, R = 0.5").endswith("| 0.5 % | met |")


def test_whole_models_are_beside_themselves_dense(runs: figures.Runs) -> None:
    assert bench_report.model_table(runs) == ""
    assert "Whole models" not in bench_report.generated(runs)
    prefill = entry("prefill-1b-llava_next-b1-r0.5-d2048-bfloat16-t2", 50.0, dense=1.6)
    prefill["extra_info"] |= {"flops_ratio": 2.0, "reached": 0.8}
    prefill["extra_info"] |= {"peak_bytes": {"ours": 3, "dense": 4}, "weights": "random"}
    timed = figures.Runs([figures.parse(prefill)], [], "")
    assert row(bench_report.model_table(timed), "prefill-1b") == (
        "| prefill-1b | llava_next | 1 | 0.5 | 50 | 1.6 | 2 | - | 80 % | 75 % | - |"
    )


def test_every_cell_where_a_peer_wins_is_listed(runs: figures.Runs) -> None:
    assert bench_report.slower(runs) == (
        "* glue-forward, llava15, B = 1, R = 0.5, 2 threads, D = 4096, bfloat16: compile_where 0.90"
    )
    assert "no peer" in bench_report.slower(figures.Runs([], [], ""))


def test_only_the_generated_part_of_a_page_changes() -> None:
    page = f"before\n{bench_report.BEGIN}\nold\n{bench_report.END}\nafter\n"
    filled = bench_report.fill(page, "new")
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")
    assert "new" in filled
    assert "old" not in filled
    assert bench_report.fill(filled, "new") == filled


def test_page_and_plot_are_up_to_date_once_written(runs: figures.Runs, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{bench_report.BEGIN}{bench_report.END}\n")
    assert not bench_report.up_to_date(runs, page)
    page.write_text(bench_report.fill(page.read_text(), bench_report.generated(runs)))
    assert not bench_report.up_to_date(runs, page)  # the plot is missing
    bench_report.draw(runs, page.with_suffix(".svg"))
    assert bench_report.up_to_date(runs, page)
    first = page.with_suffix(".svg").read_bytes()
    bench_report.draw(runs, page.with_suffix(".svg"))
    assert page.with_suffix(".svg").read_bytes() == first
    page.write_text(page.read_text().replace("not met", "met"))
    assert not bench_report.up_to_date(runs, page)


def test_adopting_keeps_the_newest_baseline_and_the_runs(tmp_path: Path) -> None:
    store(tmp_path, 2, "baseline", RESULTS[1:])
    run = store(tmp_path, 3, "run", [])
    newest = store(tmp_path, 4, "baseline", RESULTS)
    bench_report.adopt(tmp_path)
    assert sorted(tmp_path.glob("*/*")) == [run, newest]
    assert len(newest.read_text().splitlines()) == len(RESULTS) + 2
    loaded = figures.load(tmp_path)
    assert loaded is not None
    assert len(loaded.main) == len(RESULTS)
