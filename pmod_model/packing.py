"""Packed batches: sequences one after another in a single row, without padding.

As for the backbone, `cu_seq_lens_q` and `cu_seq_lens_k` tell where sequences begin, or positions do
that start over. Every sequence is routed by itself (p-MoD, arXiv:2412.04449).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from pmod_ops import RoutingPlan

OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")
ARGUMENTS = (*OFFSETS, "max_length_q", "max_length_k")
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the sequences of a packed batch are.

    Attributes:
        offsets: int32 [B + 1], the first token of every sequence, and N, on the device.
        bounds: the same on the host.
    """

    offsets: Tensor
    bounds: tuple[int, ...]

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(end - start for start, end in pairwise(self.bounds))

    def plan(
        self, target_mask: Tensor, ratios: Mapping[int, float], pool_id: Tensor | None
    ) -> RoutingPlan:
        """The plan of a batch whose tokens compete where `target_mask` [1, N] is True.

        One host synchronisation. Equal ids in `pool_id`, int [1, N], are one budget per sequence.
        """
        targets = target_mask[0]
        pools = targets.long() if pool_id is None else pool_id[0].long()
        on_host = torch.stack((targets.long(), pools)).cpu()
        target, pool = on_host[0].bool(), on_host[1]
        lengths = torch.tensor(self.bounds).diff()
        batch = len(lengths)
        sequence = torch.arange(batch).repeat_interleave(lengths)
        routable: list[Any] = torch.bincount(sequence[target], minlength=batch).tolist()
        always = (lengths - torch.tensor(routable)).tolist()
        dense = None
        if pool_id is not None:
            # ordered by sequence, then by id, as a plan counts pools
            both = torch.stack((sequence, pool), 1)[target]
            found, place, counts = torch.unique(
                both, dim=0, return_inverse=True, return_counts=True
            )
            routable = [counts[found[:, 0] == b].tolist() for b in range(batch)]
            dense = torch.zeros(len(target), dtype=torch.int32)
            dense[target] = place.int()
            dense = dense.to(targets.device)
        # kinds of a plan: 1 may be skipped, 2 may not
        kind = (2 - targets.to(torch.uint8)).contiguous()
        return RoutingPlan.from_counts(kind, self.bounds, routable, always, ratios, dense)

    def arguments(self) -> dict[str, Any]:
        """What attention for packed batches takes, for all tokens of the batch."""
        return segment_arguments(self.offsets, self.max_length)


def segment_arguments(offsets: Tensor, max_length: int) -> dict[str, Any]:
    """`offsets`, int32 [B + 1], under the names that attention functions of transformers know."""
    return dict(zip(ARGUMENTS, (offsets, offsets, max_length, max_length), strict=True))


def find_packing(
    inputs: Mapping[str, Any], hidden: Tensor, *, cached: bool, caches: bool
) -> Packing | None:
    """The sequences that the arguments of the decoder tell of, or None if rows are sequences.

    Args:
        inputs: arguments of the decoder by name.
        hidden: ids [B, N] or embeddings [B, N, D].
        cached: whether a cache is given or asked for.
        caches: whether the decoder fills one unless it is told not to.

    Raises:
        TypeError: offsets are not integers.
        ValueError: the arguments contradict each other, or a packed batch has several rows, a cache
            or an attention mask; the message names the argument.
    """
    batch, length = hidden.shape[:2]
    given = [name for name in OFFSETS if inputs.get(name) is not None]
    mask = inputs.get("attention_mask")
    positions = _text_positions(inputs.get("position_ids"))
    if not given and (cached or caches or mask is not None or positions is None):
        return None
    # transformers reads jumps in positions as new sequences, where it has no mask and no cache
    jumps = None if positions is None else _jumps(positions, length)
    if not given and jumps == (0, length):
        return None
    name = given[0] if given else "position_ids"
    if batch != 1:
        _fail(name, "one row with target_mask in a packed batch", f"{batch} rows")
    bounds = _offsets(given, inputs, length) if given else jumps
    assert bounds is not None
    if mask is not None:
        _fail("attention_mask", "None with a packed batch", f"shape {list(mask.shape)}")
    if cached:
        _fail("use_cache", "False with a packed batch", True)
    if positions is not None:
        starts = positions[0, list(bounds[:-1])]
        if jumps != bounds or bool((starts != starts[0]).any()):
            _fail("position_ids", "positions that start over with each sequence only", "others")
    return Packing(torch.tensor(bounds, dtype=torch.int32).to(hidden.device), bounds)


def packed_inputs(packing: Packing, inputs: Mapping[str, Any], mrope: bool) -> dict[str, Any]:
    """Arguments with which a decoder keeps the sequences apart, whatever its attention.

    Args:
        packing: the sequences.
        inputs: arguments of the decoder by name.
        mrope: whether it takes positions of text and three dimensions, [4, 1, N].
    """
    positions: Any = inputs.get("position_ids")
    if _text_positions(positions) is None:
        lengths = (end - start for start, end in pairwise(packing.bounds))
        text = torch.cat([torch.arange(n) for n in lengths])[None].to(packing.offsets.device)
        positions = text if positions is None else torch.cat((text[None], positions))
    if mrope and positions.ndim == 2:
        positions = positions.expand(4, *positions.shape)
    return {"position_ids": positions, "use_cache": False, **packing.arguments()}


def apart_from_vision(inputs: dict[str, Any], mrope: bool) -> dict[str, Any]:
    """Arguments of a multimodal model, in which those of packing reach the decoder only.

    The model hands its arguments to the vision tower as well, whose sequences are images.

    Args:
        inputs: arguments by name.
        mrope: whether the model would number the tokens itself, in three dimensions, as one prompt.
    """
    given = {name: inputs[name] for name in ARGUMENTS if inputs.get(name) is not None}
    if not given:
        return inputs
    if mrope and inputs.get("position_ids") is None:
        _fail("position_ids", "[4, 1, N], those of text first, with a packed batch", None)
    rest = {name: value for name, value in inputs.items() if name not in ARGUMENTS}
    return {**rest, "text_packing": given}


def _text_positions(positions: Any) -> Tensor | None:
    """Positions [B, N] that tell sequences apart; those of images in three dimensions do not."""
    if positions is None or positions.ndim == 2:
        return positions
    return positions[0] if positions.ndim == 3 and positions.shape[0] == 4 else None


def _jumps(positions: Tensor, length: int) -> tuple[int, ...]:
    """0, every token whose position does not follow that of the token before, and `length`."""
    found = (positions.diff(dim=-1) != 1).any(dim=0).nonzero()[:, 0] + 1
    return (0, *found.tolist(), length)


def _offsets(given: list[str], inputs: Mapping[str, Any], length: int) -> tuple[int, ...]:
    found = []
    for name in given:
        offsets = inputs[name]
        if not isinstance(offsets, Tensor) or offsets.dtype not in INTEGERS:
            got = getattr(offsets, "dtype", type(offsets).__name__)
            raise TypeError(f"{name}: expected an integer tensor, got {got}")
        bounds = tuple(offsets.flatten().tolist())
        expected = f"ascending offsets [sequences + 1] from 0 to {length}"
        if offsets.ndim != 1 or bounds[:1] != (0,) or bounds[-1] != length:
            _fail(name, expected, list(bounds))
        if any(start >= end for start, end in pairwise(bounds)):
            _fail(name, expected, list(bounds))
        found.append(bounds)
    if found[0] != found[-1]:
        _fail(OFFSETS[1], f"those of {OFFSETS[0]}, {list(found[0])}", list(found[-1]))
    return found[0]


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")
