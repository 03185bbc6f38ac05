"""Counted arithmetic and cache: the paper's table follows from the formulas."""

from __future__ import annotations

import pytest

from pmod_model.configuration import PModConfig
from pmod_model.flops import DecoderSize, attention_flops, kept_per_layer, kv_bytes, linear_flops
from pmod_model.schedule import layer_ratios

SEVEN_B = DecoderSize(32, 4096, 11008, 32000, query_width=4096, kv_width=4096)
TEXT = 58


@pytest.mark.parametrize(
    ("vision", "dense", "routed", "kv", "kv_with_text"),
    [(576, 8.378, 4.923, 0.5369, 0.579), (2928, 39.457, 21.914, 0.5374, 0.546)],
)
def test_the_papers_figures_follow(
    vision: int, dense: float, routed: float, kv: float, kv_with_text: float
) -> None:
    everything = [vision] * SEVEN_B.layers
    kept = kept_per_layer(layer_ratios(PModConfig(decay_depth=31), 32), 32, vision)
    counts = [linear_flops(SEVEN_B, TEXT, vision, k) / 1e12 for k in (everything, kept)]
    assert [round(count, 3) for count in counts] == [dense, routed]
    for text, share in ((0, kv), (TEXT, kv_with_text)):
        ratio = kv_bytes(SEVEN_B, text, kept, 2) / kv_bytes(SEVEN_B, text, everything, 2)
        assert ratio == pytest.approx(share, abs=5e-4)  # half of the last digit given


def test_kept_count_is_the_product_in_float32() -> None:
    assert kept_per_layer({1: 0.35}, 2, 2880) == [2880, 1008]  # 1007 in double precision


def test_attention_counts_causal_pairs() -> None:
    tiny = DecoderSize(1, 4, 8, 10, query_width=4, kv_width=4)
    # three tokens: six pairs, two products of four multiply-adds each
    assert attention_flops(tiny, 1, [2]) == 6 * 2 * 4 * 2


def test_grouped_queries_shrink_keys_and_values() -> None:
    whole = DecoderSize(1, 8, 16, 10, query_width=8, kv_width=8)
    grouped = DecoderSize(1, 8, 16, 10, query_width=8, kv_width=2)
    assert kv_bytes(grouped, 3, [0], 4) * 4 == kv_bytes(whole, 3, [0], 4) == 2 * 8 * 3 * 4
    # two projections of 8 x 6 less, 2 per multiply-add, three tokens
    assert linear_flops(whole, 3, 0, [0]) - linear_flops(grouped, 3, 0, [0]) == 2 * 8 * 6 * 2 * 3
