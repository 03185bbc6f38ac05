"""What the routers do while a model trains, among the numbers that the Trainer logs."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from pmod_model.context import RoutingRecord
from pmod_model.inject import find_decoder, record_routing
from pmod_model.models import DecoderModel

SATURATED = 0.99


class RoutingMetrics(TrainerCallback):
    """Adds routing and speed to every log entry, and so to TensorBoard, W&B and the like.

    Per routed layer i, over the passes of the logged step: `layer_i/kept`, the share of competing
    tokens that were kept; `layer_i/router_norm` and `layer_i/router_bias`, of its parameters;
    `layer_i/logit_std`, the spread of its scores; `layer_i/saturated`, the share of competing
    tokens whose tanh gate is within 1 % of its end. Further `tokens_per_second` since the entry
    before, padding excluded, if the Trainer counts tokens
    (`include_num_input_tokens_seen="non_padding"`).

    Only passes of steps that are logged are recorded. Use `watch_routing`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder: Any = find_decoder(model)
        self.open = ExitStack()
        self.records: list[RoutingRecord] = []
        self.since = (time.perf_counter(), 0)

    @property
    def routed(self) -> bool:
        """Whether the model has routers; a dense one only gets its speed logged."""
        return isinstance(self.decoder, DecoderModel)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.since = (time.perf_counter(), state.num_input_tokens_seen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the passes of a step that will be logged."""
        step = state.global_step + 1
        logged = step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        if logged and self.routed:
            self.records = self.open.enter_context(record_routing(self.model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the recording."""
        self.open.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a recording that an interrupted step left open."""
        self.open.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to the entry of a training step, which is also the last of the history."""
        if logs is None or "loss" not in logs:
            return
        found = {**self._speed(state), **(self._routing() if self.routed else {})}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def _speed(self, state: Any) -> dict[str, float]:
        before, tokens = self.since
        self.since = now, seen = time.perf_counter(), int(state.num_input_tokens_seen)
        return {"tokens_per_second": (seen - tokens) / (now - before)} if seen > tokens else {}

    def _routing(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for layer in self.decoder.pmod_ratios:
            router = self.decoder.layers[layer].mod_router
            weight, bias = router.weight, router.bias
            if weight.numel():  # a sharded parameter may be elsewhere
                found[f"layer_{layer}/router_norm"] = float(weight.detach().float().norm())
                found[f"layer_{layer}/router_bias"] = 0.0 if bias is None else float(bias.detach())
        found.update(routing_statistics(self.records, self.decoder.pmod_config))
        self.records = []
        return found


def routing_statistics(records: list[RoutingRecord], config: Any) -> dict[str, float]:
    """Shares over the competing tokens of all records, and the spread of their scores, by layer."""
    found: dict[str, float] = {}
    layers = sorted({layer for record in records for layer in record.kept})
    for layer in layers:
        parts = [(r, r.target_mask) for r in records if layer in r.kept]
        kept = torch.cat([r.kept[layer][mask] for r, mask in parts])
        logits = torch.cat([r.logits[layer][mask] for r, mask in parts])
        found[f"layer_{layer}/kept"] = float(kept.float().mean())
        found[f"layer_{layer}/logit_std"] = float(logits.std(correction=0))
        if config.gate_activation == "tanh":
            saturated = (logits.tanh().abs() > SATURATED).float().mean()
            found[f"layer_{layer}/saturated"] = float(saturated)
    return found


def watch_routing(trainer: Trainer) -> RoutingMetrics:
    """Make any Trainer log what the routers do; call it before `train`.

    Loggers run in the order in which they were added, so this one is put first.
    """
    metrics = RoutingMetrics(trainer.model)
    trainer.callback_handler.callbacks.insert(0, metrics)
    return metrics
