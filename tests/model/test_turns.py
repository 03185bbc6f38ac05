"""Turns that continue a cache: kept tokens stay, new images are routed among themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.caches import CACHE, cache_of
from transformers import DynamicCache, LlavaConfig

from pmod_model import record_routing
from pmod_model.targets import tokens_per_image

IMAGE, IMAGE_TOKENS, STEPS = 120, 16, 10
# float32 sums in another order: 1e-6 of a logit of about 10, times a few layers
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def generate(model: Any, inputs: dict[str, Any], steps: int = STEPS, **options: Any) -> Any:
    options |= {"max_new_tokens": steps, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, **options)


def lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


def test_a_second_turn_continues_a_kept_cache(
    make_llava: Callable[..., Any],
) -> None:
    model = make_llava()
    image = [IMAGE] * IMAGE_TOKENS
    ids = torch.tensor([[5, 6, *image, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56)}
    first = generate(model, inputs, steps=4)
    ids = torch.cat((first.sequences, torch.tensor([[33, 34, 35]])), 1)
    mask = torch.ones_like(ids)
    kept = generate(model, {"input_ids": ids, "attention_mask": mask, CACHE: cache_of(first)})
    anew = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    assert torch.equal(kept.sequences, generate(model, anew, use_cache=False).sequences)
    # 20 prompt tokens of which 16 image tokens, 4 + 3 + 9 after them
    assert lengths(cache_of(kept)) == [36, 28, 24, 21]


def test_an_image_in_a_later_turn_is_routed_by_its_own_budget(
    make_llava: Callable[..., Any],
) -> None:
    model = make_llava()
    image = [IMAGE] * IMAGE_TOKENS
    first = {"input_ids": torch.tensor([[5, *image, 6]]), "pixel_values": torch.randn(1, 3, 56, 56)}
    later = {"input_ids": torch.tensor([[7, *image, 8]]), "pixel_values": torch.randn(1, 3, 56, 56)}
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad(), record_routing(model) as records:
        model(**first, **{CACHE: cache})
        model(**later, **{CACHE: cache})
    assert [int(record.kept[2].sum()) for record in records] == [4, 4]
    assert lengths(cache) == [36, 20, 12, 6]
    assert [layer.get_seq_length() for layer in cache.layers] == [36] * 4


def test_a_later_turn_sees_only_what_the_first_one_kept(
    make_llama: Callable[..., Any], oracle: Any
) -> None:
    # with one pool per turn, two turns equal one pass whose turns are two pools
    model = make_llama()
    ids = torch.randint(5, 100, (2, 24))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[:, 2:10] = target[:, 14:20] = True
    pools = (torch.arange(24) >= 12).int().expand(2, -1)
    with torch.no_grad():
        expected, _ = oracle(model)(oracle(model).embed(ids), target, pools=pools)
        first = model(ids[:, :12], target_mask=target[:, :12])
        later = model(ids[:, 12:], target_mask=target[:, 12:], **{CACHE: cache_of(first)})
    got = torch.cat((first.logits, later.logits), 1)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert lengths(cache_of(later)) == [24, 10 + 7, 10 + 3, 10]


@pytest.mark.parametrize(
    ("model_type", "strategy", "expected"),
    [
        ("clip_vision_model", "default", 64),
        ("clip_vision_model", "full", 65),  # with the class token
        ("siglip_vision_model", "full", 64),  # SigLIP has none
    ],
)
def test_tokens_of_an_image_count_the_class_token_if_there_is_one(
    model_type: str, strategy: str, expected: int
) -> None:
    vision = {"model_type": model_type, "image_size": 64, "patch_size": 8}
    config = LlavaConfig(vision_config=vision, vision_feature_select_strategy=strategy)
    assert tokens_per_image(config) == expected


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prompt_lookup_num_tokens": 3, "eos_token_id": 1}],
    ids=["no_cache", "lookup"],
)
def test_a_given_mask_holds_however_the_prompt_is_read(
    make_llama: Callable[..., Any], options: dict[str, Any]
) -> None:
    model = make_llama()
    ids = torch.randint(5, 100, (1, 16))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[:, 2:12] = True
    common = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    plain = model.generate(ids, target_mask=target, **common)
    dense = model.generate(ids, **common)
    assert torch.equal(model.generate(ids, target_mask=target, **common, **options), plain)
    assert not torch.equal(plain, dense)
