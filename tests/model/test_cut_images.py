"""Rows that were cut to a longest length, even within an image, as the authors' code cuts them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.conftest import IMAGE
from model.llava_next import LENGTHS, SIZES, images_of, make_next, ragged_images
from torch import Tensor

from pmod_model import record_routing
from pmod_model.images import cut_to_length, find_images


@pytest.fixture
def ragged() -> dict[str, Tensor]:
    return ragged_images()


@pytest.mark.parametrize("tokens", ["vision", "vision_high_res"])
@pytest.mark.parametrize("pool", ["sequence", "frame"])
def test_a_row_cut_within_an_image_equals_one_whose_rest_is_padding(
    tokens: str, pool: str, ragged: dict[str, Tensor]
) -> None:
    model = make_next(target_tokens=tokens, pool=pool)
    length = 1 + LENGTHS[0] + 20  # row 0 keeps 20 tokens of its second image
    whole = dict(ragged)
    whole["attention_mask"] = ragged["attention_mask"].clone()
    whole["attention_mask"][:, length:] = 0
    cut = cut_to_length(model, ragged, length)
    assert cut["input_ids"].shape == (3, length)
    assert cut["pixel_values"].shape[0] == 3
    found: Any = find_images(model.model, cut)
    assert list(found.present) == [LENGTHS[0], 20, LENGTHS[1]]
    results = []
    for batch in (cut, whole):
        model.zero_grad()
        with record_routing(model) as records:
            logits = model(**batch).logits[:, :length]
        valid = cut["attention_mask"].bool()
        logits[valid].square().sum().backward()
        kept = {layer: mask[:, :length] for layer, mask in records[0].kept.items()}
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits[valid], kept, grads))
    (logits, kept, grads), (expected, expected_kept, expected_grads) = results
    assert all(torch.equal(kept[layer], expected_kept[layer]) for layer in kept)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert grads.keys() == expected_grads.keys()
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() <= 1e-5 * largest, name


def test_generation_continues_a_cut_row(ragged: dict[str, Tensor]) -> None:
    model = make_next()
    prompt = cut_to_length(
        model,
        {name: value[:1] for name, value in ragged.items()}
        | {
            "pixel_values": ragged["pixel_values"][:2],
            "image_sizes": ragged["image_sizes"][:2],
        },
        100,
    )
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    logits = model(**prompt, use_cache=False).logits[:, -1].detach()
    logits[:, IMAGE] = -torch.inf
    assert out[0, 100] == logits.argmax()


def test_images_of_which_nothing_is_left_go(ragged: dict[str, Tensor]) -> None:
    model = make_next()
    cut = cut_to_length(model, ragged, 1 + LENGTHS[0])
    assert cut["image_sizes"].tolist() == [SIZES[0], SIZES[1]]
    assert torch.equal(cut["pixel_values"], ragged["pixel_values"][[0, 2]])
    assert torch.isfinite(model(**cut).logits).all()
    text = cut_to_length(model, ragged, 1)
    assert text.keys() == {"input_ids", "attention_mask"}
    assert cut_to_length(model, ragged, 1000).keys() == ragged.keys()


def test_llava_15_is_cut_as_well(make_llava: Callable[..., Any]) -> None:
    model = make_llava(pool="frame")
    rows = torch.tensor(
        [[5, *images_of(16), 6, *images_of(16)], [7, *images_of(16), *range(20, 37)]]
    )
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "pixel_values": pixels}
    cut = cut_to_length(model, batch, 25)
    whole = batch | {"attention_mask": (torch.arange(34) < 25).long().expand(2, -1)}
    with torch.no_grad():
        got, expected = model(**cut).logits, model(**whole).logits[:, :25]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:, 3:], "expected 156 image tokens in row 0, got .*does not end within"),
        (lambda ids: torch.cat((ids, ids[:, 1:2]), 1), "expected images for .* image tokens, got"),
        (lambda ids: ids[:, :89], "expected at least one token of each of 3 images"),
    ],
)
def test_wrong_numbers_of_image_tokens_are_refused(
    change: Any, message: str, ragged: dict[str, Tensor]
) -> None:
    ragged["input_ids"] = change(ragged["input_ids"])
    del ragged["attention_mask"]
    with pytest.raises(ValueError, match=message):
        make_next()(**ragged)
