"""Injection leaves names and keys alone, works across backbones, and refuses what it cannot do."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
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
