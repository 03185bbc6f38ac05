"""A training step of a whole model with p-MoD beside the same model dense.

Forward, backward and AdamW in bfloat16, with gradient checkpointing. Every layer runs forward twice
and backward once, which is twice a forward pass; the head, over all tokens, is not run again. The
dense model has the same weights in the layers of transformers, without routers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from bench_model import note
from cells import over
from inputs import Rows
from models import ModelCell, build, model_cell, release
from pytest_benchmark.fixture import BenchmarkFixture
from slot import once_per_shape
from timing import Contest, Measure
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pmod_model.flops import attention_flops, linear_flops
from pmod_model.report.measure import Prompt, make_prompt, peak_bytes

LEAST_ROUNDS = 3  # a step takes up to a minute
LAYER_PASSES, HEAD_PASSES = 4, 3
IGNORED = -100


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    """Gigabytes of weights end with this file."""
    yield
    make_step.cache_clear()
    release()


@contextmanager
def without_routers(model: Any, dense: bool) -> Iterator[None]:
    """Let the layers be those of the backbone, if `dense`."""
    layers = list(model.model.layers)
    routed = [type(layer) for layer in layers]
    try:
        for layer in layers if dense else ():
            layer.__class__ = LlamaDecoderLayer
        yield
    finally:
        for layer, cls in zip(layers, routed, strict=True):
            layer.__class__ = cls


class Step:
    """One step of training on one batch: labels lie on the text after the image."""

    def __init__(self, cell: ModelCell) -> None:
        self.model = build(cell).train()
        enable: Any = getattr(
            self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.prompt = make_prompt(self.model, cell.text, cell.vision, cell.batch)
        self.labels = torch.full((cell.batch, cell.length), IGNORED)
        answer = cell.text - cell.text // 2
        generator = torch.Generator().manual_seed(3)
        shape = cell.batch, answer
        self.labels[:, -answer:] = torch.randint(cell.size.vocabulary, shape, generator=generator)
        # the token before each label predicts it
        self.predicting = torch.arange(cell.length - answer - 1, cell.length - 1)

    def __call__(self, prompt: Prompt) -> Tensor:
        """The loss; one in the middle of an accumulation would leave out the optimiser."""
        loss = self.backward(prompt)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss

    def backward(self, prompt: Prompt, **head: Any) -> Tensor:
        """The loss, whose gradients are added up."""
        dense = not bool(prompt.target_mask.any())
        with without_routers(self.model, dense):
            loss = self.model(
                inputs_embeds=prompt.embeddings.requires_grad_(),
                target_mask=prompt.target_mask,
                labels=self.labels,
                use_cache=False,
                **head,
            ).loss
            loss.backward()
        prompt.embeddings.grad = None
        return loss.detach()

    def peaks(self, *, all_logits: bool) -> dict[str, int]:
        """Most bytes of tensors at once, above weights, their gradients and the optimiser's state.

        Args:
            all_logits: the head sees every token, as in transformers, or those before a label.
        """
        labelled = {
            "logits_to_keep": self.predicting,
            "shift_labels": self.labels[:, self.predicting + 1].contiguous(),
        }
        head = {} if all_logits else labelled
        return {
            name: peak_bytes(lambda each=each: self.backward(each, **head))
            for name, each in (("ours", self.prompt), ("dense", self.prompt.dense()))
        }


@lru_cache(maxsize=1)
def make_step(cell: ModelCell) -> Step:
    """The step of a cell; one is kept at a time, with the state of its optimiser."""
    return Step(cell)


def steps(cell: ModelCell) -> Contest:
    step = make_step(cell)
    empty = torch.empty(0)
    rows = Rows(step.prompt.embeddings, empty, empty, empty, empty, scratch=empty, source=empty)
    dense = step.prompt.dense()
    weights = sum(parameter.nbytes for parameter in step.model.parameters())
    return Contest(
        [rows],
        lambda _: step(step.prompt),
        {"dense": lambda _: step(dense)},
        weights,
        unlike=frozenset({"dense"}),
        grad=True,
        least_rounds=LEAST_ROUNDS,
    )


timed_steps = once_per_shape(steps)  # type: ignore[arg-type]


def step_flops(cell: ModelCell, kept: list[int]) -> int:
    """Operations of a step, attention included, the optimiser and the norms not.

    The second forward pass stops when it has what the backward pass needs. In a dense layer that is
    before its last product, whose result a routed layer needs for the gradient of its gate.
    """
    size = cell.size
    head = 2 * size.hidden * size.vocabulary * cell.length
    linear = linear_flops(size, cell.text, cell.vision, kept) - head
    layers = linear + attention_flops(size, cell.text, kept)
    dense = kept.count(cell.vision) * cell.length
    left_out = 2 * size.hidden * size.intermediate * dense
    return cell.batch * (LAYER_PASSES * layers + HEAD_PASSES * head - left_out)


@over([model_cell("training", "1b", geometry) for geometry in ("llava15", "llava_next")])
def bench_training(measure: Measure, benchmark: BenchmarkFixture, cell: ModelCell) -> None:
    measure(cell, timed_steps(cell), 1.0)
    everything = [cell.vision] * cell.size.layers
    ideal = step_flops(cell, everything) / step_flops(cell, cell.kept_by_layer)
    if benchmark.enabled:
        step = make_step(cell)
        peaks = {"peak_bytes": step.peaks(all_logits=False)}
        peaks["peak_bytes_all_logits"] = step.peaks(all_logits=True)
        note(benchmark, cell, ideal, **peaks)
