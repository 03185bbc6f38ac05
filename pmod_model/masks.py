"""Attention masks of routed layers, in the form that the backbone's attention takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    flash_attention_mask,
)


def attention_mask(
    config: Any,
    rows: Tensor,
    *,
    past: Any = 0,
    total: int,
    valid: Tensor | None = None,
    sequence: Tensor | None = None,
) -> Any:
    """The causal mask of `rows` [B, slots, D] after `past` keys, over `total` keys.

    Args:
        config: of the attention module; names the implementation.
        rows: what attends; only shape, dtype and device are read.
        past: keys before those of `rows`.
        total: all keys.
        valid: bool [B, total], False = filler; None = every key is real.
        sequence: int [slots], the sequence of each row of a packed batch; None = a sequence per row
            of the batch.

    Raises:
        ValueError: nobody has told transformers how to build masks for the implementation.
    """
    implementation: str = config._attn_implementation
    try:
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    except KeyError:
        raise ValueError(
            "attn_implementation: expected one with a mask function in AttentionMaskInterface"
            f" ({', '.join(sorted(ALL_MASK_ATTENTION_FUNCTIONS))}), got {implementation}"
        ) from None
    mask_function = causal_mask_function
    if valid is not None:
        mask_function = _causal_over(valid)
    elif sequence is not None:
        mask_function = _causal_within(sequence)
    return make_mask(
        batch_size=rows.shape[0],
        q_length=rows.shape[1],
        kv_length=total,
        q_offset=past,
        kv_offset=0,
        mask_function=mask_function,
        # flash attention knows no mask function: it takes the filler out by itself
        attention_mask=valid if make_mask is flash_attention_mask else None,
        allow_is_causal_skip=valid is None and sequence is None,
        dtype=rows.dtype,
        config=config,
        use_vmap=False,
        device=rows.device,
    )


def _causal_over(valid: Tensor) -> Callable[..., Any]:
    """Causal attention to keys where `valid` [B, keys] is True.

    A query always sees its own key. That changes nothing for tokens, and spares filler, which would
    see none at all, a softmax over nothing: NaN, and NaN times zero in the backward pass.
    """

    def mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx == q_idx) | ((kv_idx <= q_idx) & valid[batch_idx, kv_idx])

    return mask


def _causal_within(sequence: Tensor) -> Callable[..., Any]:
    """Causal attention to keys of the same sequence."""

    def mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & (sequence[q_idx] == sequence[kv_idx])

    return mask
