"""Arithmetic and key-value cache of one prefill, counted from a config (arXiv:2412.04449, table 1).

The paper's figure counts the linear layers of the decoder and the head, 2 per multiply-add, over
t text and N vision tokens, of which layer l processes k_l:

    sum over layers of 2 (4 h^2 + 3 h m) (t + k_l)  +  2 h V (t + N)

Attention scores, the vision tower and the router (2 h N per routed layer) are not in it. With
t = 58 it gives the TFLOPs of the main tables (section 4). KV is the share of the dense cache of
vision tokens, the mean of k_l / N; R the mean retention ratio, before k_l is rounded down:

    LLaVA-1.5-7B,  N = 576   (24 x 24)             dense  8.38   p-MoD  4.92   KV 53.7 %   R 53.8 %
    LLaVA-NeXT-7B, N = 2928  (24 x 24 + 48 x 49)   dense 39.46   p-MoD 21.91   KV 53.7 %   R 53.8 %

The paper prints 21.94 for the last: what the formula gives with k_l = 0.538 N in every layer, the
rounded share (LLaVA-1.5 would have 4.93 then). No other number of text tokens gives 39.46 as well.
Version 1 of the paper prints 53.8 %, version 2 prints 53.7 %.

`attention_flops` adds what the paper leaves out of attention: scores and weighted sums of each
token with itself and the kept tokens before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of a Llama-style decoder; the widths of queries and of keys are heads x head width."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    query_width: int
    kv_width: int

    @classmethod
    def of(cls, text_config: Any) -> DecoderSize:
        """Sizes from the text config of a transformers model."""
        heads = text_config.num_attention_heads
        head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
        return cls(
            text_config.num_hidden_layers,
            text_config.hidden_size,
            text_config.intermediate_size,
            text_config.vocab_size,
            heads * head_dim,
            kv_heads * head_dim,
        )


def kept_per_layer(ratios: Mapping[int, float], num_layers: int, vision_tokens: int) -> list[int]:
    """k_l of every layer: N in a dense one, int(float32(N) * float32(ratio)) in a routed one."""
    return [
        int(np.float32(vision_tokens) * np.float32(ratios[layer]))
        if layer in ratios
        else vision_tokens
        for layer in range(num_layers)
    ]


def linear_flops(
    size: DecoderSize,
    text_tokens: int,
    vision_tokens: int,
    kept: Sequence[float],
    *,
    head_tokens: int | None = None,
) -> int:
    """Operations of the decoder's linear layers and head in one prefill, as the paper counts them.

    Args:
        size: the decoder.
        text_tokens: tokens that every layer processes.
        vision_tokens: tokens of the images, before any is skipped.
        kept: how many of them each layer processes.
        head_tokens: tokens that the head sees, 1 in a prefill of `generate`; None = all, as in the
            paper.
    """
    seen = text_tokens + vision_tokens if head_tokens is None else head_tokens
    projections = (
        2 * size.hidden * (size.query_width + size.kv_width)
    )  # queries and output, keys and values
    block = 2 * (projections + 3 * size.hidden * size.intermediate)
    head = 2 * size.hidden * size.vocabulary * seen
    return head + round(block * sum(text_tokens + k for k in kept))


def attention_flops(size: DecoderSize, text_tokens: int, kept: Sequence[int]) -> int:
    """Operations of causal attention itself: 2 products of `query_width` per pair of tokens."""
    pairs = sum((text_tokens + k) * (text_tokens + k + 1) // 2 for k in kept)
    return 4 * size.query_width * pairs


def kv_bytes(size: DecoderSize, text_tokens: int, kept: Sequence[int], element_bytes: int) -> int:
    """Bytes of all keys and values after the prefill; with 0 `text_tokens`, of vision alone."""
    return 2 * size.kv_width * element_bytes * sum(text_tokens + k for k in kept)
