"""A layer does the same things in the same order, whether its batch has images or not.

ZeRO-2 sums over the ranks whatever gradients came first on each, and ZeRO-3 gathers parameters as
modules are called, so another order on a rank without images means wrong sums, an abort or a hang.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from training import tiny_llava as tiny


def make_model(reentrant: bool | None) -> Any:
    model = tiny.freeze_vision(tiny.make_model())
    return model if reentrant is None else tiny.checkpoint_layers(model, use_reentrant=reentrant)


def batches() -> list[dict[str, Any]]:
    return [tiny.image_batch([0, 1]), tiny.with_blank_image(tiny.text_batch([2, 3]))]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_come_in_one_order(reentrant: bool | None) -> None:
    model, orders = make_model(reentrant), []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    for batch in batches():
        order: list[str] = []
        model(**batch).loss.backward()
        orders.append(order)
    assert orders[0] == orders[1]
    assert len(orders[0]) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_modules_start_and_end_in_one_order(reentrant: bool | None) -> None:
    model, orders = make_model(reentrant), []

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: order.append((name, "starts")))
        module.register_forward_hook(lambda *_: order.append((name, "ends")))

    for name, module in model.named_modules():
        note(name, module)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # what ZeRO-3 gives to a parameter that it spreads
    for batch in batches():
        order: list[tuple[str, str]] = []
        model(**batch).loss.backward()
        orders.append(order)
    assert orders[0] == orders[1]
    assert ("model.language_model.layers.1.mod_router", "ends") in orders[0]


def test_a_blank_image_changes_nothing() -> None:
    model = tiny.freeze_vision(tiny.make_model())
    text = tiny.text_batch([2, 3])
    expected = model(**text).loss
    expected.backward()
    gradients = tiny.gradients(model)
    model.zero_grad()
    blank = model(**tiny.with_blank_image(text)).loss
    blank.backward()
    # other lengths change the order of float32 sums: 2^-24 a sum, amplified by four layers
    assert abs(blank - expected) <= 1e-6 * expected
    for name, gradient in tiny.gradients(model).items():
        if "projector" in name or "mod_router" in name:
            assert not gradient.any(), name
        else:
            off = (gradient - gradients[name]).abs().max()
            assert off <= 1e-5 * gradients[name].abs().max(), name
