"""PModConfig and the schedules it describes."""

import copy
import json
import math
import pickle
from typing import Any

import pytest

from pmod_model import PModConfig
from pmod_model.schedule import layer_ratios

# Retention of LLaVA-1.5-7B: cos(i pi / 31) / 2 + 1/2 where it is at most 0.85, and at least 0.15.
RECIPE = [0.844483, 0.806053, 0.764482, 0.720197, 0.673653, 0.625326, 0.575714, 0.525325]
RECIPE += [0.474675, 0.424286, 0.374674, 0.326347, 0.279803, 0.235518, 0.193947, 0.155517]
RECIPE += [0.15] * 8


def test_the_default_is_the_recipe_of_the_paper() -> None:
    ratios = layer_ratios(PModConfig(), 32)
    assert list(ratios) == list(range(8, 32))
    assert list(ratios.values()) == pytest.approx(RECIPE, abs=5e-7)
    mean = (8 + sum(ratios.values())) / 32
    assert mean == pytest.approx(0.5375, abs=1e-4)


def test_decay_depth_is_the_last_layer_unless_it_is_given() -> None:
    last = layer_ratios(PModConfig(min_ratio=0), 40)[39]
    assert last == pytest.approx(0.0, abs=1e-15)
    rising = layer_ratios(PModConfig(min_ratio=0, decay_depth=31), 40)
    assert rising[31] == pytest.approx(0.0, abs=1e-15)
    assert rising[39] == math.cos(39 * math.pi / 31) / 2 + 0.5


def test_max_ratio_is_a_threshold_and_min_ratio_a_floor() -> None:
    config = PModConfig(schedule="shifted_linear", mean_ratio=0.5, max_ratio=0.6, min_ratio=0.3)
    # 1, 0.75, 0.5, 0.25, 0
    assert layer_ratios(config, 5) == {2: 0.5, 3: 0.3, 4: 0.3}


def test_constant_and_listed_ratios_are_meant_as_written() -> None:
    config = PModConfig(schedule="constant", mean_ratio=0.05, layers=[1, 3])
    assert layer_ratios(config, 4) == {1: 0.05, 3: 0.05}
    listed = PModConfig(schedule=[1.0, None, 0.5, 0.0])
    assert layer_ratios(listed, 4) == {2: 0.5, 3: 0.0}
    assert layer_ratios(PModConfig(schedule=[1.0, 0.5], max_ratio=1.0), 2) == {0: 1.0, 1: 0.5}


def test_one_layer_has_a_schedule() -> None:
    assert layer_ratios(PModConfig(max_ratio=1.0, mean_ratio=0.5), 1) == {0: 1.0}


@pytest.mark.parametrize(
    "config",
    [
        PModConfig(),
        PModConfig(schedule=[None, 0.5, 1], layers=(1, 2), pool="image", router_bias=False),
        PModConfig(schedule="shifted_linear", decay_depth=31, gate_activation="softmax"),
    ],
)
def test_json_copy_and_pickle_round_trips(config: PModConfig) -> None:
    assert PModConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_it_is_immutable() -> None:
    with pytest.raises(AttributeError):
        PModConfig().mean_ratio = 0.3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean_ration": 0.5}, 'unknown field "mean_ration"; did you mean "mean_ratio"?'),
        ({"zzz": 0.5}, 'unknown field "zzz"; fields: schedule, mean_ratio'),
        ({"mean_ratio": 1.2}, r"mean_ratio: expected a number in \[0, 1\], got 1.2"),
        ({"min_ratio": -0.1}, r"min_ratio: expected a number in \[0, 1\], got -0.1"),
        ({"max_ratio": math.nan}, r"max_ratio: expected a number in \[0, 1\], got nan"),
        ({"max_ratio": 0.2, "min_ratio": 0.5}, "got max_ratio 0.2 < min_ratio 0.5"),
        ({"schedule": "cosine"}, "schedule: expected one of \"shifted_cosine\", .*got 'cosine'"),
        ({"schedule": [0.5, 1.5]}, r"schedule\[1\]: expected a number in \[0, 1\], got 1.5"),
        ({"decay_depth": 0}, "decay_depth: expected an integer >= 1, got 0"),
        ({"gate_activation": "relu"}, "gate_activation: expected one of"),
        ({"gate_scale": -1}, "gate_scale: expected a number >= 0, got -1"),
        ({"gate_bias": math.inf}, "gate_bias: expected a finite number, got inf"),
        ({"target_tokens": "images"}, "target_tokens: expected one of"),
        ({"pool": "batch"}, "pool: expected one of"),
        ({"layers": [3, 1]}, r"layers: expected ascending indices, got \[3, 1\]"),
        ({"layers": [-1]}, r"layers\[0\]: expected an integer >= 0, got -1"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        PModConfig(**fields)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        PModConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean_ratio": "0.5"}, "mean_ratio: expected a number in .*, got '0.5'"),
        ({"mean_ratio": True}, "mean_ratio: expected a number"),
        ({"schedule": 0.5}, "schedule: expected the name of a curve or a list of ratios, got 0.5"),
        ({"schedule": ["0.5"]}, r"schedule\[0\]: expected a number"),
        ({"decay_depth": 31.0}, "decay_depth: expected an integer >= 1, got 31.0"),
        ({"gate_mlp": 1}, "gate_mlp: expected true or false, got 1"),
        ({"gate_scale": None}, "gate_scale: expected a number, got None"),
        ({"layers": 3}, "layers: expected a list of layer indices, got 3"),
    ],
)
def test_values_of_another_type_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PModConfig(**fields)


def test_a_list_of_another_length_than_the_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="schedule: expected 3 ratios, one per layer, got 2"):
        layer_ratios(PModConfig(schedule=[0.5, 0.5]), 3)
    with pytest.raises(ValueError, match=r"layers: expected indices 0\.\.2, got 3"):
        layer_ratios(PModConfig(layers=[1, 3]), 3)
