"""What the layers of one forward pass need to know. It travels as a keyword argument.

Nothing here is kept on a module: checkpointing replays a layer with the arguments of its own batch,
and two threads may share a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pmod_model.hand_over import HandOver
from pmod_model.packing import Packing
from pmod_ops import Routing, RoutingPlan


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """What one routed forward pass kept. Filled in layer by layer.

    Attributes:
        target_mask: bool [B, S], the tokens that competed.
        kept: for each routed layer, bool [B, S], the competing tokens that it kept.
        logits: for each routed layer, fp32 [B, S] router scores; 0 on tokens that did not compete.
        gate: for each routed layer, fp32 [B, S] weights; 1 on tokens that did not compete.
        finite: bool [1] on the device, False once a routed layer wrote an infinity or NaN for a
            token that is not padding. Reading it waits for the device, so read it once per step.
    """

    target_mask: Tensor
    finite: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    gate: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, routing: Routing) -> None:
        """Note what `layer` did."""
        shape, device = self.target_mask.shape, self.target_mask.device
        kept = (routing.inverse >= 0).view(shape).to(device)
        self.kept[layer] = kept & self.target_mask
        self.logits[layer] = routing.logits.detach().view(shape).to(device)
        self.gate[layer] = routing.gate.detach().view(shape).to(device)

    def finite_on(self, device: torch.device) -> Tensor:
        """`finite`, or for a layer on another device a flag that is True."""
        return (
            self.finite if self.finite.device == device else self.finite.new_ones(1, device=device)
        )


@dataclass(frozen=True, eq=False)
class RoutingContext:
    """The routing of one forward pass of B sequences of S new tokens.

    Attributes:
        plan: sizes of every routed layer; None = no token competes and every layer is dense.
        valid: bool [B, S], which of the new tokens are not padding; None = all of them.
        past_valid: bool [B, P], the same of the tokens before them, if the caller's mask says so.
        record: where layers note what they kept, or None.
        hand_over: where a layer leaves the router scores of the next, or None.
        packed: whether the batch is one row in which the plan's sequences follow each other.
    """

    plan: RoutingPlan | None
    valid: Tensor | None
    past_valid: Tensor | None = None
    record: RoutingRecord | None = None
    hand_over: HandOver | None = None  # a default that torch.compile can trace
    packed: bool = False

    def to(self, device: torch.device | str, **kwargs: Any) -> RoutingContext:
        """The same with its masks and plan on `device`, for models that are spread over several.

        The hooks of accelerate call it before a layer. Records stay where they are.
        """
        masks = (self.valid, self.past_valid)
        tensors = [t for t in pytree.tree_leaves((masks, self.plan)) if isinstance(t, Tensor)]
        if all(t.device == torch.device(device) for t in tensors):
            return self
        valid, past_valid = (None if t is None else t.to(device, **kwargs) for t in masks)
        plan = pytree.tree_map_only(Tensor, lambda t: t.to(device, **kwargs), self.plan)
        return replace(self, plan=plan, valid=valid, past_valid=past_valid)


def make_context(
    ratios: Mapping[int, float],
    hidden: Tensor,
    *,
    target_mask: Tensor | None,
    attention_mask: Any,
    valid_mask: Tensor | None,
    pool: str,
    pool_id: Tensor | None = None,
    tokens_per_image: int | None,
    records: list[RoutingRecord] | None,
    layers: Sequence[nn.Module] = (),
    packing: Packing | None = None,
) -> RoutingContext:
    """Check the masks of a batch and plan its routing.

    One host synchronisation if there is a target mask (another to find the sequences of a packed
    batch), none if not.

    Args:
        ratios: retention ratio of every routed layer.
        hidden: input ids [B, S] or embeddings [B, S, D]; only shape and device are read.
        target_mask: bool [B, S] or None.
        attention_mask: None, nonzero = not padding [B, P + S], or a mask made ready for attention.
        valid_mask: [B, P + S], used instead where `attention_mask` was made ready.
        pool: "sequence", or "image" or "frame", which are the same without `pool_id`.
        pool_id: int [B, S], which competing tokens share a budget, instead of `tokens_per_image`.
        tokens_per_image: splits a run of image tokens into images; None = a run is an image.
        records: gets one record if a token competes.
        layers: the layers of the decoder, to hand over router scores between them.
        packing: the sequences of a packed batch, None = every row is a sequence.

    Raises:
        TypeError: a mask has the wrong type or dtype.
        ValueError: a mask does not fit the batch; the message names it.
    """
    batch, length = hidden.shape[:2]
    ready = attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2
    padding: Any = valid_mask if ready else attention_mask
    valid = past_valid = None
    if padding is not None:
        _check_mask("attention_mask", padding, hidden)
        if padding.shape[0] != batch or padding.shape[1] < length:
            _fail("attention_mask", f"shape [{batch}, at least {length}]", list(padding.shape))
        padding = padding != 0
        valid, past_valid = padding[:, -length:], padding[:, :-length]
    if target_mask is None:
        # a lone token of a lone sequence is not padding
        return RoutingContext(None, None if batch == length == 1 else valid, past_valid)
    _check_mask("target_mask", target_mask, hidden)
    if target_mask.dtype != torch.bool:
        raise TypeError(
            f"target_mask: expected dtype bool, got {str(target_mask.dtype).removeprefix('torch.')}"
        )
    if tuple(target_mask.shape) != (batch, length):
        _fail("target_mask", f"bool [{batch}, {length}]", list(target_mask.shape))
    if ready and valid_mask is None:
        got = f"{type(attention_mask).__name__} made ready for attention"
        _fail("attention_mask", f"a padding mask [{batch}, {length}] with target_mask", got)
    targets = target_mask if valid is None else target_mask & valid
    if pool_id is None and pool != "sequence":
        pool_id = image_pools(targets, tokens_per_image)
    if packing is None:
        plan = RoutingPlan.from_mask(targets, valid, ratios, pool_id)
    else:
        plan = packing.plan(targets, ratios, pool_id)
    if plan.num_routable == 0:
        return RoutingContext(None, valid, past_valid)
    record = None
    if records is not None:
        flag = torch.ones(1, dtype=torch.bool, device=targets.device)
        record = RoutingRecord(targets, flag)
        records.append(record)
    return RoutingContext(plan, valid, past_valid, record, HandOver(layers), packing is not None)


def image_pools(target_mask: Tensor, tokens_per_image: int | None) -> Tensor:
    """Number the images of every sequence: int32 [B, S], meaningful where `target_mask` is True.

    An image is a run of competing tokens, or `tokens_per_image` of them where images adjoin.
    """
    before = torch.nn.functional.pad(target_mask, (1, 0))[:, :-1]
    starts = target_mask & ~before
    if tokens_per_image is not None:
        position = torch.arange(target_mask.shape[1], device=target_mask.device)
        run_start = torch.where(starts, position, 0).cummax(dim=1).values
        starts = target_mask & ((position - run_start) % tokens_per_image == 0)
    return starts.cumsum(dim=1).to(torch.int32)


def _check_mask(name: str, mask: Any, hidden: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    if mask.ndim != 2:
        _fail(name, f"2 dimensions [{hidden.shape[0]}, {hidden.shape[1]}]", list(mask.shape))
    if mask.device != hidden.device:
        _fail(name, f"device {hidden.device} like the input", mask.device)


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")
