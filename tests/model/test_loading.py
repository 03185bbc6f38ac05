"""Save, load, and load what was never p-MoD: nothing lost, nothing left uninitialised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from pmod_model import (
    PModConfig,
    PModLlavaConfig,
    PModLlavaForConditionalGeneration,
    load_pretrained,
)

SETTINGS = PModConfig(schedule=[1.0, 0.5, 0.25, 0.1])
ROUTERS = {f"layers.{i}.mod_router.{name}" for i in (1, 2, 3) for name in ("weight", "bias")}


def routers(model: Any) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return {name: value for name, value in named.items() if "mod_router" in name}


def pmod_config(base: Any) -> PModLlavaConfig:
    fields = {key: value for key, value in base.to_dict().items() if key != "pmod"}
    return PModLlavaConfig(**{**fields, "model_type": "pmod_llava", "pmod": SETTINGS})


@pytest.fixture
def pmod_llava(make_llava: Callable[..., Any]) -> PModLlavaForConditionalGeneration:
    source = make_llava()
    model = PModLlavaForConditionalGeneration(pmod_config(source.config))
    model.load_state_dict(source.state_dict())
    return model.eval()


def test_a_new_model_has_its_config_and_zero_routers(make_llava: Callable[..., Any]) -> None:
    model = PModLlavaForConditionalGeneration(pmod_config(make_llava().config))
    assert model.pmod_config == SETTINGS
    assert isinstance(model, PModLlavaForConditionalGeneration)
    assert {name.split("language_model.")[1] for name in routers(model)} == ROUTERS
    assert not any(value.any() for value in routers(model).values())
    default = PModLlavaConfig()
    assert default.pmod == PModConfig().to_dict()


def test_round_trip_is_bit_equal(
    pmod_llava: Any, ragged_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    pmod_llava.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["PModLlavaForConditionalGeneration"]
    assert written["model_type"] == "pmod_llava"
    assert PModConfig.from_dict(written["pmod"]) == SETTINGS
    # LLaVA's key layout on disk, so that other tools read the backbone
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any(key.endswith("layers.1.mod_router.weight") for key in keys)
    expected = pmod_llava(**ragged_batch).logits
    for load in (
        PModLlavaForConditionalGeneration.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
        load_pretrained,
    ):
        model = load(tmp_path)
        assert type(model).__name__ == "PModLlavaForConditionalGeneration"
        assert model.pmod_config == SETTINGS
        state, original = model.state_dict(), pmod_llava.state_dict()
        assert state.keys() == original.keys()
        assert all(torch.equal(state[key], original[key]) for key in state)
        assert torch.equal(model(**ragged_batch).logits, expected)


def test_load_options_reach_the_routers(pmod_llava: Any, tmp_path: Path) -> None:
    pmod_llava.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {value.dtype for value in routers(model).values()} == {torch.bfloat16}


def test_a_llava_checkpoint_loads_with_zero_routers(
    pmod_llava: Any, make_llava: Callable[..., Any], tmp_path: Path
) -> None:
    base = LlavaForConditionalGeneration(pmod_config(make_llava().config))
    base.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["pmod"]
    written |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    cls: Any = PModLlavaForConditionalGeneration
    config = pmod_config(AutoConfig.from_pretrained(tmp_path))
    model, info = cls.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert set(info["missing_keys"]) == set(routers(model))
    assert not info["unexpected_keys"]
    assert not any(value.any() for value in routers(model).values())
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    plain, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert set(info["missing_keys"]) == set(routers(plain))
    assert not info["unexpected_keys"]
    assert plain.config.model_type == "pmod_llava"
    assert torch.equal(plain.lm_head.weight, base.lm_head.weight)
    again = load_pretrained(tmp_path, pmod=SETTINGS)
    assert type(again).__name__ == "LlavaForConditionalGeneration"
    assert again.pmod_config == SETTINGS
    assert not any(value.any() for value in routers(again).values())


def test_any_injected_model_loads(make_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = make_llama()
    ids = torch.randint(5, 100, (2, 12))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[:, 2:10] = True
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert isinstance(again, LlamaForCausalLM)
    assert again.pmod_config == model.pmod_config
    assert torch.equal(again(ids, target_mask=target).logits, model(ids, target_mask=target).logits)


def edit_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def test_missing_and_surplus_parameters_are_listed(
    make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.pop("model.layers.2.mod_router.weight"))
    with pytest.raises(
        ValueError, match=r"1 missing: model\.layers\.2\.mod_router\.weight, 0 unexp"
    ):
        load_pretrained(tmp_path)
    make_llama().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.update(extra=torch.ones(1)))
    with pytest.raises(ValueError, match="0 missing, 1 unexpected: extra"):
        load_pretrained(tmp_path)


def test_settings_must_come_from_one_place(make_llama: Callable[..., Any], tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "pmod")
    with pytest.raises(ValueError, match=r"pmod: expected None, because .* has its own"):
        load_pretrained(tmp_path / "pmod", pmod=SETTINGS)
    config = make_llama().config
    del config.pmod
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"pmod: expected a PModConfig, because .* no p-MoD settings"
    ):
        load_pretrained(tmp_path / "base")


def test_an_unknown_class_is_named(make_llama: Callable[..., Any], tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["architectures"] = ["OtherModel"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"config.architectures, got \['OtherModel'\]"):
        load_pretrained(tmp_path)
