"""What a prefill and decoding take on this machine: the decoder and head, p-MoD beside dense.

Dense is the same model told that no token may be skipped: then every layer is the backbone's.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

from pmod_model.cache_name import cache_name

ROUNDS = (3, 30)
SECONDS = 10.0
DECODE_STEPS = 8


@dataclass(frozen=True)
class Measured:
    """Medians over rounds; memory is that of one prefill, above the weights.

    Attributes:
        prefill: seconds until the first token.
        decode: seconds of a token after it.
        cache_bytes: keys and values after the prefill, filler of ragged batches included.
        peak_bytes: most that tensors took at once, as torch's profiler counts allocations.
    """

    prefill: float
    decode: float
    cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Prompt:
    """Embeddings [B, S, D], which tokens may be skipped and which are not padding, bool [B, S]."""

    embeddings: Tensor
    target_mask: Tensor
    valid: Tensor | None = None

    def dense(self) -> Prompt:
        """The same, of which no token may be skipped."""
        return Prompt(self.embeddings, torch.zeros_like(self.target_mask), self.valid)


def make_prompt(
    model: PreTrainedModel, text_tokens: int, vision_tokens: int, batch: int = 1, *, fixed: int = 0
) -> Prompt:
    """Random embeddings of an image between two halves of a text; its first `fixed` tokens stay."""
    width = model.config.get_text_config().hidden_size
    length = text_tokens + vision_tokens
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(batch, length, width, generator=generator).to(model.dtype)
    target = torch.zeros(batch, length, dtype=torch.bool)
    start = text_tokens // 2
    target[:, start + fixed : start + vision_tokens] = True
    return Prompt(embeddings, target)


def prefill(model: PreTrainedModel, prompt: Prompt) -> tuple[Tensor, DynamicCache]:
    """Logits [B, 1, V] of the last token, and the cache."""
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    arguments: dict[str, Any] = {cache_name(model): cache}
    with torch.inference_mode():
        out = model(
            inputs_embeds=prompt.embeddings,
            target_mask=prompt.target_mask,
            attention_mask=prompt.valid,
            use_cache=True,
            logits_to_keep=1,
            **arguments,
        )
    return out.logits, cache


def decode(model: PreTrainedModel, prompt: Prompt, cache: DynamicCache, steps: int) -> Tensor:
    """Logits [B, 1, V] after so many steps, each with the first embedding of the prompt."""
    arguments: dict[str, Any] = {cache_name(model): cache}
    mask, logits = prompt.valid, torch.empty(0)
    with torch.inference_mode():
        for _ in range(steps):
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 1), value=True)
            token = prompt.embeddings[:, :1]
            logits = model(
                inputs_embeds=token, attention_mask=mask, use_cache=True, **arguments
            ).logits
    return logits


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    layers: list[Any] = cache.layers
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


def measure(model: PreTrainedModel, prompt: Prompt) -> tuple[Measured, Measured]:
    """p-MoD and dense, in turns in one process, so that disturbances meet both."""
    prompts = (prompt, prompt.dense())
    memory = [_memory(model, each) for each in prompts]  # also warms up
    times: list[list[tuple[float, float]]] = [[], []]
    least, most = ROUNDS
    start = time.perf_counter()
    while len(times[0]) < least or (len(times[0]) < most and time.perf_counter() - start < SECONDS):
        for each, taken in zip(prompts, times, strict=True):
            taken.append(_time(model, each))
    pmod, dense = (
        Measured(
            statistics.median(p for p, _ in taken), statistics.median(d for _, d in taken), *held
        )
        for taken, held in zip(times, memory, strict=True)
    )
    return pmod, dense


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes that tensors made by `work` took at once, whatever it returns included.

    From the profiler's record of every allocation: exact, and the same from run to run, which a
    process's resident set is not.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes notes to stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    peak = now = 0
    for *_, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _memory(model: PreTrainedModel, prompt: Prompt) -> tuple[int, int]:
    held: list[int] = []

    def work() -> Any:
        _, cache = prefill(model, prompt)
        held.append(cache_bytes(cache))
        return cache

    peak = peak_bytes(work)
    return held[0], peak


def _time(model: PreTrainedModel, prompt: Prompt) -> tuple[float, float]:
    start = time.perf_counter()
    _, cache = prefill(model, prompt)
    first = time.perf_counter()
    decode(model, prompt, cache, DECODE_STEPS)
    return first - start, (time.perf_counter() - first) / DECODE_STEPS
