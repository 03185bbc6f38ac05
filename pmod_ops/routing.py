"""The result of routing one layer: the rows it keeps, where they go, how they are weighted."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Layout = Literal["packed", "padded"]


@dataclass(frozen=True, eq=False)
class RouterGradient:
    """The inputs of a gate, kept so that a backward pass that visits a row can go on to the router.

    It is used only while `gate` is still the gate of the routing, and for the very x that was
    returned with it, unchanged (`chain`, `version`): anything else gets its gradient the ordinary
    way. It is never used under torch.compile, where neither can be checked.
    """

    weight: Tensor
    bias: Tensor | None
    logits: Tensor
    gate: Tensor
    gate_scale: float
    activation: int
    chain: object
    version: int


@dataclass(frozen=True, eq=False)
class Carry:
    """Stand-ins for x whose gradients reach `route_gather` by the shortest way.

    They have a shape and a place in the graph, but no memory. The gradient of `kept` [slots, D] is
    that of the gathered rows of x; the gradient of `skipped`, shaped like x, is that of the other
    rows, and what its kept rows hold is ignored. So no reader of x has to add to, or even zero,
    rows that are not its own. Used only for the x returned with the routing, unchanged (`chain`,
    `version`), and for the selection it was made with (`index`, `inverse`).
    """

    kept: Tensor
    skipped: Tensor
    index: Tensor
    inverse: Tensor
    chain: object
    version: int


@dataclass(frozen=True, eq=False)
class Routing:
    """The rows one layer keeps. Made by `route` and `route_gather`; read by every other op.

    A slot is a place in the gathered tensor. Packed: the slots are the kept rows, ascending.
    Padded: the slots are [B, max_kept], right aligned, and a slot without a row (filler) has index
        -1.

    Attributes:
        index: int32 [slots], the row in each slot, -1 = filler. Gather position ids with it.
        inverse: int32 [N], the slot of each row, -1 = not kept.
        logits: fp32 [N] (fp64 for fp64 rows), router scores; 0 on rows that are not routable.
        gate: like logits; exactly 1, with zero gradient, on rows that are not routable.
        cu_seqlens: int32 [B + 1], offsets of the kept rows of each sequence in the packed layout.
        kind: uint8 [N], as in the plan.
        num_sequences: B.
        max_kept: kept rows of the longest sequence, on the host (`max_seqlen` of flash-attn).
        layout: "packed" or "padded".
        router: set by `return_x=True`, see `RouterGradient`.
        carry: set by `route_gather(return_x=True)`, see `Carry`.
    """

    index: Tensor
    inverse: Tensor
    logits: Tensor
    gate: Tensor
    cu_seqlens: Tensor
    kind: Tensor
    num_sequences: int
    max_kept: int
    layout: Layout = "packed"
    router: RouterGradient | None = None
    carry: Carry | None = None

    @property
    def mask(self) -> Tensor | None:
        """Boolean [B, max_kept], True = a kept row, False = filler; None in the packed layout."""
        if self.layout == "packed":
            return None
        return (self.index >= 0).view(self.num_sequences, self.max_kept)

    def padded(self) -> Routing:
        """The same selection in the padded layout."""
        if self.layout == "padded":
            return self
        slots = self.num_sequences * self.max_kept
        order = torch.arange(self.index.shape[0], device=self.index.device, dtype=torch.int32)
        sequence = torch.bucketize(order, self.cu_seqlens[1:], right=True)
        slot = order + (sequence + 1) * self.max_kept - self.cu_seqlens[sequence + 1]
        index = self.index.new_full((slots,), -1).scatter(0, slot, self.index)
        # packed slots ascend with the rows, so the kept rows take the padded slots in order
        inverse = self.inverse.masked_scatter(self.inverse >= 0, slot.to(torch.int32))
        return replace(self, index=index, inverse=inverse, layout="padded", carry=None)

    def rows(self, slots: Tensor) -> Tensor:
        """View [slots, D] as this layout's [K, D] or [B, max_kept, D]."""
        if self.layout == "packed":
            return slots
        return slots.view(self.num_sequences, self.max_kept, slots.shape[-1])


_TENSORS = ("index", "inverse", "logits", "gate", "cu_seqlens", "kind")


def _flatten(routing: Routing) -> tuple[list[Any], Any]:
    leaves = [getattr(routing, name) for name in _TENSORS]
    return leaves, (routing.num_sequences, routing.max_kept, routing.layout)


def _flatten_with_keys(routing: Routing) -> tuple[list[Any], Any]:
    leaves, context = _flatten(routing)
    keys = [pytree.GetAttrKey(name) for name in _TENSORS]
    return list(zip(keys, leaves, strict=True)), context


def _unflatten(leaves: Any, context: Any) -> Routing:
    return Routing(*leaves, *context)


pytree.register_pytree_node(
    Routing,
    _flatten,
    _unflatten,
    serialized_type_name="pmod_ops.Routing",
    to_dumpable_context=json.dumps,
    from_dumpable_context=lambda text: tuple(json.loads(text)),
    flatten_with_keys_fn=_flatten_with_keys,
)
