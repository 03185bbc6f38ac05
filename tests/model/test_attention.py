"""Attention back ends other than eager and SDPA: block masks, and masks of two dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from model.backbones import Row
from model.caches import cache_of
from model.conftest import IMAGE
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

STEPS = 6
LENGTHS = [36 + STEPS - 1, 20 + STEPS - 1, 12 + STEPS - 1, 7 + STEPS - 1]  # of the longest row


def generate(model: Any, inputs: Row) -> Any:
    return model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True
    )


def use(model: Any, attention: str) -> None:
    """For the decoder only: tokens of an image have no order, which some of them cannot do."""
    model.model.language_model.set_attn_implementation(attention)


def lengths(out: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache_of(out).layers]


@pytest.fixture
def uncompiled() -> Iterator[None]:
    # transformers compiles flex_attention, whose C++ for the CPU fails to build at some lengths
    with torch.compiler.set_stance("force_eager"):
        yield


FLEX_ON_CPU = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:_compile flag on create_block_mask:DeprecationWarning",
)


@FLEX_ON_CPU
@pytest.mark.usefixtures("uncompiled")
def test_flex_attention_of_a_ragged_batch(
    make_llava: Callable[..., Any], ragged_batch: Row
) -> None:
    model = make_llava()
    valid = ragged_batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**ragged_batch).logits[valid]
        tokens = generate(model, ragged_batch).sequences
        use(model, "flex_attention")
        got = model(**ragged_batch).logits[valid]
    # float32 sums in another order: 1e-6 of a logit of about 10, times a few layers
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    out = generate(model, ragged_batch)
    assert torch.equal(out.sequences, tokens)
    assert lengths(out) == LENGTHS


@FLEX_ON_CPU
@pytest.mark.usefixtures("uncompiled")
def test_flex_attention_of_a_packed_batch(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    ids = torch.randint(5, 100, (1, 24))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[0, 2:10] = target[0, 14:22] = True
    inputs = {"target_mask": target, "cu_seq_lens_q": torch.tensor([0, 11, 24])}
    with torch.no_grad():
        expected = model(ids, **inputs).logits
        model.set_attn_implementation("flex_attention")
        got = model(ids, **inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@FLEX_ON_CPU
@pytest.mark.usefixtures("uncompiled")
def test_flex_attention_is_not_trained_on_a_cpu(make_llama: Callable[..., Any]) -> None:
    model = make_llama("flex_attention").train()
    ids = torch.randint(5, 100, (1, 12))
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(ids, target_mask=ids > 20)


@pytest.fixture
def masked_flash() -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Attention by what flash-attn is given without offsets: a mask of two dimensions, or none.

    Records the lengths of queries and keys, and how many keys were filler.
    """
    calls: list[tuple[int, ...]] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        batch, _, new, _ = query.shape
        total = key.shape[2]
        valid = torch.ones(batch, total, dtype=torch.bool) if mask is None else mask
        assert valid.dtype == torch.bool
        assert valid.shape == (batch, total)
        calls.append((new, total, int((~valid).sum())))
        # flash-attn takes filler out and aligns queries and keys at their ends
        place = torch.arange(total)
        causal = place <= place[total - new :, None]
        seen = (causal & valid[:, None]) | (place == place[total - new :, None])
        out = scaled_dot_product_attention(
            query, key, value, seen[:, None], scale=kwargs["scaling"], enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("masked_recorder", attend)
    AttentionMaskInterface.register("masked_recorder", flash_attention_mask)
    yield "masked_recorder", calls
    AttentionInterface._global_mapping.pop("masked_recorder")
    AttentionMaskInterface._global_mapping.pop("masked_recorder")


def test_flash_attention_gets_a_mask_of_the_keys_that_are_there(
    make_llava: Callable[..., Any],
    ragged_batch: Row,
    masked_flash: tuple[str, list[tuple[int, ...]]],
) -> None:
    name, calls = masked_flash
    model = make_llava()
    tokens = generate(model, ragged_batch).sequences
    use(model, name)
    out = generate(model, ragged_batch)
    assert torch.equal(out.sequences, tokens)
    assert lengths(out) == LENGTHS
    # rows of 22, 36 and 6 tokens, of which layers keep 14, 20, 6; 10, 12, 6; 7, 7, 6
    prompt = [(36, 36, 44), (20, 20, 20), (12, 12, 8), (7, 7, 1)]
    decoded = [(1, total + step, filler) for step in range(1, STEPS) for _, total, filler in prompt]
    assert calls == prompt + decoded


def test_flash_attention_gets_no_mask_where_nothing_is_filler(
    make_llava: Callable[..., Any],
    ragged_batch: Row,
    masked_flash: tuple[str, list[tuple[int, ...]]],
) -> None:
    name, calls = masked_flash
    model = make_llava()
    use(model, name)
    ids = torch.tensor([[5, 6, *[IMAGE] * 16, 7, 8]])
    out = generate(model, {"input_ids": ids, "pixel_values": ragged_batch["pixel_values"][:1]})
    assert lengths(out) == [20 + STEPS - 1, 12 + STEPS - 1, 8 + STEPS - 1, 5 + STEPS - 1]
    assert {filler for *_, filler in calls} == {0}
