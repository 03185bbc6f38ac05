"""Injection leaves names and keys alone, works across backbones, and refuses what it cannot do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.caches import CACHE, cache_of
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from pmod_model import PModConfig, inject_pmod, record_routing
from pmod_model import layer as layer_module

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
BACKBONES = [
    (LlamaForCausalLM, LlamaConfig(**TEXT)),
    (MistralForCausalLM, MistralConfig(**TEXT, sliding_window=None)),
    (Qwen2ForCausalLM, Qwen2Config(**TEXT)),
    (Qwen3ForCausalLM, Qwen3Config(**TEXT, head_dim=16)),
    (Phi3ForCausalLM, Phi3Config(**TEXT, sliding_window=None)),
    (GraniteForCausalLM, GraniteConfig(**TEXT, residual_multiplier=0.3, attention_multiplier=0.25)),
]


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[0, 2:18] = target[1, 1:9] = True
    return ids, target


def randomise_routers(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "mod_router" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def test_names_keys_and_outputs_stay_those_of_the_backbone() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    keys = set(model.state_dict())
    ids, _ = tokens()
    before = model(ids, output_hidden_states=True)
    assert inject_pmod(model, RATIOS) is model
    added = {
        f"model.layers.{i}.mod_router.{name}" for i in (1, 2, 3) for name in ("weight", "bias")
    }
    assert set(model.state_dict()) == keys | added
    assert not any(model.state_dict()[key].any() for key in added)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.model, LlamaModel)
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in model.model.layers)
    assert {type(layer).__name__ for layer in model.model.layers} == {"LlamaDecoderLayer"}
    assert type(model).__name__ == "LlamaForCausalLM"
    after = model(ids, output_hidden_states=True)
    assert all(map(torch.equal, before.hidden_states, after.hidden_states))
    assert model.pmod_config == RATIOS
    assert model.config.pmod == RATIOS.to_dict()


@pytest.mark.parametrize(
    ("cls", "config"), BACKBONES, ids=lambda value: getattr(value, "__name__", "")
)
def test_backbones_decode_what_they_would_prefill(cls: Any, config: Any) -> None:
    model = randomise_routers(inject_pmod(cls(config), RATIOS))
    ids, target = tokens()
    with torch.no_grad(), record_routing(model) as records:
        out = model(ids, target_mask=target)
        step = model(ids[:, -1:], **{CACHE: cache_of(out)}).logits[:, -1]
        longer = torch.cat((ids, ids[:, -1:]), 1)
        padded = torch.nn.functional.pad(target, (0, 1))
        whole = model(longer, target_mask=padded, use_cache=False).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=1e-4)
    lengths = [layer.keys.shape[-2] for layer in cache_of(out).layers]
    # rows keep 4 + 8 and 12 + 4, 4 + 4 and 12 + 2, 4 + 1 and 12 + 0; one token was decoded
    assert lengths == [21, 17, 15, 13]
    assert [int(kept.sum()) for kept in records[0].kept.values()] == [12, 6, 1]


def test_the_fused_norms_are_what_their_modules_compute() -> None:
    import transformers.models as models

    homes = {
        "GraniteRMSNorm": models.granite.modeling_granite,
        "LlamaRMSNorm": models.llama.modeling_llama,
        "MistralRMSNorm": models.mistral.modeling_mistral,
        "Phi3RMSNorm": models.phi3.modeling_phi3,
        "Qwen2RMSNorm": models.qwen2.modeling_qwen2,
        "Qwen3RMSNorm": models.qwen3.modeling_qwen3,
        "Qwen3VLTextRMSNorm": models.qwen3_vl.modeling_qwen3_vl,
        "SmolLM3RMSNorm": models.smollm3.modeling_smollm3,
    }
    assert homes.keys() == layer_module.FUSED_NORMS
    x = torch.randn(5, 32).bfloat16()
    for name, module in homes.items():
        norm = getattr(module, name)(32, 1e-3).bfloat16()
        torch.nn.init.normal_(norm.weight)
        rows = x.float()
        rows = (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-3)).bfloat16()
        assert torch.equal(norm(x), norm.weight * rows), name
        weight, epsilon = layer_module.fused_norm(norm, x) or (None, 0)
        assert weight is norm.weight
        assert epsilon == 1e-3
        assert layer_module.fused_norm(norm, x.float()) is None


def qwen_vl() -> tuple[Any, dict[str, torch.Tensor]]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "in_chans": 3,
    }
    rope = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_scaling": rope},
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=118,
        vision_end_token_id=119,
    )
    image = [118, *[120] * 8, 119]
    rows = [[5, *image, 7, 8, 9], [*image, 10, 11, 12, 13]]
    ids = torch.tensor(rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 8], [1, 8, 4]]),
        "mm_token_type_ids": (ids == 120).int(),
    }
    return Qwen2_5_VLForConditionalGeneration(config), inputs


def test_qwen_vl_with_its_three_dimensional_positions() -> None:
    model, inputs = qwen_vl()
    randomise_routers(inject_pmod(model, RATIOS))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    options |= {"suppress_tokens": [118, 119, 120, 121], "eos_token_id": None, "pad_token_id": 0}
    with record_routing(model) as records:
        out = model.generate(**inputs, **options)
    assert torch.equal(
        out.sequences, model.generate(**inputs, **options, use_cache=False).sequences
    )
    assert [layer.keys.shape[-2] for layer in cache_of(out).layers] == [19, 15, 13, 11]
    assert torch.equal(records[0].target_mask, inputs["input_ids"] == 120)
    for index in range(2):
        alone = {name: inputs[name][[index]] for name in inputs if name != "pixel_values"}
        alone["pixel_values"] = inputs["pixel_values"].chunk(2)[index]
        one = model.generate(**alone, **options).sequences
        assert torch.equal(one[0], out.sequences[index])


def test_a_second_model_in_the_process_is_untouched() -> None:
    inject_pmod(LlamaForCausalLM(LlamaConfig(**TEXT)), RATIOS)
    other = LlamaForCausalLM(LlamaConfig(**TEXT))
    assert type(other) is LlamaForCausalLM
    assert not hasattr(other.model.layers[1], "mod_router")


def test_recording_ends_with_its_context(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    ids, target = tokens()
    with record_routing(model) as records:
        model(ids)
        assert records == []
        model(ids, target_mask=target)
    model(ids, target_mask=target)
    (record,) = records
    assert torch.equal(record.target_mask, target)
    assert [int(kept.sum()) for kept in record.kept.values()] == [12, 6, 1]
    for layer, kept in record.kept.items():
        assert not (kept & ~target).any()
        lowest_kept = record.logits[layer][0][kept[0]].min()
        assert lowest_kept >= record.logits[layer][0][target[0] & ~kept[0]].max()
        assert (record.gate[layer][~target] == 1).all()


def test_bare_models_are_injectable(make_llava: Callable[..., Any]) -> None:
    bare = make_llava().model
    fresh = LlavaForConditionalGeneration(bare.config).model
    inject_pmod(fresh, RATIOS)
    fresh.load_state_dict(bare.state_dict())
    ids = torch.tensor([[5, *[120] * 16, 6]])
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad(), record_routing(fresh) as records:
        got = fresh.eval()(ids, pixels)  # both by position
        expected = bare(input_ids=ids, pixel_values=pixels)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert int(records[0].kept[1].sum()) == 8


def test_the_record_says_whether_everything_was_finite() -> None:
    model = randomise_routers(inject_pmod(LlamaForCausalLM(LlamaConfig(**TEXT)), RATIOS))
    ids, target = tokens()
    flags = []
    for broken in (False, True):
        if broken:
            model.model.layers[2].mlp.down_proj.weight.data[3] = float("nan")
        with torch.no_grad(), record_routing(model) as records:
            model(ids, target_mask=target)
        flags.append(records[0].finite)
    assert torch.cat(flags).tolist() == [True, False]
