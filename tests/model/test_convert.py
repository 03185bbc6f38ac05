"""Configs and checkpoints of the authors' code, both ways."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig

from pmod_model import PModConfig, PModLlavaConfig, PModLlavaForConditionalGeneration, inject_pmod
from pmod_model.convert import (
    config_from_official,
    config_to_official,
    state_dict_from_official,
    state_dict_to_official,
)
from pmod_model.schedule import layer_ratios

RECIPE: dict[str, Any] = {
    "model_type": "pmod_llava_llama",
    "num_hidden_layers": 32,
    "mod_target_layers": "shiftedcos_decay_0.85_0.15",
    "mod_router_factor": 0.5,
    "mod_weight_norm": "tanh_0.2_1",
    "mod_bias_enabled": True,
    "mod_target_token_type": "vision_all",
}


def test_the_recipe_has_the_default_settings_and_their_depth() -> None:
    assert config_from_official(RECIPE) == PModConfig(decay_depth=31)


@pytest.mark.parametrize(
    ("layers", "indices"),
    [
        ("deep_all", [2, 3, 4, 5, 6]),
        ("deep_all_include_last", [2, 3, 4, 5, 6, 7]),
        ("interleave", [1, 3, 5, 7]),
    ],
)
def test_constant_layer_sets(layers: str, indices: list[int]) -> None:
    official = RECIPE | {"mod_target_layers": layers, "mod_router_factor": 0.95}
    official["num_hidden_layers"] = 8
    ratios = layer_ratios(config_from_official(official), 8)
    assert ratios == dict.fromkeys(indices, 0.95)


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("tanh_0.2_1", ("tanh", 0.2, 1.0)),
        ("tanh_0.5_-0.25", ("tanh", 0.5, -0.25)),
        ("none_1_0", ("none", 1.0, 0.0)),
        ("softmax", ("softmax", 1.0, 1.0)),
    ],
)
def test_gates(text: str, gate: tuple[str, float, float]) -> None:
    config = config_from_official(RECIPE | {"mod_weight_norm": text})
    assert (config.gate_activation, config.gate_scale, config.gate_bias) == gate


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mod_weight_norm": "sigmoid_2_0", "mod_bias_enabled": False},
        {"mod_target_layers": "shiftedlinear_decay_0.9_0.2", "mod_target_token_type": "all"},
        {"mod_target_layers": "deep_all", "mod_target_token_type": "vision_hr"},
        {"mod_target_layers": "deep_all_include_last", "mod_weight_norm": "tanh_0.123456789_-2.5"},
        {"mod_target_layers": "interleave"},
    ],
)
def test_config_round_trip(changes: dict[str, Any]) -> None:
    official = RECIPE | changes
    back = config_to_official(config_from_official(official), 32)
    assert back == {key: value for key, value in official.items() if key.startswith("mod_")}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PModConfig(decay_depth=39), "decay_depth: expected 31"),
        (PModConfig(pool="image"), "pool: expected 'sequence'"),
        (PModConfig(gate_mlp=False), "gate_mlp: expected True"),
        (PModConfig(schedule=[0.5] * 32), "schedule: expected shifted_cosine"),
        (PModConfig(schedule="constant"), "schedule: expected shifted_cosine"),
    ],
)
def test_settings_the_official_code_does_not_know(config: PModConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_to_official(config, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mod_target_layers": "shiftedcos_decay_0.85"},
            "mod_target_layers: expected shiftedcos_decay",
        ),
        (
            {"mod_target_layers": "shiftedcos_decay_a_b"},
            "mod_target_layers: expected numbers .* got a",
        ),
        ({"mod_target_layers": 3}, "mod_target_layers: expected"),
        ({"mod_weight_norm": "relu_1_0"}, "mod_weight_norm: expected tanh, sigmoid"),
        ({"mod_weight_norm": "tanh_1"}, "mod_weight_norm: expected tanh, sigmoid"),
        ({"mod_target_token_type": "text"}, "mod_target_token_type: expected one of vision_all"),
    ],
)
def test_official_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_official(RECIPE | changes)


def test_a_missing_key_is_named() -> None:
    official = {key: value for key, value in RECIPE.items() if key != "mod_router_factor"}
    with pytest.raises(ValueError, match="mod_router_factor: expected a key"):
        config_from_official(official)


def official_llava(layers: int, routed: set[int]) -> dict[str, torch.Tensor]:
    """An official checkpoint in names, with the shapes of `tiny_llava`."""
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [32, 8],
        "model.norm.weight": [8],
        "lm_head.weight": [32, 8],
        "model.mm_projector.0.weight": [8, 4],
        "model.mm_projector.0.bias": [8],
        "model.mm_projector.2.weight": [8, 8],
        "model.mm_projector.2.bias": [8],
    }
    for i in range(layers):
        wrapper = "decoder_layer." if i in routed else ""
        prefix = f"model.layers.{i}.{wrapper}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = [8, 8]
        shapes |= {f"{prefix}mlp.{name}_proj.weight": [12, 8] for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = [8, 12]
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{prefix}{name}.weight": [8] for name in norms}
        if i in routed:
            shapes[f"model.layers.{i}.router.router.weight"] = [1, 8]
            shapes[f"model.layers.{i}.router.router.bias"] = [1]
    clip = "model.vision_tower.vision_tower.vision_model."
    for part in (
        "pre_layrnorm",
        "post_layernorm",
        "encoder.layers.0.layer_norm1",
        "encoder.layers.0.layer_norm2",
    ):
        shapes |= {f"{clip}{part}.weight": [4], f"{clip}{part}.bias": [4]}
    shapes[clip + "embeddings.class_embedding"] = [4]
    shapes[clip + "embeddings.patch_embedding.weight"] = [4, 3, 2, 2]
    shapes[clip + "embeddings.position_embedding.weight"] = [5, 4]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        part = f"{clip}encoder.layers.0.self_attn.{name}"
        shapes |= {f"{part}.weight": [4, 4], f"{part}.bias": [4]}
    for name, shape in (("fc1", [6, 4]), ("fc2", [4, 6])):
        part = f"{clip}encoder.layers.0.mlp.{name}"
        shapes |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def tiny_llava(schedule: list[float]) -> PModLlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=4,
        patch_size=2,
    )
    text = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=len(schedule),
        num_attention_heads=2,
        vocab_size=32,
        pad_token_id=None,
    )
    base = LlavaConfig(vision_config=vision, text_config=text)
    fields = {"vision_config": base.vision_config, "text_config": base.text_config}
    return PModLlavaForConditionalGeneration(
        PModLlavaConfig(pmod=PModConfig(schedule=schedule), **fields)
    )


def test_llava_checkpoint_fills_the_model_and_comes_back() -> None:
    official = official_llava(3, {1, 2})
    converted = state_dict_from_official(official)
    model = tiny_llava([1.0, 0.5, 0.5])
    model.load_state_dict(converted, strict=True)
    back = state_dict_to_official(model.state_dict())
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_text_only_checkpoint_has_llama_names() -> None:
    config: Any = tiny_llava([0.5, 0.5]).config.text_config
    model = LlamaForCausalLM(config)
    inject_pmod(model, PModConfig(schedule=[1.0, 0.5]))
    official = state_dict_to_official(model.state_dict())
    assert "model.layers.1.router.router.bias" in official
    assert "model.layers.1.decoder_layer.mlp.up_proj.weight" in official
    assert "model.layers.0.mlp.up_proj.weight" in official
    back = state_dict_from_official(official)
    assert back.keys() == model.state_dict().keys()


def test_part_of_a_checkpoint_converts() -> None:
    shard = {"model.layers.31.decoder_layer.mlp.up_proj.weight": torch.ones(1)}
    assert list(state_dict_from_official(shard)) == ["model.layers.31.mlp.up_proj.weight"]
    ours = {"model.language_model.layers.31.mlp.up_proj.weight": torch.ones(1)}
    assert list(state_dict_to_official(ours)) == ["model.layers.31.mlp.up_proj.weight"]
    assert list(state_dict_to_official(ours, layers=[31])) == list(shard)
    newline = {"model.image_newline": torch.ones(1)}
    assert list(state_dict_from_official(newline)) == list(newline)


def test_buffers_are_dropped_and_unknown_keys_are_listed() -> None:
    known = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    assert state_dict_from_official(known) == {}
    unknown = {
        "model.layers.0.moe.gate.weight": torch.ones(1),
        "model.layers.0.router.router.gain": torch.ones(1),
        "transformer.wte.weight": torch.ones(1),
        "model.mm_projector.1.weight": torch.ones(1),
        "model.layers.x.mlp.up_proj.weight": torch.ones(1),
    }
    with pytest.raises(ValueError, match="got 5 unknown: ") as error:
        state_dict_from_official({**unknown, "lm_head.weight": torch.ones(1)})
    assert all(key in str(error.value) for key in unknown)
    with pytest.raises(ValueError, match=r"got 1 unknown: model\.layers\.0\.moe\.gate\.weight"):
        state_dict_to_official({"model.layers.0.moe.gate.weight": torch.ones(1)})
