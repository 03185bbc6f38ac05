"""DDP, FSDP2 and ZeRO through accelerate on CPU ranks, and whole tensors of what they spread."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor, distributed

CONFIGS: Any = resources.files("pmod_model.training") / "configs"
TIMEOUT = timedelta(seconds=45)
LEARNING_RATE = 0.05
MICRO_BATCH = 2


class Engine:
    """Trains with ranks as one of: ddp, fsdp2, zero1, zero2, zero3; with -bf16, in bfloat16."""

    def __init__(self, name: str, timeout: timedelta = TIMEOUT) -> None:
        self.name = name
        self.stage = int(name[4]) if name.startswith("zero") else 0
        if self.stage:
            self.accelerator = _deepspeed(self.stage, bf16=name.endswith("bf16"))
        else:
            distributed.init_process_group("gloo", timeout=timeout)
            # a search for unused parameters in every step would hide those that get no gradient
            plain = DistributedDataParallelKwargs(find_unused_parameters=False)
            self.accelerator = Accelerator(cpu=True, kwargs_handlers=[plain])
            if name == "fsdp2":
                _fully_shard(self.accelerator)
        self.rank = distributed.get_rank()

    def prepare(self, model: Any) -> tuple[Any, Any]:
        """The model and a plain SGD over what it trains; what was prepared before is let go."""
        self.accelerator.free_memory()
        return self.accelerator.prepare(model, sgd(model))

    def backward(self, model: Any, loss: Tensor) -> None:
        if self.stage:
            model.backward(loss)  # accelerate's would step at once, before gradients can be read
        else:
            self.accelerator.backward(loss)

    def step(self, model: Any, optimizer: Any) -> None:
        if self.stage:
            model.step()
        else:
            optimizer.step()
            optimizer.zero_grad()

    def gradients(self, model: Any) -> dict[str, Tensor]:
        """Whole gradients of what is trained; a parameter without one is left out."""
        found = {}
        for name, parameter in self.unwrapped(model).named_parameters():
            grad = self._gradient(parameter) if parameter.requires_grad else None
            if grad is not None:
                found[name] = grad.clone()
        return found

    def parameters(self, model: Any) -> dict[str, Tensor]:
        """Whole parameters."""
        return {
            name: self._whole(parameter).detach().clone()
            for name, parameter in self.unwrapped(model).named_parameters()
        }

    def unwrapped(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model)

    def _gradient(self, parameter: Any) -> Tensor | None:
        if self.stage:
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(parameter)
        grad = parameter.grad
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad

    def _whole(self, parameter: Any) -> Tensor:
        if self.stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def sgd(model: Any) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=LEARNING_RATE)


def configured_deepspeed(name: str) -> dict[str, Any]:
    """Arguments of a Trainer that runs ZeRO on CPU ranks, with the package's config as it is."""
    _without_own_reduce()
    # the Trainer would start accelerate without a backend, which is for lone processes
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo", timeout=TIMEOUT)
    return {
        "deepspeed": str(CONFIGS / f"{name}.json"),
        "accelerator_config": {"use_configured_state": True},
        "use_cpu": False,
    }


def _without_own_reduce() -> None:
    """DeepSpeed would compile a reduction over shared memory on first use; gloo is tested here."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _deepspeed(stage: int, bf16: bool) -> Accelerator:
    """An accelerator with the config of this stage that comes with the package."""
    _without_own_reduce()
    config = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    # what the Trainer would fill in for "auto"
    config |= {
        "bf16": {"enabled": bf16},
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "train_batch_size": 2 * MICRO_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
    }
    # several buckets even for a small model; and routers and norms are spread, not kept whole
    config["zero_optimization"]["reduce_bucket_size"] = 20_000
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    # without this accelerate takes a process without a GPU for a lone one
    group = InitProcessGroupKwargs(backend="gloo", timeout=TIMEOUT)
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=[group]
    )


def _fully_shard(accelerator: Accelerator) -> None:
    """Give the accelerator the FSDP plugin of the package's config, as it would do itself on GPUs.

    accelerate looks for the plugin only where there are GPUs.
    """
    values = launch_environment(CONFIGS / "fsdp2.yml")
    os.environ.update({name: value for name, value in values.items() if name.startswith("FSDP_")})
    state: Any = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = DistributedType.FSDP


def launch_environment(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file CONFIG` puts into the environment of every rank."""
    parser = launch_command_parser()
    launch, _, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(config), "train.py"])
    )
    return prepare_multi_gpu_env(launch)


def leave() -> None:
    """End the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
