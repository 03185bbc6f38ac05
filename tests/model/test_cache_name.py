"""Under whatever name the backbone takes its cache, p-MoD takes it as the backbone does."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.caches import CACHE, cache_of
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from pmod_model import record_routing
from pmod_model.cache_name import cache_name, find_cache

NAMES = ("past_key_values", "cache")
IMAGE = [120] * 16


def watch(call: Callable[[], Any]) -> tuple[Any, list[tuple[type[Warning], str]]]:
    """What `call` returns, and the warnings it gives."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [(warning.category, str(warning.message)) for warning in caught]


@pytest.mark.parametrize("part", ["whole", "decoder"])
@pytest.mark.parametrize("name", NAMES)
def test_a_dense_pass_takes_the_cache_and_warns_as_the_backbone(
    make_llama: Callable[..., Any], name: str, part: str
) -> None:
    model = make_llama()
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    ids = torch.randint(5, 100, (1, 6))
    seen = []
    for whole in (plain, model):
        chosen: Any = whole if part == "whole" else whole.model
        cache: Any = DynamicCache(config=model.config)
        whole(ids[:, :4], **{CACHE: cache})
        out, warned = watch(lambda f=chosen, c=cache: f(ids[:, 4:], **{name: c}))
        seen.append((out[0], cache.get_seq_length(), warned))
    (expected, length, warned), (got, got_length, got_warned) = seen
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got_length, got_warned) == (length, warned)
    # the newer name means nothing to an older backbone, which starts anew
    assert length == (4 if name == "cache" != CACHE else 6)


@pytest.mark.parametrize("name", dict.fromkeys((CACHE, "past_key_values")))
def test_a_routed_pass_takes_the_cache_under_every_name_of_the_backbone(
    make_llama: Callable[..., Any], name: str
) -> None:
    model = make_llama()
    ids = torch.randint(5, 100, (2, 12))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[:, 2:10] = True
    cache: Any = DynamicCache(config=model.config)
    expected = model(ids, target_mask=target).logits
    out, warned = watch(lambda: model(ids, target_mask=target, **{name: cache}))
    torch.testing.assert_close(out.logits, expected)
    assert cache_of(out) is cache
    assert [layer.keys.shape[-2] for layer in cache.layers] == [12, 8, 6, 4]
    # once, by the backbone, and not again in every layer
    assert [category for category, _ in warned] == [FutureWarning] * (name != CACHE)


@pytest.mark.parametrize("name", dict.fromkeys((CACHE, "past_key_values")))
def test_tokens_after_a_cached_prompt_never_compete(
    make_llava: Callable[..., Any], one_image_each: dict[str, Tensor], name: str
) -> None:
    model = make_llava()
    pixels = one_image_each["pixel_values"][:1]
    prompt = torch.tensor([[5, *IMAGE, 6]])
    cache: Any = DynamicCache(config=model.config)
    with record_routing(model) as records:
        watch(lambda: model(prompt, pixel_values=pixels, **{name: cache}))
        watch(lambda: model(torch.tensor([[7, 120, 8]]), **{name: cache}))
    assert len(records) == 1
    assert [layer.get_seq_length() for layer in cache.layers] == [21] * 4


@pytest.mark.parametrize("name", dict.fromkeys((CACHE, "past_key_values")))
def test_generate_continues_a_cache_under_every_name_of_the_backbone(
    make_llama: Callable[..., Any], name: str
) -> None:
    model = make_llama()
    ids = torch.randint(5, 100, (1, 16))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[:, 2:12] = True
    common = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    cache: Any = DynamicCache(config=model.config)
    out, warned = watch(lambda: model.generate(ids, target_mask=target, **{name: cache}, **common))
    assert torch.equal(out, model.generate(ids, target_mask=target, **common))
    assert [layer.get_seq_length() for layer in cache.layers] == [19] * 4
    assert [category for category, _ in warned] == [FutureWarning] * (name != CACHE)


def test_the_signature_names_the_cache(make_llama: Callable[..., Any]) -> None:
    class Old(nn.Module):
        def forward(self, past_key_values: Any = None, **kwargs: Any) -> None: ...

    class New(nn.Module):
        def forward(self, cache: Any = None, **kwargs: Any) -> None: ...

    class Open(nn.Module):
        def forward(self, **kwargs: Any) -> None: ...

    assert [cache_name(module) for module in (Old, New(), Open())] == [*NAMES, CACHE]
    model = make_llama()
    parts = (model, model.model, *model.model.layers)
    assert {part.pmod_cache_name for part in parts} == {CACHE}
    assert CACHE in inspect.signature(model.forward).parameters


def test_a_cache_is_found_under_the_names_of_its_module() -> None:
    given = {"past_key_values": 1, "cache": 2}
    assert [find_cache(given, name) for name in NAMES] == [1, 2]
    assert find_cache({"past_key_values": 1}, "cache") == 1
    assert find_cache({"cache": 2}, "past_key_values") is None
    assert find_cache({}, "cache") is None
