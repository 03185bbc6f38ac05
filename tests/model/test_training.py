"""Gradients: against the oracle, under checkpointing and autocast, and where nothing is routed."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

IMAGE = 120


def with_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    # the first token of a row would be predicted by padding
    ignored = (ids == IMAGE) | (valid.cumsum(-1) <= 1)
    return {**inputs, "labels": ids.masked_fill(ignored, -100)}


def train(model: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def test_gradients_equal_those_of_the_oracle(
    make_llava: Callable[..., Any], oracle: Any, ragged_batch: dict[str, Tensor]
) -> None:
    # float64; but a Llama norm and the loss compute in float32 even then, 6e-8 of a value each
    inputs = with_labels({**ragged_batch, "pixel_values": ragged_batch["pixel_values"].double()})
    model = make_llava("sdpa").double()
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    _, grads = train(model, {**inputs, "position_ids": positions})
    model.zero_grad(set_to_none=True)
    embeddings = oracle(model).embed(ids, inputs["pixel_values"])
    logits, _ = oracle(model)(embeddings, ids == IMAGE, valid)
    model.loss_function(logits=logits, labels=inputs["labels"], vocab_size=128).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = max(parameter.grad.abs().max().item(), 1e-6)
            assert (grads[name] - parameter.grad).abs().max() <= 1e-5 * scale, name
    assert all(f"model.language_model.layers.{i}.mod_router.weight" in grads for i in (1, 2, 3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(
    make_llava: Callable[..., Any], ragged_batch: dict[str, Tensor], reentrant: bool
) -> None:
    inputs = with_labels(ragged_batch)
    loss, plain = train(make_llava(), inputs)
    model = make_llava()
    # the second name is that of older releases
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, grads = train(model, inputs)
    assert again == loss
    assert grads.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(grads[name], plain[name], atol=1e-7, rtol=1e-5, msg=name)


class Counted(TorchDispatchMode):
    """Counts the calls of the ops that select."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pmod":
            self.calls[func._schema.name.removeprefix("pmod::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("options", "selections"), [({}, 3), ({"use_reentrant": True}, 6)])
def test_a_checkpointed_layer_selects_once(
    make_llava: Callable[..., Any],
    ragged_batch: dict[str, Tensor],
    options: dict[str, bool],
    selections: int,
) -> None:
    model = make_llava()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, **options})
    with Counted() as counted:
        train(model, with_labels(ragged_batch))
    # three routed layers, each run twice
    # where no gradients are recorded, a layer is scored by the one before it
    selecting = counted.calls["route_gather"] + counted.calls["select_gather"]
    assert selecting == selections
    assert counted.calls["gather_rmsnorm"] == 6 - selections
    assert counted.calls["gather_add_rmsnorm"] == 6


def test_a_graph_that_is_kept_runs_its_layers_again(
    make_llava: Callable[..., Any], ragged_batch: dict[str, Tensor]
) -> None:
    inputs = with_labels(ragged_batch)
    model = make_llava().train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    loss = model(**inputs).loss
    router = model.model.language_model.layers[1].mod_router.weight
    (first,) = torch.autograd.grad(loss, router, retain_graph=True)
    (again,) = torch.autograd.grad(loss, router)
    assert torch.equal(first, again)


def test_text_only_batch_gives_routers_a_zero_gradient(make_llava: Callable[..., Any]) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]])
    inputs = with_labels({"input_ids": ids, "attention_mask": (ids != 0).long()})
    _, grads = train(make_llava(), inputs)
    routers = {name: grad for name, grad in grads.items() if "mod_router" in name}
    assert len(routers) == 6
    assert not any(grad.any() for grad in routers.values())
    assert grads["model.language_model.layers.1.mlp.up_proj.weight"].any()


def test_text_only_forward_is_bitwise_that_of_the_backbone(make_llama: Callable[..., Any]) -> None:
    from transformers import LlamaForCausalLM

    model = make_llama()
    backbone = LlamaForCausalLM(model.config)
    backbone.load_state_dict(model.state_dict(), strict=False)
    ids = torch.randint(5, 100, (2, 9))
    assert torch.equal(model(ids).logits, backbone.eval()(ids).logits)
    none = torch.zeros_like(ids, dtype=torch.bool)
    assert torch.equal(model(ids, target_mask=none).logits, backbone(ids).logits)


def test_filler_of_a_ragged_batch_leaks_no_nan(
    make_llava: Callable[..., Any], ragged_batch: dict[str, Tensor]
) -> None:
    for attention in ("eager", "sdpa"):
        _, grads = train(make_llava(attention), with_labels(ragged_batch))
        assert all(grad.isfinite().all() for grad in grads.values())


def test_a_norm_with_a_hook_is_called(
    make_llava: Callable[..., Any], ragged_batch: dict[str, Tensor]
) -> None:
    model = make_llava()
    with torch.no_grad():
        fused = model(**ragged_batch).logits
        called = []
        for layer in model.model.language_model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(lambda *_: called.append(1))
        plain = model(**ragged_batch).logits
    valid = ragged_batch["attention_mask"].bool()
    torch.testing.assert_close(plain[valid], fused[valid], atol=1e-5, rtol=1e-5)
    assert len(called) == 8
    _, grads = train(model, with_labels(ragged_batch))
    assert all(grad.isfinite().all() for grad in grads.values())


def test_autocast_trains_in_bfloat16(
    make_llava: Callable[..., Any], ragged_batch: dict[str, Tensor]
) -> None:
    inputs = with_labels(ragged_batch)
    expected, _ = train(make_llava(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = train(make_llava(), inputs)
    # bfloat16 matmuls: 2^-9 a product, averaged over some tokens
    assert loss == pytest.approx(expected, rel=0.05)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_bfloat16_model_trains(
    make_llava: Callable[..., Any], ragged_batch: dict[str, Tensor]
) -> None:
    inputs = with_labels(ragged_batch)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    expected, _ = train(make_llava(), with_labels(ragged_batch))
    loss, grads = train(make_llava().bfloat16(), inputs)
    assert loss == pytest.approx(expected, rel=0.05)
    assert {grad.dtype for grad in grads.values()} == {torch.bfloat16}


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softmax", "none"])
@pytest.mark.parametrize("flags", [{"gate_mlp": False}, {"scale_skipped": False}, {}])
def test_every_gate_reaches_the_router(
    make_llava: Callable[..., Any],
    ragged_batch: dict[str, Tensor],
    activation: str,
    flags: dict[str, bool],
) -> None:
    model = make_llava(gate_activation=activation, gate_scale=0.5, gate_bias=0.5, **flags)
    _, grads = train(model, with_labels(ragged_batch))
    assert grads["model.language_model.layers.1.mod_router.weight"].any()


def test_trainer_trains_the_router(
    make_llava: Callable[..., Any], one_image_each: dict[str, Tensor], tmp_path: Path
) -> None:
    model = make_llava()
    rows = with_labels(one_image_each)
    samples = [{name: value[i] for name, value in rows.items()} for i in range(2)]
    router = model.model.language_model.layers[1].mod_router
    before = router.weight.detach().clone()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=samples).train()  # type: ignore[arg-type]
    assert not torch.equal(router.weight, before)
