"""The configs of accelerate and DeepSpeed that come with the package load, and say what they should.

Two CPU ranks train with them in test_ranks.py and test_trainers.py.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from training import tiny_llava as tiny
from training.ranks import needs_deepspeed
from training.ranks_engines import launch_environment

CONFIGS: Any = resources.files("pmod_model.training") / "configs"
# of the 7B models: 4096 wide; routers, norms and biases stay whole on every rank
WIDTH = 4096


def test_accelerate_loads_its_config() -> None:
    config: Any = load_config_from_file(str(CONFIGS / "fsdp2.yml"))
    assert config.distributed_type == "FSDP"
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (8, 1, "bf16")
    assert config.use_cpu is False


def test_accelerate_launch_makes_a_plugin_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    values = launch_environment(CONFIGS / "fsdp2.yml")
    assert values["ACCELERATE_USE_FSDP"] == "true"
    assert values["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    plugin: Any = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(tiny.make_model())
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert plugin.auto_wrap_policy is not None
    assert plugin.cpu_ram_efficient_loading is False
    plugin.set_mixed_precision("bf16")
    assert isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy)
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


@needs_deepspeed
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_loads_its_configs(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    filled = {
        "bf16": {"enabled": True},
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 16,
    }
    assert {name for name, value in config.items() if "auto" in (value, *_values(value))} == {
        *filled
    }
    loaded: Any = DeepSpeedConfig({**config, **filled})
    zero = loaded.zero_config
    assert (int(zero.stage), loaded.train_batch_size, loaded.gradient_clipping) == (stage, 16, 1.0)
    assert loaded.bfloat16_config.enabled
    assert zero.reduce_bucket_size == WIDTH**2
    if stage == 3:
        assert WIDTH + 1 < zero.param_persistence_threshold == 10 * WIDTH
        assert zero.gather_16bit_weights_on_model_save
    plugin: Any = DeepSpeedPlugin(hf_ds_config=str(CONFIGS / f"zero{stage}.json"))
    assert plugin.zero_stage == stage
    assert plugin.hf_ds_config.is_zero3() == (stage == 3)


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []
