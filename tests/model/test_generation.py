"""Prefill and generation against the oracle: batches, padding, caches, turns, search."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.caches import CACHE, cache_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from pmod_model import record_routing
from pmod_model.cache import RoutedDynamicLayer
from pmod_model.context import image_pools

IMAGE, IMAGE_TOKENS, STEPS = 120, 16, 10
# float32 sums in another order: 1e-6 of a logit of about 10, times a few layers
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    return model.generate(**inputs, **options, return_dict_in_generate=True)


def lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


def row(inputs: dict[str, Tensor], index: int, images: slice) -> dict[str, Tensor]:
    """One row of a left-padded batch, without its padding."""
    valid = inputs["attention_mask"][index].bool()
    return {
        "input_ids": inputs["input_ids"][index, valid][None],
        "attention_mask": torch.ones(1, int(valid.sum()), dtype=torch.long),
        "pixel_values": inputs["pixel_values"][images],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_of_a_ragged_batch(
    make_llava: Callable[..., Any],
    oracle: Any,
    ragged_batch: dict[str, Tensor],
    attention: str,
    side: str,
) -> None:
    model = make_llava(attention)
    inputs = dict(ragged_batch)
    if side == "right":
        order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
        inputs["input_ids"] = inputs["input_ids"].gather(1, order)
        inputs["attention_mask"] = inputs["attention_mask"].gather(1, order)
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), record_routing(model) as records:
        out = model(**inputs, position_ids=positions)
        embeddings = oracle(model).embed(ids, inputs["pixel_values"])
        expected, kept = oracle(model)(embeddings, ids == IMAGE, valid)
    torch.testing.assert_close(out.logits[valid], expected[valid], **CLOSE)
    assert records[0].kept.keys() == kept.keys() == {1, 2, 3}
    for layer, mask in kept.items():
        assert torch.equal(records[0].kept[layer], mask)
    # the longest row decides: 5 + 16, 5 + 8, 6 + 1 or so; text 6, 5 and 6
    longest = [
        max(int(mask[b].sum()) + int((valid & (ids != IMAGE))[b].sum()) for b in range(3))
        for mask in kept.values()
    ]
    assert lengths(cache_of(out)) == [ids.shape[1], *longest]
    assert {layer.get_seq_length() for layer in cache_of(out).layers} == {ids.shape[1]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_generation_of_a_ragged_batch(
    make_llava: Callable[..., Any], oracle: Any, ragged_batch: dict[str, Tensor], attention: str
) -> None:
    model = make_llava(attention)
    expected = oracle(model).greedy(ragged_batch, STEPS)
    out = generate(model, ragged_batch)
    assert torch.equal(out.sequences, expected)
    # 36 tokens, of which 32 in two images: 4 + 16, 4 + 8, 6 + 1 (text row), then 9 decoded ones
    assert lengths(cache_of(out)) == [45, 29, 21, 16]
    assert [layer.get_seq_length() for layer in cache_of(out).layers] == [45] * 4
    assert torch.equal(generate(model, ragged_batch, use_cache=False).sequences, expected)


def test_static_cache_generates_the_same_and_is_smaller(
    make_llava: Callable[..., Any], oracle: Any, ragged_batch: dict[str, Tensor]
) -> None:
    model = make_llava()
    out = generate(model, ragged_batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(out.sequences, oracle(model).greedy(ragged_batch, STEPS))
    assert type(cache_of(out)) is StaticCache
    prompt = ragged_batch["input_ids"].shape[1]
    static: Any = cache_of(out).layers[0]
    capacity = static.max_cache_len
    assert lengths(cache_of(out)) == [capacity - prompt + kept for kept in (36, 20, 12, 7)]


def test_static_cache_is_reusable_after_reset(
    make_llava: Callable[..., Any], one_image_each: dict[str, Tensor]
) -> None:
    model = make_llava()
    cache = StaticCache(model.config, max_cache_len=64)
    options = {CACHE: cache, "disable_compile": True}
    first = generate(model, one_image_each, **options).sequences
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, one_image_each, **options).sequences, first)


def test_a_row_of_a_batch_equals_a_batch_of_one(
    make_llava: Callable[..., Any], ragged_batch: dict[str, Tensor]
) -> None:
    model = make_llava()
    together = generate(model, ragged_batch).sequences[:, -STEPS:]
    for index, images in enumerate((slice(0, 1), slice(1, 3), slice(3, 3))):
        alone = row(ragged_batch, index, images)
        if index == 2:
            del alone["pixel_values"]
        out = generate(model, alone)
        assert torch.equal(out.sequences[0, -STEPS:], together[index])
        dropped = len(set(lengths(cache_of(out)))) > 1
        assert dropped == (index < 2)


def test_routing_in_the_first_layer(
    make_llava: Callable[..., Any], oracle: Any, ragged_batch: dict[str, Tensor]
) -> None:
    model = make_llava(schedule=[0.5, 0.25, None, 0.1])
    expected = oracle(model).greedy(ragged_batch, STEPS)
    out = generate(model, ragged_batch)
    assert torch.equal(out.sequences, expected)
    assert lengths(cache_of(out)) == [29, 21, 45, 16]
    static = generate(model, ragged_batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, expected)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_no_and_every_image_token_kept(
    make_llava: Callable[..., Any], oracle: Any, one_image_each: dict[str, Tensor], ratio: float
) -> None:
    model = make_llava(schedule=[None, ratio, ratio, ratio], max_ratio=1.0)
    out = generate(model, one_image_each)
    assert torch.equal(out.sequences, oracle(model).greedy(one_image_each, STEPS))
    text = [6 + int(16 * ratio)] * 3
    assert lengths(cache_of(out)) == [22 + STEPS - 1, *(n + STEPS - 1 for n in text)]


def test_every_token_skipped(make_llama: Callable[..., Any], oracle: Any) -> None:
    model = make_llama(schedule=[None, 0.0, None, 0.0])
    ids = torch.arange(5, 13)[None]
    target = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        out = model(ids, target_mask=target)
        expected, _ = oracle(model)(oracle(model).embed(ids), target)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    assert [layer.get_seq_length() for layer in cache_of(out).layers] == [8] * 4


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_search_with_a_cache_equals_search_without(
    make_llava: Callable[..., Any], one_image_each: dict[str, Tensor], options: dict[str, Any]
) -> None:
    model = make_llava()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(model, one_image_each, use_cache=use_cache, **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert lengths(cache_of(results[0]))[1:] < lengths(cache_of(results[0]))[:-1]


def test_prompt_lookup_crops_the_cache(
    make_llava: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llava()
    # few words, so that some generated one is in the prompt, but goes on otherwise
    text = torch.randint(5, 25, (40,)).tolist()
    ids = torch.tensor([[*text, *[IMAGE] * IMAGE_TOKENS, 5, 6]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56)}
    options: dict[str, Any] = {"suppress_tokens": [*range(5), *range(25, 128)]}
    options["eos_token_id"] = 1  # older releases cannot look up without one
    plain = generate(model, inputs, **options).sequences
    shrunk = []
    crop = RoutedDynamicLayer.crop

    def watched(self: RoutedDynamicLayer, tokens_to_remove: int) -> None:
        before = self.get_seq_length()
        crop(self, tokens_to_remove)
        shrunk.append(before - self.get_seq_length())

    monkeypatch.setattr(RoutedDynamicLayer, "crop", watched)
    looked_up = generate(
        model, inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **options
    )
    assert torch.equal(looked_up.sequences, plain)
    assert max(shrunk) > 0


def test_text_only_and_padded_prompts_are_dense(make_llava: Callable[..., Any]) -> None:
    model = make_llava()
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    out = generate(model, inputs)
    assert torch.equal(out.sequences, generate(model, inputs, use_cache=False).sequences)
    assert lengths(cache_of(out)) == [3 + STEPS - 1] * 4


def test_a_target_mask_is_dropped_after_the_prompt(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    ids = torch.randint(5, 100, (2, 12))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[:, 2:10] = True
    out = generate(model, {"input_ids": ids, "target_mask": target})
    embeddings = model.get_input_embeddings()(ids)
    same = generate(model, {"inputs_embeds": embeddings, "target_mask": target})
    assert torch.equal(out.sequences[:, 12:], same.sequences)
    assert lengths(cache_of(out)) == [21, 17, 15, 13]
    assert lengths(cache_of(same)) == [21, 17, 15, 13]


def test_image_pools_have_budgets_of_their_own(
    make_llava: Callable[..., Any], oracle: Any, ragged_batch: dict[str, Tensor]
) -> None:
    model = make_llava(pool="image")
    ids, valid = ragged_batch["input_ids"], ragged_batch["attention_mask"].bool()
    target = ids == IMAGE
    with torch.no_grad(), record_routing(model) as records:
        out = model(**ragged_batch)
        embeddings = oracle(model).embed(ids, ragged_batch["pixel_values"])
        pools = image_pools(target, IMAGE_TOKENS)
        expected, kept = oracle(model)(embeddings, target, valid, pools)
    torch.testing.assert_close(out.logits[valid], expected[valid], **CLOSE)
    for layer, mask in kept.items():
        assert torch.equal(records[0].kept[layer], mask)
    # both images of the second row keep a quarter of themselves
    assert int(kept[2][1, : target.shape[1] // 2].sum()) == 4


def test_adjoining_images_are_told_apart_by_their_size() -> None:
    target = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    runs = image_pools(target, None)
    assert runs[target].tolist() == [1, 1, 1, 1, 2, 2] + [1] * 6
    assert image_pools(target, 2)[target].tolist() == [1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3]


def test_hidden_states_and_attentions_are_returned(
    make_llava: Callable[..., Any], one_image_each: dict[str, Tensor]
) -> None:
    model = make_llava("eager")
    with torch.no_grad():
        out = model(**one_image_each, output_hidden_states=True, output_attentions=True)
    length = one_image_each["input_ids"].shape[1]
    assert [hidden.shape for hidden in out.hidden_states] == [(2, length, 64)] * 5
    assert [weights.shape[-1] for weights in out.attentions] == [22, 14, 10, 7]


def test_layers_never_wait_for_the_device(
    make_llama: Callable[..., Any], ragged_batch: dict[str, Tensor]
) -> None:
    model = make_llama()
    ids, mask = ragged_batch["input_ids"], ragged_batch["attention_mask"]
    waits = WaitsForDevice()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(waits.enter_layer)
        layer.register_forward_hook(waits.leave_layer)
    with torch.no_grad(), waits:
        out = model(ids, attention_mask=mask, target_mask=ids == IMAGE)
        model(ids[:, -1:], **{CACHE: cache_of(out)})
    assert waits.layers == 8
    assert waits.seen == []


class WaitsForDevice(TorchDispatchMode):
    """Notes operators inside layers whose result the host must know."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.layers, self.seen = False, 0, []

    def enter_layer(self, *_: Any) -> None:
        self.inside, self.layers = True, self.layers + 1

    def leave_layer(self, *_: Any) -> None:
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and any(name in str(func) for name in self.OPERATORS):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
