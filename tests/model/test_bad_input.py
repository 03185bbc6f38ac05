"""What cannot work is refused by name, and leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.caches import CACHE
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pmod_model import PModConfig, inject_pmod

RATIOS = PModConfig(schedule=[None, 0.5, 0.25, 0.1])
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[0, 2:18] = target[1, 1:9] = True
    return ids, target


def refused(match: str, model: Any, config: PModConfig = RATIOS) -> None:
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        inject_pmod(model, config)
    assert [type(module) for module in model.modules()] == classes


def test_blocks_of_another_kind_are_refused() -> None:
    refused("expected a decoder with layers.*got BertModel", BertModel(BertConfig(**BERT)))
    post_norm = LlamaForCausalLM(LlamaConfig(**TEXT))
    del post_norm.model.layers[2].input_layernorm
    refused(r"layers\[2\]: .* got LlamaDecoderLayer without input_layernorm", post_norm)
    window = MistralForCausalLM(MistralConfig(**TEXT, sliding_window=8))
    refused("expected full attention in a routed layer, got a sliding window of 8", window)


BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_a_block_that_computes_something_else_is_refused() -> None:
    class ParallelLayer(LlamaDecoderLayer):
        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            normed = self.input_layernorm(hidden_states)
            return hidden_states + self.self_attn(normed, **kwargs)[0] + self.mlp(normed)

    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    for index in range(4):
        model.model.layers[index] = ParallelLayer(model.config, index)
    refused("ParallelLayer, which differs", model)
    assert not any("mod_router" in name for name, _ in model.named_modules())


def test_injecting_twice_and_over_hooks_is_refused(make_llama: Callable[..., Any]) -> None:
    refused("already injected", make_llama())
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    layer = model.model.layers[2]
    layer.forward = layer.forward
    refused("hooked LlamaDecoderLayer", model)


def test_settings_that_do_not_fit_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    refused("gate_attention: expected False", model, PModConfig(gate_attention=True))
    of_videos = LlamaForCausalLM(LlamaConfig(**{**TEXT, "video_token_id": 121}))
    refused(
        'pool: expected "sequence" or "image" .* of videos', of_videos, PModConfig(pool="frame")
    )
    refused("expected a schedule with a ratio", model, PModConfig(schedule=[1.0] * 4))
    refused("expected 4 ratios, one per layer, got 2", model, PModConfig(schedule=[0.5] * 2))
    refused(r"layers: expected indices 0\.\.3, got 7", model, PModConfig(layers=[7]))
    with pytest.raises(TypeError, match="config: expected a PModConfig, got dict"):
        inject_pmod(model, {"mean_ratio": 0.5})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a PreTrainedModel, got Linear"):
        inject_pmod(torch.nn.Linear(2, 2), RATIOS)  # type: ignore[arg-type]


def test_masks_that_do_not_match_are_named(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    ids, target = tokens()
    with pytest.raises(ValueError, match=r"target_mask: expected bool \[2, 20\], got \[2, 19\]"):
        model(ids, target_mask=target[:, 1:])
    with pytest.raises(TypeError, match="target_mask: expected dtype bool, got int64"):
        model(ids, target_mask=target.long())
    with pytest.raises(
        ValueError, match=r"target_mask: expected 2 dimensions \[2, 20\], got \[2, 20, 1\]"
    ):
        model(ids, target_mask=target[..., None])
    with pytest.raises(
        ValueError, match="target_mask: expected device cpu like the input, got meta"
    ):
        model(ids, target_mask=target.to("meta"))
    with pytest.raises(TypeError, match="target_mask: expected a tensor, got list"):
        model(ids, target_mask=[[True]])
    with pytest.raises(
        ValueError, match=r"attention_mask: expected shape \[2, at least 20\], got \[2, 7\]"
    ):
        model(ids, attention_mask=torch.ones(2, 7), target_mask=target)
    square = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="attention_mask: expected a padding mask"):
        model(ids, attention_mask=square, target_mask=target)


def test_caches_of_one_length_for_all_layers_are_refused(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    ids, target = tokens()
    cache = DynamicCache(config=model.config)
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=8)
    message = rf"{CACHE}.layers\[1\]: expected a DynamicLayer or StaticLayer, got DynamicSliding"
    with pytest.raises(ValueError, match=message):
        model(ids, target_mask=target, **{CACHE: cache})


def test_images_with_embeddings_need_a_mask(make_llava: Callable[..., Any]) -> None:
    model = make_llava()
    embeddings = torch.randn(1, 20, 64)
    with pytest.raises(
        ValueError, match=r"target_mask: expected bool .* inputs_embeds come with images"
    ):
        model(inputs_embeds=embeddings, pixel_values=torch.randn(1, 3, 56, 56))
