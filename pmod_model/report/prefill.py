"""What one prefill costs: counted from the config, measured in the cache, timed here."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pmod_model.cache_name import cache_name
from pmod_model.configuration import PModConfig
from pmod_model.flops import DecoderSize, attention_flops, kept_per_layer, kv_bytes, linear_flops
from pmod_model.schedule import layer_ratios

WARM_UP = 3
SECONDS = 3.0
REPEATS = (5, 60)


@dataclass(frozen=True)
class PrefillCost:
    """Counted and measured cost of one prompt; see `pmod_model.flops` for the counting.

    Attributes:
        text_tokens: tokens of the prompt that are not vision.
        vision_tokens: tokens of its image.
        kept: vision tokens that each layer processes.
        linear_flops: the paper's count: linear layers and head.
        all_flops: the same with attention itself.
        kv_bytes: keys and values in the cache after the prefill, measured.
        kv_bytes_vision: the part of it that vision tokens take, counted.
    """

    text_tokens: int
    vision_tokens: int
    kept: list[int]
    linear_flops: int
    all_flops: int
    kv_bytes: int
    kv_bytes_vision: int


@dataclass(frozen=True)
class PrefillTime:
    """Median seconds of a prefill of `batch` prompts: wall clock, and CPU time of all threads."""

    batch: int
    wall: float
    cpu: float


def prefill_cost(model: PreTrainedModel, inputs: dict[str, Tensor]) -> PrefillCost:
    """Cost of prefilling `inputs`, a batch of one prompt."""
    text_config = model.config.get_text_config()
    size = DecoderSize.of(text_config)
    vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].numel() - vision
    pmod = getattr(model.config, "pmod", None)
    ratios = {} if pmod is None else layer_ratios(PModConfig.from_dict(pmod), size.layers)
    kept = kept_per_layer(ratios, size.layers, vision)
    linear = linear_flops(size, text, vision, kept)
    cache = _prefill(model, inputs)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    element = held[0].element_size()
    return PrefillCost(
        text,
        vision,
        kept,
        linear,
        linear + attention_flops(size, text, kept),
        sum(tensor.numel() * element for tensor in held),
        kv_bytes(size, 0, kept, element),
    )


def time_prefills(models: list[PreTrainedModel], inputs: dict[str, Tensor]) -> list[PrefillTime]:
    """Time a prefill of `inputs` with each model, in turns, so that disturbances meet both."""
    samples: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(WARM_UP):
        for model in models:
            _prefill(model, inputs)
    least, most = REPEATS
    start = time.perf_counter()
    while len(samples[0]) < least or (
        len(samples[0]) < most and time.perf_counter() - start < SECONDS
    ):
        for model, taken in zip(models, samples, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            _prefill(model, inputs)
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    batch = inputs["input_ids"].shape[0]
    return [
        PrefillTime(batch, *(statistics.median(column) for column in zip(*taken, strict=True)))
        for taken in samples
    ]


def _prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    with torch.inference_mode():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, **{cache_name(model): cache}, use_cache=True, logits_to_keep=1)
    return cache
