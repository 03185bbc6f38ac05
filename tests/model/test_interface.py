"""Every form later work needs runs on `pmod_ops.reference` through the same interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.backbones import qwen2_5_vl
from model.caches import CACHE
from model.test_inject import randomise_routers
from torch import Tensor
from transformers import DynamicCache

import pmod_ops
from pmod_model import PModConfig, inject_pmod
from pmod_model import layer as layer_module
from pmod_ops import RoutingPlan, reference

OPS = ("gather", "gather_add_rmsnorm", "route_gather", "weighted_scatter_add")
IMAGE = [120] * 16


def image_pools(make_llava: Callable[..., Any], batch: dict[str, Tensor]) -> list[Tensor]:
    return [make_llava(pool="image")(**batch).logits]


def padded_batch(make_llava: Callable[..., Any], batch: dict[str, Tensor]) -> list[Tensor]:
    return [make_llava()(**batch).logits]


def second_turn(make_llava: Callable[..., Any], batch: dict[str, Tensor]) -> list[Tensor]:
    model = make_llava()
    cache: Any = DynamicCache(config=model.config)
    turns = torch.tensor([[5, *IMAGE, 6]]), torch.tensor([[7, *IMAGE, 8]])
    pixels = batch["pixel_values"][:1]
    return [model(ids, pixel_values=pixels, **{CACHE: cache}).logits for ids in turns]


def multimodal_rope(make_llava: Callable[..., Any], batch: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    backbone = qwen2_5_vl()
    randomise_routers(inject_pmod(backbone.model, PModConfig(schedule=[1.0, 0.5, 0.25, 0.1])))
    return [backbone.model(**backbone.batch()).logits]


def checkpointing(make_llava: Callable[..., Any], batch: dict[str, Tensor]) -> list[Tensor]:
    model = make_llava().train()
    # the second name is that of older releases
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    ids = batch["input_ids"]
    labels = ids.masked_fill((ids == 120) | (batch["attention_mask"] == 0), -100)
    model(**batch, labels=labels).loss.backward()
    return [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]


def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


@pytest.mark.parametrize(
    "form", [image_pools, padded_batch, second_turn, multimodal_rope, checkpointing]
)
def test_the_model_runs_on_the_reference(
    form: Callable[..., list[Tensor]],
    make_llava: Callable[..., Any],
    ragged_batch: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = form(make_llava, ragged_batch)
    calls = []
    for name in OPS:

        def on_reference(*args: Any, op: str = name, **kwargs: Any) -> Any:
            calls.append(op)
            return getattr(reference, op)(*args, **kwargs)

        monkeypatch.setattr(layer_module, name, on_reference)
    specified = form(make_llava, ragged_batch)
    assert {"route_gather", "weighted_scatter_add"} <= set(calls)
    assert len(compiled) == len(specified) > 0
    pairs = list(zip(detached(compiled), detached(specified), strict=True))
    largest = max(float(b.abs().max()) for _, b in pairs)
    for a, b in pairs:
        # The two differ in the order of float32 sums, which four layers amplify. A gradient that is
        # zero but for rounding (that of a key bias) is held to the size of the largest one.
        scale = max(float(b.abs().max()), 1e-4 * largest)
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("module", [reference, pmod_ops], ids=["reference", "compiled"])
def test_a_packed_batch_is_its_sequences_one_after_another(module: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = [[2, 1, 1, 1, 1, 2], [1] * 9, [2, 2]]
    x = torch.randn(17, 8, generator=generator)
    weight, norm = torch.randn(8, generator=generator), torch.ones(8)

    def layer(x: Tensor, kinds: list[list[int]]) -> Tensor:
        bounds = [0]
        for kind in kinds:
            bounds.append(bounds[-1] + len(kind))
        counts = [[kind.count(value) for kind in kinds] for value in (1, 2)]
        flat = torch.tensor([k for kind in kinds for k in kind], dtype=torch.uint8)
        plan = RoutingPlan.from_counts(flat, bounds, counts[0], counts[1], {0: 0.5})
        routing, rows = module.route_gather(x, weight, None, plan, 0, norm)
        residual, rows = module.gather_add_rmsnorm(x, rows, routing, norm)
        return module.weighted_scatter_add(x, residual, 0.5 * rows, routing)

    alone = [layer(rows, [kind]) for rows, kind in zip(x.split([6, 9, 2]), kinds, strict=True)]
    together = layer(x, kinds)
    torch.testing.assert_close(together, torch.cat(alone))
    # a matrix product of another size may round otherwise; the kernels never do
    assert module is reference or torch.equal(together, torch.cat(alone))
