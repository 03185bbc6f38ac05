"""What others do to a model: autocast, offloading, spreading over devices, quantisation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import send_to_device
from model.backbones import pad_left, text_rows
from model.caches import cache_of
from model.conftest import RATIOS, TEXT, llava_config
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from pmod_model import (
    PModConfig,
    PModLlavaForConditionalGeneration,
    inject_pmod,
    load_pretrained,
)
from pmod_model.context import RoutingContext, RoutingRecord
from pmod_model.llava import PModLlavaConfig
from pmod_ops import RoutingPlan

STEPS = 6
LENGTHS = [n + STEPS - 1 for n in (20, 12, 8, 5)]
LAYERS = [f"model.layers.{i}" for i in range(4)]


def generate(model: Any, **options: Any) -> tuple[Tensor, list[int]]:
    """Tokens, and the keys of every layer."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [0], **options}
    out = model.generate(**pad_left(text_rows()), **options, return_dict_in_generate=True)
    if options.get("use_cache") is False:
        return out.sequences, []
    return out.sequences, [layer.keys.shape[-2] for layer in cache_of(out).layers]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_residual_stream_in_float32(
    make_llama: Callable[..., Any], dtype: torch.dtype
) -> None:
    model = make_llama()
    batch = pad_left(text_rows())
    with torch.autocast("cpu", dtype), torch.no_grad():
        out = model(**batch, output_hidden_states=True)
        assert {hidden.dtype for hidden in out.hidden_states} == {torch.float32}
        assert out.logits.dtype == dtype  # of the last matrix product
        tokens, lengths = generate(model)
        assert lengths == LENGTHS
        assert torch.equal(tokens, generate(model, use_cache=False)[0])


def disk(folder: Path) -> dict[str, Any]:
    return {"offload_dir": str(folder), "execution_device": torch.device("cpu")}


# transformers 5.4 takes the place of offloaded weights for the device of the model
@pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on:UserWarning"
)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_fetched_layer_by_layer(
    make_llama: Callable[..., Any], tmp_path: Path, where: str
) -> None:
    plain = make_llama()
    expected = generate(plain)
    model = make_llama()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, **disk(tmp_path))
    layer = model.model.layers[2]
    tokens, lengths = generate(model)
    assert torch.equal(tokens, expected[0])
    assert lengths == expected[1] == LENGTHS
    weights = (layer.mod_router.weight, layer.input_layernorm.weight, layer.mlp.up_proj.weight)
    assert all(weight.is_meta for weight in weights)
    with pytest.raises(ValueError, match="already injected"):
        inject_pmod(model, PModConfig(schedule=RATIOS))


@pytest.mark.parametrize("device_map", ["mixed", "auto"])
def test_a_checkpoint_is_loaded_over_memory_and_disk(
    make_llama: Callable[..., Any], tmp_path: Path, device_map: str
) -> None:
    plain = make_llama()
    plain.save_pretrained(tmp_path / "model")
    places: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": "250KB", "disk": "1GB"}}
    if device_map == "mixed":
        names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *LAYERS[:2])
        places = {
            "device_map": {**dict.fromkeys(names, "cpu"), **dict.fromkeys(LAYERS[2:], "disk")}
        }
    model: Any = load_pretrained(
        tmp_path / "model", offload_folder=str(tmp_path / "offload"), **places
    )
    assert model.model.layers[2].mod_router.weight.is_meta
    tokens, lengths = generate(model)
    assert torch.equal(tokens, generate(plain)[0])
    assert lengths == LENGTHS


def test_the_context_follows_a_layer_to_its_device() -> None:
    target = torch.tensor([[True, True, False, False]])
    valid = torch.ones_like(target)
    context = RoutingContext(RoutingPlan.from_mask(target, valid, {1: 0.5}), valid)
    assert send_to_device(context, torch.device("cpu")) is context
    moved = send_to_device(context, torch.device("meta"))  # what a hook of accelerate does
    assert isinstance(moved, RoutingContext)
    assert moved.valid is not None
    assert moved.valid.is_meta
    assert moved.plan is not None
    assert all(t.is_meta for t in (moved.plan.kind, moved.plan.cu_seqlens, moved.plan.sizes))
    assert moved.plan.kept == ((3,),)
    assert not context.plan.kind.is_meta  # type: ignore[union-attr]
    record = RoutingRecord(target, torch.ones(1, dtype=torch.bool))
    assert record.finite_on(torch.device("cpu")) is record.finite
    assert record.finite_on(torch.device("meta")).is_meta


class Int8Linear(nn.Module):
    """A linear layer with weights of eight bits, as packages for quantisation put in its place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return x @ (weight.to(x.dtype) * self.scale).T


def quantise(model: Any) -> Any:
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in block.named_children():
                if isinstance(module, nn.Linear):
                    setattr(block, name, Int8Linear(module))
    return model


def test_a_quantised_backbone_is_injected_before_or_after(make_llama: Callable[..., Any]) -> None:
    plain = make_llama()
    before = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    before.load_state_dict(plain.state_dict(), strict=False)
    before.generation_config = plain.generation_config
    after = quantise(plain)
    inject_pmod(quantise(before), PModConfig(schedule=RATIOS))
    before.load_state_dict(after.state_dict())
    layer: Any = before.model.layers[2]
    assert layer.mlp.up_proj.weight.dtype == torch.int8
    assert layer.mod_router.weight.dtype == torch.float32
    tokens, lengths = generate(after)
    assert lengths == LENGTHS
    assert torch.equal(tokens, generate(after, use_cache=False)[0])
    assert torch.equal(tokens, generate(before)[0])


def test_weights_of_torchao(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is optional")
    from transformers import TorchAoConfig

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TEXT)).bfloat16().save_pretrained(tmp_path / "plain")
    options: dict[str, Any] = {
        "quantization_config": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
        "dtype": torch.bfloat16,
    }
    settings = PModConfig(schedule=RATIOS)
    model: Any = load_pretrained(tmp_path / "plain", pmod=settings, **options)
    later: Any = LlamaForCausalLM.from_pretrained(tmp_path / "plain", **options)
    inject_pmod(later, settings)
    for one, other in zip(model.model.layers[1:], later.model.layers[1:], strict=True):
        assert type(one.mlp.up_proj.weight) is not nn.Parameter
        assert type(one.mod_router.weight) is nn.Parameter
        one.mod_router.weight.data.normal_()
        other.mod_router.load_state_dict(one.mod_router.state_dict())
    tokens, lengths = generate(model)
    assert lengths == LENGTHS
    assert torch.equal(tokens, generate(model, use_cache=False)[0])
    assert torch.equal(tokens, generate(later)[0])
    model.save_pretrained(tmp_path / "routed")
    assert torch.equal(tokens, generate(load_pretrained(tmp_path / "routed"))[0])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tensor", "pipeline"])
def test_two_processes_share_a_model(
    make_llama: Callable[..., Any], tmp_path: Path, how: str
) -> None:
    model = make_llama()
    for layer in model.model.layers[1:]:
        layer.mod_router.weight.data.mul_(0.05)  # so that tanh has a slope
    model.save_pretrained(tmp_path)
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    worker = [str(Path(__file__).with_name("parallel_worker.py")), how, str(tmp_path)]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            *worker,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "rank 0 agrees" in run.stdout
    assert "rank 1 agrees" in run.stdout


@pytest.mark.skipif(
    "tp_size" not in signature(DistributedConfig).parameters,
    reason="this transformers has no tensor and pipeline parallel from a config",
)
def test_pipelines_of_vision_language_models_are_refused(tmp_path: Path) -> None:
    config = PModLlavaConfig(**llava_config().to_dict(), pmod=PModConfig(schedule=RATIOS))
    PModLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="distributed_config: expected pp_size 1 for a vision-lang"
    ):
        load_pretrained(tmp_path, distributed_config=DistributedConfig(tp_size=1, pp_size=2))
