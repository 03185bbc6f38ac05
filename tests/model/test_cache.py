"""The cache layers by themselves: two lengths, and the operations of generate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pmod_model.cache import RoutedDynamicLayer, routed_cache_layer
from pmod_model.context import RoutingContext

NOTHING = RoutingContext(None, None)
LIKE = torch.zeros(2, 3, 8)


def states(slots: int) -> torch.Tensor:
    return torch.randn(2, 1, slots, 4)


def prompt(
    slots: int, tokens: int, valid: torch.Tensor | None = None
) -> tuple[DynamicCache, RoutedDynamicLayer]:
    """A cache after a routed prompt, and its first layer."""
    cache = DynamicCache()
    layer = routed_cache_layer(cache, 0, NOTHING, slots, tokens)
    assert isinstance(layer, RoutedDynamicLayer)
    layer.extend(valid, slots, LIKE)
    layer.drop(slots, torch.tensor([[1] * (tokens - 2) + [2] * 2] * 2, dtype=torch.uint8))
    cache.update(states(slots), states(slots), 0)
    return cache, layer


def decode(cache: DynamicCache, layer: RoutedDynamicLayer, count: int) -> None:
    layer.extend(None, count, LIKE)
    cache.update(states(count), states(count), 0)


def states_kept(layer: RoutedDynamicLayer) -> int:
    assert layer.keys is not None
    return layer.keys.shape[-2]


def test_physical_and_logical_length() -> None:
    cache, layer = prompt(slots=3, tokens=10)
    decode(cache, layer, 2)
    assert states_kept(layer) == layer.past_length == 5
    assert cache.get_seq_length(0) == 12
    assert cache.get_mask_sizes(1, 0) == (13, 0)
    assert layer.kv_valid is None


def test_filler_stays_marked() -> None:
    valid = torch.tensor([[False, True, True], [True, True, True]])
    cache, layer = prompt(3, 10, valid)
    decode(cache, layer, 1)
    assert layer.kv_valid is not None
    assert layer.kv_valid.tolist() == [[False, True, True, True], [True] * 4]
    cache.reorder_cache(torch.LongTensor([1, 1]))
    assert layer.kv_valid.all()


def test_selecting_and_repeating_sequences() -> None:
    valid = torch.tensor([[False, True, True], [True, True, True]])
    cache, layer = prompt(3, 10, valid)
    cache.batch_repeat_interleave(2)
    assert layer.kv_valid is not None
    assert layer.kv_valid[:, 0].tolist() == [False, False, True, True]
    assert layer.keys is not None
    assert layer.keys.shape[0] == 4
    cache.batch_select_indices(torch.tensor([1]))
    assert layer.kv_valid.tolist() == [[False, True, True]]


@pytest.mark.parametrize("length", [-2, 11])
def test_crop_removes_decoded_tokens(length: int) -> None:
    cache, layer = prompt(3, 10, torch.ones(2, 3, dtype=torch.bool))
    decode(cache, layer, 3)
    layer.crop(length)  # removes two, or leaves eleven
    assert (layer.past_length, layer.get_seq_length()) == (4, 11)
    assert layer.kv_valid is not None
    assert layer.kv_valid.shape == (2, 4)


def test_crop_reaches_back_to_the_last_image_token() -> None:
    cache, layer = prompt(3, 10)  # eight image tokens, two of text
    decode(cache, layer, 1)
    layer.crop(-2)
    assert (layer.past_length, layer.get_seq_length()) == (2, 9)
    message = "crop: expected to remove at most 1 tokens, those after the last image token, got 2"
    with pytest.raises(ValueError, match=message):
        layer.crop(-2)
    layer.crop(-1)
    assert (layer.past_length, layer.get_seq_length()) == (1, 8)
    assert layer.is_routed


def test_reset_forgets_everything() -> None:
    cache, layer = prompt(3, 10)
    cache.reset()
    assert cache.get_seq_length(0) == 0
    assert not layer.is_routed
    decode(cache, layer, 2)
    assert cache.get_seq_length(0) == states_kept(layer) == 2


def test_a_filled_plain_cache_is_taken_over_with_its_padding() -> None:
    cache = DynamicCache()
    cache.update(states(2), states(2), 0)
    past = torch.tensor([[False, True], [True, True]])
    layer = routed_cache_layer(cache, 0, RoutingContext(None, None, past), 1, 1)
    assert layer.get_seq_length() == 2
    assert layer.kv_valid is past


def test_caches_that_cannot_shrink_are_refused(make_llama: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="cache: expected a DynamicCache or StaticCache, got tup"):
        routed_cache_layer((), 0, NOTHING, 1, 1)
    offloaded = StaticCache(make_llama().config, max_cache_len=8)
    offloaded.offloading = True
    with pytest.raises(ValueError, match="kv: expected a cache without offloading"):
        routed_cache_layer(offloaded, 0, NOTHING, 1, 1, name="kv")
