"""Router scores handed over from layer to layer: taken where they hold, and never a difference."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pmod_model import PModConfig, inject_pmod, record_routing
from pmod_model import layer as layer_module
from pmod_model.hand_over import HandOver
from pmod_model.router import Router

IMAGE, HIDDEN = 120, 8


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each routed layer that ran: did it take the scores of the layer before?"""
    seen: list[bool] = []
    original = layer_module.route_gather

    def spy(*args: Any, **kwargs: Any) -> Any:
        given = kwargs["logits"] is not None
        assert not (given and torch.is_grad_enabled())
        seen.append(given)
        return original(*args, **kwargs)

    monkeypatch.setattr(layer_module, "route_gather", spy)
    return seen


@contextmanager
def switched_off() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HandOver, "next_router", lambda *_: None)
        yield


def compare(model: Any, taken: list[bool], expected: list[bool], **inputs: Any) -> Tensor:
    """Logits, after checking who takes scores, and that it makes no difference to any bit."""
    taken.clear()
    with record_routing(model) as records:
        out = model(**inputs).logits
        assert taken == expected
        with switched_off():
            again = model(**inputs).logits
        assert not any(taken[len(expected) :])
    assert torch.equal(out, again)
    handed, scored = records
    assert handed.logits.keys() == scored.logits.keys()
    for layer in handed.logits:
        assert torch.equal(handed.logits[layer], scored.logits[layer])
        assert torch.equal(handed.kept[layer], scored.kept[layer])
        assert torch.equal(handed.gate[layer], scored.gate[layer])
    return out


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(5, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[0, 2:18] = target[1, 1:9] = True
    return {"input_ids": ids, "target_mask": target}


@pytest.mark.parametrize("pool", ["sequence", "image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_scores_are_taken_in_a_padded_batch(
    make_llava: Callable[..., Any],
    taken: list[bool],
    ragged_batch: dict[str, Tensor],
    pool: str,
    dtype: torch.dtype,
) -> None:
    model = make_llava(pool=pool).to(dtype)
    pixels = ragged_batch["pixel_values"].to(dtype)
    compare(model, taken, [False, True, True], **{**ragged_batch, "pixel_values": pixels})


@pytest.mark.parametrize(
    "fields",
    [
        {"gate_activation": "softmax"},
        {"router_bias": False},
        {"gate_mlp": False, "scale_skipped": False},
        {"schedule": [None, 0.0, 0.5, 0.5]},  # nothing kept: the scatter without rows scores too
    ],
    ids=str,
)
@torch.no_grad()
def test_every_setting_takes_them(
    make_llama: Callable[..., Any], taken: list[bool], fields: dict[str, Any]
) -> None:
    inputs = tokens()
    if "schedule" in fields:
        inputs["target_mask"] = torch.ones_like(inputs["target_mask"])
    compare(make_llama(**fields), taken, [False, True, True], **inputs)


@torch.no_grad()
def test_router_in_float32_of_a_bfloat16_model(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    model = make_llama().bfloat16()
    for layer in model.model.layers[1:]:
        layer.mod_router.float()
    compare(model, taken, [False, True, True], **tokens())
    with torch.autocast("cpu", torch.bfloat16):
        compare(make_llama(), taken, [False, True, True], **tokens())


@torch.no_grad()
def test_the_recipe_of_the_paper_saves_23_of_24_passes(taken: list[bool]) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=32,
        num_attention_heads=2,
        vocab_size=128,
    )
    model = inject_pmod(LlamaForCausalLM(config).eval(), PModConfig())
    for layer in model.model.layers[8:]:
        nn.init.normal_(layer.mod_router.weight)
    compare(model, taken, [False] + [True] * 23, **tokens())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ([None, 0.5, None, 0.5], [False, False]),
        ([0.5, 0.25, None, 0.1], [False, True, False]),
        ([0.5, None, None, None], [False]),
    ],
)
@torch.no_grad()
def test_a_dense_layer_in_between_ends_it(
    make_llama: Callable[..., Any],
    taken: list[bool],
    schedule: list[float | None],
    expected: list[bool],
) -> None:
    compare(make_llama(schedule=schedule), taken, expected, **tokens())


@torch.no_grad()
def test_cloned_hidden_states_are_scored_again(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    model = make_llama()
    plain = compare(model, taken, [False, True, True], **tokens())
    model.model.layers[1].register_forward_hook(lambda module, args, out: out.clone())
    assert torch.equal(compare(model, taken, [False, False, True], **tokens()), plain)
    model.model.layers[3].register_forward_pre_hook(lambda module, args: (args[0][:],))
    assert torch.equal(compare(model, taken, [False, False, False], **tokens()), plain)


@pytest.mark.parametrize("through_a_view", [False, True])
@torch.no_grad()
def test_hidden_states_changed_in_place_are_scored_again(
    make_llama: Callable[..., Any], taken: list[bool], through_a_view: bool
) -> None:
    model = make_llama()
    plain = compare(model, taken, [False, True, True], **tokens())

    def add(module: nn.Module, args: Any, out: Tensor) -> None:
        (out.view(-1) if through_a_view else out).add_(0.5)

    model.model.layers[2].register_forward_hook(add)
    changed = compare(model, taken, [False, True, False], **tokens())
    assert not torch.allclose(changed, plain)


@torch.no_grad()
def test_a_router_changed_between_two_layers_scores_again(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    model = make_llama()
    plain = compare(model, taken, [False, True, True], **tokens())
    first, second, third = model.model.layers[1:]
    weight = second.mod_router.weight
    usual, other = weight.clone(), -weight

    def become(value: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            weight.copy_(value)

        return hook

    first.register_forward_pre_hook(become(usual))
    second.register_forward_pre_hook(become(other))
    changed = compare(model, taken, [False, False, True], **tokens())
    assert not torch.allclose(changed, plain)
    third.mod_router.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))
    assert not torch.equal(compare(model, taken, [False] * 3, **tokens()), changed)


def test_nothing_where_gradients_are_recorded(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    model = make_llama()
    compare(model, taken, [False] * 3, **tokens())
    compare(model.train(), taken, [False] * 3, **tokens())


def test_layers_replayed_for_their_gradient_score_for_themselves(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    # the reentrant form runs the layers without gradients first: there scores may be taken
    def grads() -> dict[str, Any]:
        model = make_llama().train()
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": True})
        model.enable_input_require_grads()
        taken.clear()  # of the trial at injection
        model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    given = grads()
    assert taken == [False, True, True] + [False] * 3
    with switched_off():
        expected = grads()
    assert given["model.layers.2.mod_router.weight"].any()
    for name, grad in expected.items():
        assert torch.equal(given[name], grad), name


def test_inference_mode_counts_no_changes_so_scores_again(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    model = make_llama()
    with torch.no_grad():
        plain = compare(model, taken, [False, True, True], **tokens())
    with torch.inference_mode():
        assert torch.equal(compare(model, taken, [False] * 3, **tokens()), plain)
        made_in_it = make_llama()
    with torch.no_grad():  # its parameters do not count their changes either
        assert torch.equal(compare(made_in_it, taken, [False] * 3, **tokens()), plain)


def test_generate_takes_them_in_the_prefill(
    make_llava: Callable[..., Any], taken: list[bool], ragged_batch: dict[str, Tensor]
) -> None:
    model = make_llava()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    taken.clear()
    out = model.generate(**ragged_batch, **options)
    assert taken == [False, True, True]
    with switched_off():
        assert torch.equal(model.generate(**ragged_batch, **options), out)
    assert not any(taken[3:])


# PEFT still asks transformers for the old name of activation checkpointing
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@torch.no_grad()
def test_routers_of_peft_are_obeyed(make_llama: Callable[..., Any], taken: list[bool]) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is optional")
    base = make_llama()
    plain = compare(base, taken, [False, True, True], **tokens())
    saved = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mod_router"])
    model = peft.get_peft_model(base, saved).eval()
    for name, parameter in model.named_parameters():
        if "mod_router.modules_to_save" in name:
            parameter.normal_()
    inner = model.base_model.model
    assert not torch.equal(compare(inner, taken, [False, True, True], **tokens()), plain)
    with model.disable_adapter():
        assert torch.equal(compare(inner, taken, [False, True, True], **tokens()), plain)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@torch.no_grad()
def test_router_weights_computed_anew_are_not_recognised(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is optional")
    base = make_llama()
    plain = compare(base, taken, [False, True, True], **tokens())
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mod_router.weight"])
    model = peft.get_peft_model(base, lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    inner = model.base_model.model
    assert not torch.equal(compare(inner, taken, [False] * 3, **tokens()), plain)


@torch.no_grad()
def test_offloaded_routers_are_left_alone(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is optional")
    model = make_llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[2].mod_router.weight.is_meta
    compare(model, taken, [False] * 3, **tokens())
    assert model.model.layers[2].mod_router.weight.is_meta


@torch.no_grad()
def test_two_threads_share_a_model(make_llama: Callable[..., Any], taken: list[bool]) -> None:
    model = make_llama()
    first, second = tokens(), tokens()
    second["input_ids"] = second["input_ids"].flip(1)
    expected = [compare(model, taken, [False, True, True], **inputs) for inputs in (first, second)]
    taken.clear()
    wrong: list[int] = []
    start = threading.Barrier(2)

    @torch.no_grad()
    def work(which: int, inputs: dict[str, Tensor]) -> None:
        start.wait()
        for _ in range(20):
            if not torch.equal(model(**inputs).logits, expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(taken) == 2 * 20 * 2
    assert len(taken) == 2 * 20 * 3


@pytest.mark.compile
@torch.no_grad()
def test_compiled_layers_stay_whole_and_score_for_themselves(
    make_llama: Callable[..., Any], taken: list[bool]
) -> None:
    model = make_llama()
    plain = model(**tokens(), use_cache=False).logits
    layers = model.model.layers
    layers[2].forward = torch.compile(layers[2].forward, backend="eager", fullgraph=True)
    # layer 1 leaves scores that the compiled layer 2 does not take, nor layer 3 for its own input
    taken.clear()
    assert torch.equal(model(**tokens(), use_cache=False).logits, plain)
    assert taken == [False] * 3


class Layers(nn.ModuleList):
    """Two layers, of which the second has a router."""

    def __init__(self, router: Any) -> None:
        super().__init__([nn.Module(), nn.Module()])
        self[1].mod_router = router


def make_router(**kwargs: Any) -> Router:
    options = {"bias": True, "device": torch.device("cpu"), "dtype": torch.float32, **kwargs}
    return Router(HIDDEN, **options)


class Packed(nn.Parameter):
    """A parameter that is not what it seems, as quantised and sharded ones are."""


def with_parameter(name: str, parameter: nn.Parameter) -> Router:
    router = make_router()
    setattr(router, name, parameter)
    return router


def given_back() -> Router:
    router = make_router()
    router.weight.untyped_storage().resize_(0)
    return router


def hooked() -> Router:
    router = make_router()
    router._hf_hook = object()  # as accelerate leaves it
    return router


def returning_another_type() -> Router:
    router = make_router()
    router.register_forward_hook(lambda module, args, out: (Packed(out[0]), out[1]))
    return router


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_router(device=torch.device("meta")),
        lambda: with_parameter("weight", Packed(torch.zeros(1, HIDDEN))),
        lambda: with_parameter("weight", nn.Parameter(torch.zeros(0))),
        given_back,
        hooked,
    ],
    ids=["on_meta", "packed", "empty", "freed", "hooked"],
)
@torch.no_grad()
def test_routers_that_are_elsewhere_are_not_even_called(make: Callable[[], Router]) -> None:
    router = make()
    calls: list[Any] = []
    router.register_forward_pre_hook(lambda module, args: calls.append(args))
    assert HandOver(Layers(router)).next_router(0, torch.zeros(1, 3, HIDDEN)) is None
    assert calls == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_router(dtype=torch.bfloat16),
        lambda: make_router(dtype=torch.float64),
        lambda: with_parameter("weight", nn.Parameter(torch.zeros(1, HIDDEN // 2))),
        lambda: with_parameter("bias", nn.Parameter(torch.zeros(2))),
        lambda: with_parameter("bias", nn.Parameter(torch.zeros(1, dtype=torch.float64))),
        returning_another_type,
    ],
    ids=["bf16", "fp64", "part", "two_biases", "fp64_bias", "another_type"],
)
@torch.no_grad()
def test_routers_that_the_op_would_not_take(make: Callable[[], Router]) -> None:
    x = torch.zeros(1, 3, HIDDEN)
    assert HandOver(Layers(make_router())).next_router(0, x) is not None
    assert HandOver(Layers(make())).next_router(0, x) is None
    assert HandOver(Layers(make_router())).next_router(1, x) is None


@torch.no_grad()
def test_scores_are_taken_once_and_keep_no_rows_alive() -> None:
    hand_over, router = HandOver(), make_router()(torch.zeros(0))
    rows, logits = torch.zeros(1, 3, HIDDEN), torch.zeros(3)
    hand_over.give(logits, rows, router)
    assert hand_over.take(rows, router) is logits
    assert hand_over.take(rows, router) is None
    hand_over.give(logits, rows, router)
    assert hand_over.take(rows, (router[0], None)) is None
    hand_over.give(logits, rows, router)
    with torch.enable_grad():
        assert hand_over.take(rows, router) is None
    hand_over.give(logits, rows, router)
    last = weakref.ref(rows)
    del rows
    gc.collect()
    assert last() is None
    assert hand_over.take(torch.zeros(1, 3, HIDDEN), router) is None
