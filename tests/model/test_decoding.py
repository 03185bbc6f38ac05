"""Ways of decoding beyond greedy: search, drafts, one compiled graph, cropped and kept caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.backbones import Row, pad_left, prompt, text_rows
from model.caches import CACHE, cache_of
from model.conftest import IMAGE, IMAGE_TOKENS, RATIOS, make_opinionated
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from pmod_model import record_routing

STEPS = 10
# 20 and 13 tokens, of which 16 and 8 may be skipped: the longest row keeps 4 + 8, 5 + 2 and 5 + 0
KEPT = [20, 12, 8, 5]


def generate(model: Any, inputs: Row, **options: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    return model.generate(**inputs, **options, return_dict_in_generate=True)


def lengths(out: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache_of(out).layers]


def after(steps: int) -> list[int]:
    return [n + steps - 1 for n in KEPT]


BEAMS = {"num_beams": 3}
SAMPLES = {"do_sample": True, "num_return_sequences": 2}
BEAM_SAMPLES = {"num_beams": 3, "do_sample": True, "num_return_sequences": 2}


@pytest.mark.parametrize(
    "options", [BEAMS, SAMPLES, BEAM_SAMPLES, {**BEAMS, "length_penalty": 2.0}]
)
@pytest.mark.parametrize("first_is_routed", [False, True])
def test_search_over_rows_that_differ(
    make_llama: Callable[..., Any], options: dict[str, Any], first_is_routed: bool
) -> None:
    schedule = [0.5, 0.25, None, 0.1] if first_is_routed else RATIOS
    model, batch = make_llama(schedule=schedule), pad_left(text_rows())
    out = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        out.append(generate(model, batch, use_cache=use_cache, **options))
    assert torch.equal(out[0].sequences, out[1].sequences)
    kept = [12, 8, 20, 5] if first_is_routed else KEPT
    assert lengths(out[0]) == [n + STEPS - 1 for n in kept]
    assert {layer.get_seq_length() for layer in cache_of(out[0]).layers} == {20 + STEPS - 1}


def test_beams_of_a_row_are_those_of_the_row_alone(make_llama: Callable[..., Any]) -> None:
    model, rows = make_llama(), text_rows()
    options = {**BEAMS, "num_return_sequences": 3}
    together = generate(model, pad_left(rows), **options)
    assert lengths(together) == after(STEPS)
    kept = [[20, 12, 8, 5], [13, 9, 7, 5]]
    for index, row in enumerate(rows):
        alone = generate(model, row, **options)
        beams = together.sequences[3 * index : 3 * index + 3, -STEPS:]
        assert torch.equal(alone.sequences[:, -STEPS:], beams)
        assert lengths(alone) == [n + STEPS - 1 for n in kept[index]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("static", [False, True])
def test_padding_masks_of_any_type(
    make_llama: Callable[..., Any], dtype: torch.dtype, static: bool
) -> None:
    model, batch = make_llama(), pad_left(text_rows())
    expected = generate(model, batch).sequences
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    out = generate(model, batch, **options)
    assert torch.equal(out.sequences, expected)
    assert lengths(out) == after(STEPS)


def test_drafts_of_another_model(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    (row, _) = text_rows()
    plain = generate(model, row)
    # generate hands the target mask to the draft as well
    draft = make_opinionated(make_llama(schedule=[0.5, 0.25, 0.1, 0.1]), seed=5)
    out = generate(model, row, assistant_model=draft)
    assert torch.equal(out.sequences, plain.sequences)
    assert lengths(out) == lengths(plain) == after(STEPS)


@pytest.mark.compile
def test_decoding_with_a_static_cache_is_one_graph(
    make_llava: Callable[..., Any], ragged_batch: Row
) -> None:
    model = make_llava(schedule=[0.5, 0.25, None, 0.1])
    plain = generate(model, ragged_batch)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True  # left to itself, generate compiles on GPUs only
    out = generate(model, ragged_batch, cache_implementation="static", compile_config=config)
    assert torch.equal(out.sequences, plain.sequences)
    assert len(graphs) == 1
    size: Any = cache_of(out).layers[0]
    assert size.logical_max == 36 + STEPS - 1
    assert lengths(out) == lengths(plain) == [n + STEPS - 1 for n in (20, 12, 36, 7)]


def test_decoding_goes_on_from_a_cropped_cache(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    (row, _) = text_rows()
    cache = cache_of(generate(model, row))
    cache.crop(-4)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n - 4 for n in after(STEPS)]
    ids = torch.cat(
        (generate(model, row).sequences[:, : 20 + STEPS - 5], torch.tensor([[7, 8]])), 1
    )
    ones = torch.ones_like(ids)
    out = generate(model, {"input_ids": ids, "attention_mask": ones, CACHE: cache})
    anew = {"input_ids": ids, "attention_mask": ones}
    anew["target_mask"] = torch.nn.functional.pad(row["target_mask"], (0, ids.shape[1] - 20))
    assert torch.equal(out.sequences, generate(model, anew, use_cache=False).sequences)
    assert lengths(out) == [n + ids.shape[1] - 20 for n in after(STEPS)]


@pytest.mark.parametrize("static", [False, True])
def test_a_new_image_in_a_later_turn_of_generate(
    make_llava: Callable[..., Any], oracle: Any, static: bool
) -> None:
    model = make_llava()
    image = [IMAGE] * IMAGE_TOKENS
    pixels = torch.randn(2, 3, 56, 56)
    cache: Any = (
        StaticCache(model.config, max_cache_len=80) if static else DynamicCache(config=model.config)
    )
    options = {CACHE: cache, "disable_compile": True}
    first = {**prompt(5, 6, *image, 7, 8), "pixel_values": pixels[:1]}
    ids = generate(model, first, max_new_tokens=4, **options).sequences
    ids = torch.cat((ids, torch.tensor([[33, *image, 34, 35]])), 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels[1:]}
    with record_routing(model) as records:
        out = generate(model, turn, **options)
    # the last token of the first turn is not in the cache yet, so it comes with the second
    assert records[0].target_mask.shape == (1, 1 + 19)
    expected = greedy_in_turns(oracle(model), ids, pixels, start=20 + 3)
    assert torch.equal(out.sequences, expected)
    images = [2 * n for n in (16, 8, 4, 1)]
    seen = [n + 4 + 3 + 3 + 1 + STEPS - 1 for n in images]
    if static:
        assert lengths(out) == [80 - 16 + n for n in (16, 8, 4, 1)]  # as the first turn left it
        assert [int(layer.past_length) for layer in cache.layers[1:]] == seen[1:]
    else:
        assert lengths(out) == seen
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {seen[0]}


@torch.no_grad()
def greedy_in_turns(oracle: Any, ids: Tensor, pixels: Tensor, start: int) -> Tensor:
    """Without a cache; tokens from `start` on compete among themselves."""
    for _ in range(STEPS):
        turn = (torch.arange(ids.shape[1]) >= start).int()[None]
        logits = oracle(oracle.embed(ids, pixels), ids == IMAGE, pools=turn)[0][:, -1]
        logits[:, IMAGE] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return ids
