"""Packed batches: sequences in one row, routed and attended to as if each had a row of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from model.backbones import Row, qwen2_5_vl, qwen3_vl
from model.caches import CACHE
from model.conftest import IMAGE, RATIOS, make_opinionated
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DataCollatorWithFlattening, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from pmod_model import PModConfig, inject_pmod, record_routing

LENGTHS = [22, 36, 6]  # of the rows of ragged_batch
BOUNDS = torch.tensor([0, 22, 58, 64], dtype=torch.int32)
OFFSETS = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def with_labels(batch: Row) -> Row:
    """No token predicts an image, nor the first token of a sequence."""
    ignored = (batch["input_ids"] == IMAGE) | (batch["attention_mask"].cumsum(-1) <= 1)
    return {**batch, "labels": batch["input_ids"].masked_fill(ignored, -100)}


def packed(batch: Row) -> Row:
    """The rows of a padded batch one after another; what is not of tokens stays."""
    valid = batch["attention_mask"].bool()
    names = ("input_ids", "labels", "mm_token_type_ids")
    flat = {name: batch[name][valid][None] for name in names if name in batch}
    others = {name: batch[name] for name in batch if name not in (*names, "attention_mask")}
    return {**flat, **others}


def positions(batch: Row) -> Tensor:
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def run(model: Any, inputs: Row) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Logits, what was kept, and gradients."""
    model.zero_grad(set_to_none=True)
    with record_routing(model) as records:
        out = model(**inputs)
        out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), records[0].kept, grads


def check(model: Any, batch: Row, flat: Row) -> None:
    """Padded and packed agree to rounding, which a few layers amplify.

    The unit is float32's 6e-8 even for a model in float64, whose norms and loss are float32.
    """
    double = next(model.parameters()).dtype == torch.float64
    bound = 1e-5 if double else 1e-4
    valid = batch["attention_mask"].bool()
    logits, kept, grads = run(model, batch)
    got, got_kept, got_grads = run(model, flat)
    torch.testing.assert_close(got[0], logits[valid], atol=bound, rtol=bound)
    assert kept.keys() == got_kept.keys() == {1, 2, 3}
    for layer, mask in kept.items():
        assert torch.equal(got_kept[layer][0], mask[valid])
    assert got_grads.keys() == grads.keys()
    for name, grad in grads.items():
        scale = max(float(grad.abs().max()), 1e-6 if double else 1e-3)
        assert (got_grads[name] - grad).abs().max() <= bound * scale, name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("told", ["offsets", "positions", "both"])
@pytest.mark.parametrize("pool", ["sequence", "image"])
def test_packed_is_padded(
    make_llava: Callable[..., Any], ragged_batch: Row, attention: str, told: str, pool: str
) -> None:
    # eager attention over padding makes NaN of float64: it masks with numbers beyond float32
    dtype = torch.float32 if attention == "eager" else torch.float64
    model = make_llava(attention, pool=pool).to(dtype).train()
    batch = with_labels({**ragged_batch, "pixel_values": ragged_batch["pixel_values"].to(dtype)})
    flat = packed(batch)
    if told != "positions":
        flat |= OFFSETS
    if told != "offsets":
        flat["position_ids"] = POSITIONS
    check(model, {**batch, "position_ids": positions(batch)}, flat)


def test_images_that_adjoin_across_sequences_are_two_pools(make_llama: Callable[..., Any]) -> None:
    model = make_llama(pool="image")
    ids, target = torch.randint(5, 100, (1, 24)), torch.ones(1, 24, dtype=torch.bool)
    target[0, :4] = target[0, 20:] = False
    with torch.no_grad(), record_routing(model) as records:
        got = model(ids, target_mask=target, cu_seq_lens_q=torch.tensor([0, 12, 24])).logits
        for half in (slice(0, 12), slice(12, 24)):
            alone = model(ids[:, half], target_mask=target[:, half]).logits
            torch.testing.assert_close(got[:, half], alone, atol=1e-5, rtol=1e-5)
    assert [int(kept.sum()) for kept in records[0].kept.values()] == [8, 4, 0]


@pytest.mark.parametrize("make", [qwen2_5_vl, qwen3_vl])
def test_three_dimensional_positions_of_packed_sequences(make: Callable[[], Any]) -> None:
    backbone = make()
    model = inject_pmod(backbone.model, PModConfig(schedule=RATIOS))
    make_opinionated(model).double()
    batch = with_labels(backbone.batch())
    batch["pixel_values"] = batch["pixel_values"].double()
    vision = [
        model.model.get_rope_index(
            row["input_ids"],
            image_grid_thw=row["image_grid_thw"],
            mm_token_type_ids=row["mm_token_type_ids"],
        )[0]
        for row in backbone.rows
    ]
    lengths = [row["input_ids"].shape[1] for row in backbone.rows]
    bounds = torch.tensor([0, lengths[0], sum(lengths)])
    flat = {**packed(batch), "position_ids": torch.cat(vision, dim=-1), "cu_seq_lens_q": bounds}
    check(model, batch, flat)
    text = torch.cat([torch.arange(n) for n in lengths])[None, None]
    del flat["cu_seq_lens_q"]
    flat["position_ids"] = torch.cat((text, flat["position_ids"]))
    check(model.train(), batch, flat)
    del flat["position_ids"]
    with pytest.raises(ValueError, match=r"position_ids: expected \[4, 1, N\], those of text"):
        model(**flat, cu_seq_lens_q=bounds)


def test_checkpointing_of_a_packed_batch(make_llava: Callable[..., Any], ragged_batch: Row) -> None:
    model = make_llava().train()
    flat = packed(with_labels(ragged_batch)) | OFFSETS
    _, _, plain = run(model, flat)
    # the second name is that of older releases
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    _, _, grads = run(model, flat)
    assert all(torch.equal(grads[name], plain[name]) for name in plain)


def test_batches_of_the_flattening_collator(
    make_llava: Callable[..., Any], ragged_batch: Row
) -> None:
    model = make_llava()
    batch = with_labels(ragged_batch)
    rows = [
        {name: batch[name][i, valid] for name in ("input_ids", "labels")}
        for i, valid in enumerate(batch["attention_mask"].bool())
    ]
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    inputs = {**collate(rows), "pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        loss = model(**inputs).loss
        expected = model(**batch, position_ids=positions(batch)).loss
    # of 20 tokens, as likely as 1 in 128: float32 rounds 5 to 5e-7
    torch.testing.assert_close(loss, expected, atol=5e-6, rtol=0)


def test_text_alone_is_packed_as_by_the_backbone(make_llava: Callable[..., Any]) -> None:
    ids = torch.randint(5, 100, (1, 20))
    bounds = torch.tensor([0, 8, 20])
    place = torch.cat((torch.arange(8), torch.arange(12)))[None]
    model = make_llava()
    with torch.no_grad():
        got = model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, position_ids=place).logits
        for part in (slice(0, 8), slice(8, 20)):
            alone = model(ids[:, part]).logits
            torch.testing.assert_close(got[:, part], alone, atol=1e-5, rtol=1e-5)


Calls = list[tuple[Tensor, int, torch.dtype]]


@pytest.fixture
def flash() -> Iterator[tuple[str, Calls]]:
    """Attention by the arguments of flash-attn's varlen functions, which it records."""
    calls: Calls = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        bounds = kwargs["cu_seq_lens_q"]
        assert torch.equal(bounds, kwargs["cu_seq_lens_k"])
        assert bounds.dtype == torch.int32
        assert bounds.device == query.device
        assert bounds.tolist()[:: len(bounds) - 1] == [0, query.shape[2]]
        longest = kwargs["max_length_q"]
        assert type(longest) is int
        assert longest == kwargs["max_length_k"] == int(bounds.diff().max())
        assert query.shape[2] == key.shape[2] == value.shape[2]
        assert query.dtype == key.dtype == value.dtype
        calls.append((bounds, longest, query.dtype))
        parts = [
            scaled_dot_product_attention(
                *(t[:, :, start:end] for t in (query, key, value)),
                is_causal=True,
                scale=kwargs["scaling"],
                enable_gqa=True,
            )
            for start, end in pairwise(bounds.tolist())
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    AttentionInterface.register("varlen_recorder", attend)
    AttentionMaskInterface.register("varlen_recorder", flash_attention_mask)
    yield "varlen_recorder", calls
    AttentionInterface._global_mapping.pop("varlen_recorder")
    AttentionMaskInterface._global_mapping.pop("varlen_recorder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_gets_the_offsets_of_kept_tokens(
    make_llava: Callable[..., Any],
    ragged_batch: Row,
    flash: tuple[str, Calls],
    dtype: torch.dtype,
) -> None:
    name, calls = flash
    model = make_llava().to(dtype).train()
    flat = packed(with_labels(ragged_batch)) | OFFSETS
    flat["pixel_values"] = flat["pixel_values"].to(dtype)
    expected, kept, grads = run(model, flat)
    model.model.language_model.set_attn_implementation(name)
    got, got_kept, got_grads = run(model, flat)
    # text 6, 4 and 6; of 16, 32 and 0 image tokens a half, a quarter, a tenth
    assert [bounds.tolist() for bounds, *_ in calls] == [
        [0, 22, 58, 64],
        [0, 14, 34, 40],
        [0, 10, 22, 28],
        [0, 7, 14, 20],
    ]
    assert [longest for _, longest, _ in calls] == [36, 20, 12, 7]
    assert {used for *_, used in calls} == {dtype}
    if dtype == torch.bfloat16:
        return  # which tokens are kept may hang on the last bit
    assert all(torch.equal(got_kept[layer], kept[layer]) for layer in kept)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for key, grad in grads.items():
        scale = max(float(grad.abs().max()), 1e-4)
        assert (got_grads[key] - grad).abs().max() <= 1e-3 * scale, key


def test_an_attention_without_a_mask_function_is_refused(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    AttentionInterface.register("unmasked", lambda *args, **kwargs: (args[1].transpose(1, 2), None))
    try:
        model.set_attn_implementation("unmasked")
        target = torch.ones(1, 9, dtype=torch.bool)
        message = "attn_implementation: expected one with a mask function .*sdpa.*, got unmasked"
        with pytest.raises(ValueError, match=message):
            model(torch.randint(5, 100, (1, 9)), target_mask=target)
    finally:
        AttentionInterface._global_mapping.pop("unmasked")


def test_what_cannot_be_packed_is_named(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    ids = torch.randint(5, 100, (1, 20))
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[0, 2:18] = True
    bounds = torch.tensor([0, 8, 20])
    place = torch.cat((torch.arange(8), torch.arange(12)))[None]

    def refused(message: str, error: type[Exception] = ValueError, **inputs: Any) -> None:
        arguments = {"target_mask": target, "cu_seq_lens_q": bounds, **inputs}
        with pytest.raises(error, match=message):
            model(ids.expand(len(arguments["target_mask"]), -1), **arguments)

    two = target.expand(2, -1)
    refused("cu_seq_lens_q: expected one row .*, got 2 rows", target_mask=two)
    ones = torch.ones_like(ids)
    refused(r"attention_mask: expected None .*, got shape \[1, 20\]", attention_mask=ones)
    refused("use_cache: expected False with a packed batch, got True", use_cache=True)
    cache: Any = DynamicCache(config=model.config)
    refused("use_cache: expected False with a packed batch, got True", **{CACHE: cache})
    ascending = r"cu_seq_lens_q: expected ascending offsets \[sequences \+ 1\] from 0 to 20, got "
    for wrong in ([0, 8, 19], [1, 20], [0, 12, 8, 20], [0, 8, 8, 20], []):
        refused(ascending, cu_seq_lens_q=torch.tensor(wrong, dtype=torch.int32))
    refused(ascending, cu_seq_lens_q=torch.tensor([[0, 8, 20]]))
    refused("cu_seq_lens_q: expected an integer tensor, got list", TypeError, cu_seq_lens_q=[0, 20])
    refused("expected an integer tensor, got torch.float32", TypeError, cu_seq_lens_q=bounds / 1)
    other = torch.tensor([0, 9, 20])
    refused(r"cu_seq_lens_k: expected those of cu_seq_lens_q, \[0, 8, 20\]", cu_seq_lens_k=other)
    restart = "position_ids: expected positions that start over with each sequence only"
    refused(restart, position_ids=torch.arange(20)[None])
    gap = torch.cat((torch.arange(8), torch.arange(20, 32)))[None]
    refused(restart, position_ids=gap)
    model.train()
    refused(restart, position_ids=gap, cu_seq_lens_q=None)
    refused(
        "position_ids: expected one row .*, got 2 rows",
        position_ids=place,
        cu_seq_lens_q=None,
        target_mask=two,
    )
