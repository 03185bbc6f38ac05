"""Every supported backbone against itself: all tokens in every layer, skipped ones masked away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from model.backbones import SPECIAL, TEXT_BACKBONES, VISION_BACKBONES, Backbone, Row
from model.caches import cache_of
from model.conftest import IMAGE, RATIOS, TEXT, make_opinionated
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from pmod_model import PModConfig, inject_pmod, record_routing
from pmod_model.inject import find_decoder
from pmod_model.layer import RoutedLayer

STEPS = 8
# float32 sums in another order: 1e-6 of a logit of about 10, times a few layers
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
EVERY: dict[str, Callable[[], Backbone]] = {**TEXT_BACKBONES, **VISION_BACKBONES}
every_backbone = pytest.mark.parametrize("name", list(EVERY))


def make(name: str, **fields: Any) -> tuple[Any, Backbone]:
    """The model as transformers made it, and a copy of it with routed layers and the same weights."""
    torch.manual_seed(0)
    backbone = EVERY[name]()
    plain = copy.deepcopy(backbone.model)
    inject_pmod(backbone.model, PModConfig(**{"schedule": RATIOS, **fields}))
    make_opinionated(backbone.model)
    state = {key: w for key, w in backbone.model.state_dict().items() if "mod_router" not in key}
    plain.load_state_dict(state)
    return plain.eval(), backbone


def targets(batch: Row) -> Tensor:
    return batch["target_mask"] if "target_mask" in batch else batch["input_ids"] == IMAGE


def without_targets(batch: Row) -> Row:
    return {name: value for name, value in batch.items() if name != "target_mask"}


class MaskedBackbone:
    """The plain model on all tokens; hooks hide skipped keys and weight what p-MoD weights.

    Args:
        plain: the backbone.
        routed: its injected copy, for the routers.
        target: bool [B, S], the tokens that compete.
        valid: bool [B, S], the tokens that are not padding.
    """

    def __init__(self, plain: Any, routed: Any, target: Tensor, valid: Tensor) -> None:
        self.plain, self.target, self.valid = plain, target, valid
        self.kept: dict[int, Tensor] = {}
        self.gate: Tensor
        self.keep: Tensor
        layers: Any = find_decoder(routed).layers
        for index, layer in enumerate(find_decoder(plain).layers):  # type: ignore[arg-type]
            ratio = RATIOS[index]
            router = layers[index].mod_router if ratio <= 0.85 else None
            layer.register_forward_pre_hook(self.before(index, router, ratio), with_kwargs=True)
            layer.mlp.register_forward_hook(lambda _, args, out: out * self.gate)
            layer.register_forward_hook(self.after)

    def before(self, index: int, router: Any, ratio: float) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> Any:
            (x,) = args
            self.gate, self.keep = torch.ones(*x.shape[:2], 1), self.valid
            if router is not None:
                logits = x @ router.weight[0] + router.bias
                self.gate = torch.where(self.target, 0.2 * logits.tanh() + 1, 1)[..., None]
                self.kept[index] = self.select(logits, ratio)
                self.keep = self.kept[index] | (self.valid & ~self.target)
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            own = torch.eye(x.shape[1], dtype=torch.bool)
            mask = own | (causal & self.keep[:, None, None, :])
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def after(self, _: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return torch.where(self.keep[..., None], out, self.gate * args[0])

    def select(self, logits: Tensor, ratio: float) -> Tensor:
        keep = torch.zeros_like(self.target)
        for row, target in enumerate(self.target):
            (rows,) = target.nonzero(as_tuple=True)
            order = logits[row, rows].sort(descending=True, stable=True).indices
            k = int(torch.tensor(float(len(rows))) * torch.tensor(ratio))
            keep[row, rows[order[:k]]] = True
        return keep


@every_backbone
def test_a_routed_model_is_its_backbone_with_skipped_tokens_masked(name: str) -> None:
    plain, backbone = make(name)
    batch = backbone.batch()
    target, valid = targets(batch), batch["attention_mask"].bool()
    masked = MaskedBackbone(plain, backbone.model, target, valid)
    with torch.no_grad(), record_routing(backbone.model) as records:
        got = backbone.model(**batch)
        expected = plain(**without_targets(batch), use_cache=False).logits
    torch.testing.assert_close(got.logits[valid], expected[valid], **CLOSE)
    (record,) = records
    assert torch.equal(record.target_mask, target)
    assert record.kept.keys() == masked.kept.keys() == {1, 2, 3}
    for layer, kept in masked.kept.items():
        assert torch.equal(record.kept[layer], kept)
    always = (valid & ~target).sum(1)
    longest = [int((always + kept.sum(1)).max()) for kept in masked.kept.values()]
    assert lengths(got) == [batch["input_ids"].shape[1], *longest]
    assert len(set(lengths(got))) == 4


def lengths(out: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache_of(out).layers]


@every_backbone
def test_keeping_everything_with_weight_one_changes_nothing(name: str) -> None:
    plain, backbone = make(name, schedule="constant", mean_ratio=1.0, max_ratio=1.0, gate_scale=0.0)
    batch = backbone.batch()
    valid = batch["attention_mask"].bool()
    with torch.no_grad(), record_routing(backbone.model) as records:
        got = backbone.model(**batch)
        expected = plain(**without_targets(batch)).logits
    assert all(torch.equal(kept, targets(batch)) for kept in records[0].kept.values())
    assert len(records[0].kept) == 4
    torch.testing.assert_close(got.logits[valid], expected[valid], **CLOSE)
    assert lengths(got) == [batch["input_ids"].shape[1]] * 4


@every_backbone
def test_without_targets_every_bit_is_that_of_the_backbone(name: str) -> None:
    plain, backbone = make(name)
    ids = torch.randint(5, 100, (2, 12))
    ids[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        assert torch.equal(backbone.model(**inputs).logits, plain(**inputs).logits)


@every_backbone
def test_generation_with_a_cache_in_a_batch_and_alone(name: str) -> None:
    _, backbone = make(name)
    options = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SPECIAL}
    model, batch = backbone.model, backbone.batch()
    out = model.generate(**batch, **options, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(**batch, **options, use_cache=False))
    static = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(out.sequences, static)
    always = batch["attention_mask"].sum(1) - targets(batch).sum(1)
    kept = [(always + (targets(batch).sum(1) * ratio).int()).max().item() for ratio in RATIOS[1:]]
    lengths_after = [n + STEPS - 1 for n in (batch["input_ids"].shape[1], *kept)]
    assert lengths(out) == lengths_after
    for index, row in enumerate(backbone.rows):
        alone = model.generate(**row, **options)
        assert torch.equal(alone[0, -STEPS:], out.sequences[index, -STEPS:])


@every_backbone
def test_gradients_are_those_of_the_masked_backbone(name: str) -> None:
    plain, backbone = make(name)
    batch = backbone.batch()
    target, valid = targets(batch), batch["attention_mask"].bool()
    # the first token of a row would be predicted by padding
    ignored = target | (valid.cumsum(-1) <= 1)
    labels = batch["input_ids"].masked_fill(ignored, -100)
    layers: Any = find_decoder(backbone.model).layers
    routers = [layer.mod_router for layer in layers if hasattr(layer, "mod_router")]
    for router in routers:
        router.weight.data.mul_(0.05)  # tanh is flat, to the last bit, at the logits of this model
    MaskedBackbone(plain, backbone.model, target, valid)
    plain(**without_targets(batch), labels=labels).loss.backward()
    expected = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    expected |= {f"router {i}": router.weight.grad for i, router in enumerate(routers)}
    for router in routers:
        router.zero_grad(set_to_none=True)
    backbone.model.train()(**batch, labels=labels).loss.backward()
    got = {key: p.grad for key, p in backbone.model.named_parameters()}
    got |= {f"router {i}": router.weight.grad for i, router in enumerate(routers)}
    assert all(router.weight.grad.any() and router.bias.grad.any() for router in routers)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for key, grad in expected.items():
        # a gradient that is zero but for rounding (that of a key bias) is held to the largest one
        scale = max(float(grad.abs().max()), 1e-4 * largest)
        assert (got[key] - grad).abs().max() <= 1e-4 * scale, key


def test_the_trial_notices_a_multiplier_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TEXT_BACKBONES["granite"]().model
    with monkeypatch.context() as patch:
        patch.setattr(RoutedLayer, "_scaled", lambda _, branch, dropout: branch)
        with pytest.raises(ValueError, match="got GraniteDecoderLayer, which differs"):
            inject_pmod(model, PModConfig(schedule=RATIOS))
    inject_pmod(model, PModConfig(schedule=RATIOS))


REFUSED = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma2", "Gemma2DecoderLayer with pre_feedforward_layernorm, post_feedforward_layernorm"),
        ("olmo2", "Olmo2DecoderLayer without input_layernorm"),
    ],
)
@pytest.mark.parametrize("inside", ["alone", "in_llava"])
def test_blocks_with_other_norms_are_refused(name: str, message: str, inside: str) -> None:
    cls, config_class, more = REFUSED[name]
    try:
        config = config_class(**TEXT, **more)
    except StrictDataclassFieldValidationError:
        pytest.skip("this transformers cannot make its own Olmo2Config (a field of the wrong type)")
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_attention_heads": 4}
    model: Any = (
        cls(config)
        if inside == "alone"
        else LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=config))
    )
    keys = set(model.state_dict())
    expected = r"inject_pmod: layers\[1\]: expected a pre-norm block of .*, got "
    with pytest.raises(ValueError, match=expected + message):
        inject_pmod(model, PModConfig(schedule=RATIOS))
    assert set(model.state_dict()) == keys
