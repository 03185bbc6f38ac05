"""Other ratios for a trained model, and another number of layers than it was trained with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.conftest import TEXT
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pmod_model import PModConfig, inject_pmod, load_pretrained, record_routing
from pmod_model.ratios import set_ratios


def kept(model: Any, inputs: dict[str, Tensor]) -> dict[int, int]:
    with torch.no_grad(), record_routing(model) as records:
        model(**inputs)
    return {layer: int(mask[0].sum()) for layer, mask in records[0].kept.items()}


def test_layers_keep_what_the_new_schedule_says(
    make_llava: Callable[..., Any], one_image_each: dict[str, Tensor], tmp_path: Path
) -> None:
    model = make_llava()  # layer 0 is dense
    assert kept(model, one_image_each) == {1: 8, 2: 4, 3: 1}
    ratios = set_ratios(model, schedule=[0.25, 0.25, None, 0.5])
    # a layer without a router stays dense; one that should be dense keeps all 16 tokens
    assert ratios == {1: 0.25, 2: 1.0, 3: 0.5}
    assert kept(model, one_image_each) == {1: 4, 2: 16, 3: 8}
    expected = model(**one_image_each).logits
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert kept(again, one_image_each) == {1: 4, 2: 16, 3: 8}
    assert torch.equal(again(**one_image_each).logits, expected)


def test_a_curve_can_be_lowered(make_llama: Callable[..., Any]) -> None:
    model = make_llama(schedule="shifted_cosine")
    before = dict(model.model.pmod_ratios)
    after = set_ratios(model, mean_ratio=0.3)
    assert after.keys() == before.keys()
    assert all(after[layer] <= before[layer] for layer in before)
    assert after[1] == pytest.approx(0.3 + 0.25)  # cos(pi / 3) / 2
    assert set_ratios(model, mean_ratio=0.5, schedule="shifted_cosine") == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_scale": 0.1}, "gate_scale: expected a field of schedule"),
        ({"mean_ratio": 2}, "mean_ratio: expected a number in"),
        ({"schedule": [0.5]}, "schedule: expected 4 ratios"),
    ],
)
def test_other_settings_are_refused(
    make_llama: Callable[..., Any], fields: dict[str, Any], message: str
) -> None:
    model = make_llama()
    before = model.config.pmod
    with pytest.raises(ValueError, match=message):
        set_ratios(model, **fields)
    assert model.config.pmod == before


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a p-MoD model, got LlamaForCausalLM"):
        set_ratios(LlamaForCausalLM(LlamaConfig(**TEXT)), mean_ratio=0.3)


def test_another_number_of_layers_is_warned_of(
    make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    make_llama(schedule="shifted_cosine").save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    assert config.pmod_layers == 4
    config.num_hidden_layers = 6
    model = LlamaForCausalLM(config)
    with pytest.warns(UserWarning, match="trained with 4 layers, and this model has 6"):
        inject_pmod(model, PModConfig.from_dict(config.pmod))
    # the same number, or ratios that are listed one by one, are no news
    config = LlamaConfig.from_pretrained(tmp_path)
    inject_pmod(LlamaForCausalLM(config), PModConfig.from_dict(config.pmod))
    config.num_hidden_layers = 3
    inject_pmod(LlamaForCausalLM(config), PModConfig(schedule=[None, 0.5, 0.5]))
