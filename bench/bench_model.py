"""Whole models: a prefill and a decoding step with p-MoD beside the same model dense.

Dense is the same model told that no token may be skipped. Each result carries the ratio of
operations, attention included (`flops_ratio`, dense over ours), and the share of it that the wall
clock reached (`reached`). Memory is counted from the profiler's record of allocations, which is
exact; a resident set depends on what the allocator keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cells import over
from inputs import Rows
from models import (
    ModelCell,
    build,
    decode_flops,
    entries,
    model_cell,
    padded_prompt,
    prefill_flops,
    release,
    weights_of,
)
from pytest_benchmark.fixture import BenchmarkFixture
from slot import once_per_shape
from timing import OP_SHARE, Contest, Measure, significant
from torch import Tensor

from pmod_model.report.measure import Prompt, decode, make_prompt, peak_bytes, prefill

TIMED = [(shape, geometry) for shape in ("1b", "smol") for geometry in ("llava15", "llava_next")]
# Texts of a padded batch of four
TEXTS = [60, 45, 20, 58]


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    """Gigabytes of weights end with this file."""
    yield
    release()


def prefills(cell: ModelCell) -> Contest:
    model = build(cell)
    prompt = make_prompt(model, cell.text, cell.vision, cell.batch)
    dense = prompt.dense().target_mask

    def run(mask: Tensor) -> Any:
        return lambda rows: prefill(model, Prompt(rows.x, mask))[0]

    return contest(cell, prompt, run(prompt.target_mask), run(dense))


def decodings(cell: ModelCell) -> Contest:
    model = build(cell)
    prompt = make_prompt(model, cell.text, cell.vision, cell.batch)

    def run(prompt: Prompt) -> Any:
        cache = prefill(model, prompt)[1]

        def step(rows: Rows) -> Tensor:
            logits = decode(model, Prompt(rows.x, prompt.target_mask), cache, 1)
            cache.crop(-1)
            return logits

        return step

    return contest(cell, prompt, run(prompt), run(prompt.dense()))


def contest(cell: ModelCell, prompt: Prompt, ours: Any, dense: Any) -> Contest:
    """The weights are the least that is moved."""
    empty = torch.empty(0)
    rows = Rows(prompt.embeddings, empty, empty, empty, empty, scratch=empty, source=empty)
    weights = sum(parameter.nbytes for parameter in build(cell).parameters())
    return Contest([rows], ours, {"dense": dense}, weights, unlike=frozenset({"dense"}))


timed_prefills = once_per_shape(prefills)  # type: ignore[arg-type]
timed_decodings = once_per_shape(decodings)  # type: ignore[arg-type]


def note(benchmark: BenchmarkFixture, cell: ModelCell, ideal: float, **more: Any) -> None:
    """Add the ratio of operations, the share of it that was reached, and whose the weights are."""
    if benchmark.enabled:
        reached = benchmark.extra_info["wall_ratio"]["dense"] / ideal
        found = {"flops_ratio": significant(ideal), "reached": significant(reached)}
        benchmark.extra_info.update({**found, **more, "weights": weights_of(cell.shape)})


@over([model_cell("prefill", *shape) for shape in TIMED])
def bench_prefill(measure: Measure, benchmark: BenchmarkFixture, cell: ModelCell) -> None:
    measure(cell, timed_prefills(cell), 1.0)
    everything = [cell.vision] * cell.size.layers
    ideal = prefill_flops(cell, everything) / prefill_flops(cell, cell.kept_by_layer)
    note(benchmark, cell, ideal, peak_bytes=peaks(cell) if benchmark.enabled else None)


def peaks(cell: ModelCell) -> dict[str, int]:
    """Most bytes of tensors at once in a prefill, above the weights."""
    model = build(cell)
    prompt = make_prompt(model, cell.text, cell.vision, cell.batch)
    return {
        name: peak_bytes(lambda each=each: prefill(model, each))
        for name, each in (("ours", prompt), ("dense", prompt.dense()))
    }


@over([model_cell("decode", *shape) for shape in TIMED])
def bench_decode(measure: Measure, benchmark: BenchmarkFixture, cell: ModelCell) -> None:
    measure(cell, timed_decodings(cell), 1.0)
    everything = [cell.vision] * cell.size.layers
    ideal = decode_flops(cell, everything) / decode_flops(cell, cell.kept_by_layer)
    note(benchmark, cell, ideal, cache_ratio=significant(cache_ratio(cell)))


def cache_ratio(cell: ModelCell) -> float:
    """Keys and values of a dense prefill over ours."""
    dense = cell.size.layers * (cell.text + cell.vision)
    return dense / sum(cell.text + k for k in cell.kept_by_layer)


def padded_prefills(cell: ModelCell) -> Contest:
    model = build(cell)
    prompt = padded_batch(cell)
    dense = prompt.dense()
    return contest(
        cell, prompt, lambda _: prefill(model, prompt)[0], lambda _: prefill(model, dense)[0]
    )


def padded_batch(cell: ModelCell) -> Prompt:
    return padded_prompt(build(cell), TEXTS, [cell.vision] * len(TEXTS))


timed_padded_prefills = once_per_shape(padded_prefills)  # type: ignore[arg-type]


@over([model_cell("cache", "thin32", name, len(TEXTS)) for name in ("llava15", "llava_next")])
def bench_cache(measure: Measure, benchmark: BenchmarkFixture, cell: ModelCell) -> None:
    """What a padded batch leaves in the caches; the times are those of a model too thin."""
    measure(cell, timed_padded_prefills(cell), OP_SHARE)
    if benchmark.enabled:
        benchmark.extra_info.update({**cache_shares(cell), "weights": "random"})


def cache_shares(cell: ModelCell) -> dict[str, float]:
    """Shares of the dense cache: valid entries of vision tokens, allocated slots, bytes."""
    model, prompt = build(cell), padded_batch(cell)
    ours, dense = (entries(prefill(model, each)[1], each) for each in (prompt, prompt.dense()))
    text = sum(TEXTS) * cell.size.layers
    return {
        "entries_vision": ours.valid - text,
        "entries_vision_dense": dense.valid - text,
        "vision_share": significant((ours.valid - text) / (dense.valid - text), 6),
        "entries_allocated": ours.allocated,
        "allocated_share": significant(ours.allocated / dense.allocated, 6),
        "cache_bytes": ours.bytes,
        "cache_bytes_dense": dense.bytes,
    }
