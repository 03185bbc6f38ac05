"""The benchmarks of whole models: entries of the cache exactly, ratios of operations, one round."""

from __future__ import annotations

from typing import Any

import bench_model
import bench_training
import figures
import models
import pytest
import torch
from models import ModelCell, decode_flops, entries, model_cell, padded_prompt, prefill_flops
from timing import Race
from torch.utils.flop_counter import FlopCounterMode

from pmod_model.flops import attention_flops, kept_per_layer
from pmod_model.report.measure import prefill

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    monkeypatch.setitem(models.DTYPES, "tiny", torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    bench_training.make_step.cache_clear()
    models.release()


def tiny_cell(what: str) -> ModelCell:
    return model_cell(what, "tiny", "tiny", threads=1)


@pytest.mark.parametrize("vision", [576, 1152, pytest.param(2880, marks=pytest.mark.slow)])
def test_the_cache_of_a_padded_batch_holds_the_papers_share(vision: int) -> None:
    cell = model_cell("cache", "thin32", f"n{vision}", 4)
    shares = bench_model.cache_shares(cell)
    kept = sum(cell.kept_by_layer)
    assert shares["entries_vision"] == 4 * kept
    assert shares["entries_vision_dense"] == 4 * 32 * vision
    # the mean ratio is 53.75 %; rounding k down costs less than a token in each of 24 layers
    assert 0.5375 - 24 / (32 * vision) < shares["vision_share"] <= 0.5375
    assert abs(shares["vision_share"] - 0.5375) < 0.002
    # slots are those of the longest text in every layer, and here of the vision tokens alike
    longest = max(bench_model.TEXTS)
    assert shares["entries_allocated"] == 4 * (32 * longest + kept)
    assert shares["cache_bytes"] == shares["entries_allocated"] * 2 * 32 * 4
    assert shares["cache_bytes_dense"] == 4 * 32 * (longest + vision) * 2 * 32 * 4


def test_images_of_different_sizes_share_a_batch() -> None:
    cell = model_cell("cache", "thin32", "n576", 3)
    model, visions = models.build(cell), [576, 288, 0]
    prompt = padded_prompt(model, [10, 20, 30], visions)
    found = entries(prefill(model, prompt)[1], prompt)
    ratios = models.layer_ratios(cell.settings, 32)
    kept = sum(sum(kept_per_layer(ratios, 32, vision)) for vision in visions)
    assert found.valid == 32 * 60 + kept
    assert found.valid < found.allocated


def test_operations_are_those_that_run() -> None:
    cell = tiny_cell("prefill")
    model = models.build(cell)
    prompt = bench_model.make_prompt(model, cell.text, cell.vision)
    for each, kept in (
        (prompt, cell.kept_by_layer),
        (prompt.dense(), [cell.vision] * cell.size.layers),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as ran:
            model(inputs_embeds=each.embeddings, target_mask=each.target_mask, logits_to_keep=1)
        linear = ran.get_flop_counts()["Global"][torch.ops.aten.mm]
        attention = attention_flops(cell.size, cell.text, kept)
        assert prefill_flops(cell, kept) == linear + attention
    # a step: 2 per parameter of every product, and 4 per width of each key
    parameters = 6 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * 50
    keys = sum(cell.text + k + 1 for k in cell.kept_by_layer)
    assert decode_flops(cell, cell.kept_by_layer) == 2 * parameters + 4 * 32 * keys


def test_operations_of_a_training_step_are_those_that_run() -> None:
    cell = tiny_cell("training")
    step = bench_training.make_step(cell)
    for each, kept in (
        (step.prompt, cell.kept_by_layer),
        (step.prompt.dense(), [cell.vision] * cell.size.layers),
    ):
        with FlopCounterMode(display=False) as ran:
            step(each)
        # attention runs in a fused kernel whose backward pass is counted otherwise
        matmuls = ran.get_flop_counts()["Global"][torch.ops.aten.mm]
        attention = 4 * attention_flops(cell.size, cell.text, kept)
        assert bench_training.step_flops(cell, kept) == matmuls + attention


@pytest.mark.parametrize(
    "make",
    [
        bench_model.prefills,
        bench_model.decodings,
        bench_model.padded_prefills,
        bench_training.steps,
    ],
)
def test_a_contest_runs(make: Any) -> None:
    contest = make(tiny_cell("prefill"))
    race = Race(contest, 0.0)
    with torch.set_grad_enabled(contest.grad):
        race.warm_up()
        for _ in range(2):
            race.time_peers()
            race.time_ours()
    found = race.results()
    assert set(found["wall_ms"]) == {"ours", "dense"}
    assert found["wall_ratio"]["dense"] > 0


def test_decoding_leaves_the_cache_as_it_was() -> None:
    contest = bench_model.decodings(tiny_cell("decode"))
    rows = contest.copies[0]
    assert torch.equal(contest.ours(rows), contest.ours(rows))
    dense = contest.peers["dense"]
    assert torch.equal(dense(rows), dense(rows))


def test_memory_of_a_prefill_is_less_with_p_mod() -> None:
    found = bench_model.peaks(tiny_cell("prefill"))
    assert 0 < found["ours"] < found["dense"]


def test_memory_of_a_training_step_is_less_with_p_mod() -> None:
    step = bench_training.make_step(tiny_cell("training"))
    step(step.prompt)  # makes gradients and the state of the optimiser
    found = step.peaks(all_logits=False)
    assert 0 < found["ours"] < found["dense"]


def test_a_head_on_labelled_tokens_finds_the_same_loss() -> None:
    step = bench_training.make_step(tiny_cell("training"))
    labels = step.labels[:, step.predicting + 1].contiguous()
    head = {"logits_to_keep": step.predicting, "shift_labels": labels}
    assert torch.equal(step.backward(step.prompt, **head), step.backward(step.prompt))


def test_ids_are_read_back() -> None:
    cell = model_cell("prefill", "1b", "llava_next")
    result = figures.parse({"name": f"bench_prefill[{cell}]", "extra_info": {}})
    assert (result.kind, result.geometry, result.threads) == ("prefill-1b", "llava_next", 2)
    assert not result.headline
