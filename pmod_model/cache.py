"""Key-value caches of routed layers: physically short, logically as long as the sequence.

A routed layer stores the keys of the tokens it kept, so its cache is shorter than that of a dense
layer. Everything outside the layer (positions, masks of dense layers, `generate`) goes on asking
for the number of tokens seen; that is the logical length. `kv_valid` tells keys from the filler of
a ragged batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from pmod_model.context import RoutingContext

ALWAYS_KEPT = 2  # in RoutingPlan.kind


class RoutedDynamicLayer(DynamicLayer):
    """A growing cache of kept tokens.

    Attributes:
        kv_valid: bool [B, physical length], False = filler; None = every key is real.
        dropped: logical minus physical length.
        settled: physical length at the end of the last routed prompt.
        prompt: uint8 [B, S], the kinds of its tokens (see `RoutingPlan`).
    """

    kv_valid: Tensor | None = None
    dropped: int = 0
    settled: int = 0
    prompt: Tensor | None = None

    @property
    def is_routed(self) -> bool:
        """Whether masks in logical space no longer fit this layer."""
        return self.settled > 0 or self.dropped > 0

    @property
    def past_length(self) -> int:
        """Physical length."""
        return super().get_seq_length()

    def total_length(self, num_slots: int) -> int:
        """Keys that attention sees once `num_slots` more are stored."""
        return self.past_length + num_slots

    def extend(self, valid: Tensor | None, num_slots: int, like: Tensor) -> Tensor | None:
        """Announce the keys of the next `update`.

        Args:
            valid: bool [B, num_slots], which of the slots hold a token; None = all.
            num_slots: keys per sequence that `update` will append.
            like: a tensor of the batch, for its size and device.

        Returns:
            `kv_valid` with the new slots.
        """
        if valid is not None or self.kv_valid is not None:
            past = self.kv_valid
            if past is None:
                past = like.new_ones(like.shape[0], self.past_length, dtype=torch.bool)
            if valid is None:
                valid = like.new_ones(like.shape[0], num_slots, dtype=torch.bool)
            self.kv_valid = torch.cat((past, valid), dim=1)
        return self.kv_valid

    def drop(self, num_slots: int, prompt: Tensor) -> None:
        """Note that the next `update` is a routed prompt: kinds of its tokens, uint8 [B, S]."""
        self.dropped += prompt.shape[1] - num_slots
        self.settled = self.past_length + num_slots
        self.prompt = prompt

    def get_seq_length(self) -> int:
        """Logical length."""
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask in logical space."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.kv_valid = None
        self.is_initialized = False
        self.dropped = self.settled = 0
        self.prompt = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: -n removes n; n > 0 leaves n, as in older transformers.

        Raises:
            ValueError: tokens would have to go that competed in a routed prompt; which of them were
                kept is not recorded.
        """
        length = self.get_seq_length()
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        if remove == 0 or not self.is_initialized:
            return
        from_prompt = max(remove - (self.past_length - self.settled), 0)
        if from_prompt > 0:
            self._shorten_prompt(from_prompt, remove)
        keys: Any = self.keys
        values: Any = self.values
        self.keys, self.values = keys[..., :-remove, :], values[..., :-remove, :]
        self._map_valid(lambda valid: valid[:, :-remove])

    def _shorten_prompt(self, count: int, remove: int) -> None:
        """Take the last `count` tokens from the routed prompt: text, which was kept, may go.

        Assisted generation gives the prompt and its first guesses to one forward pass.
        """
        tail = 0
        if self.prompt is not None:
            kept_in_all = (self.prompt == ALWAYS_KEPT).all(dim=0).flip(0)
            tail = int(kept_in_all.long().cumprod(0).sum())
        if self.prompt is None or count > tail:
            raise ValueError(
                f"crop: expected to remove at most {remove - count + tail} tokens, those after the"
                f" last image token, got {remove}"
            )
        self.prompt = self.prompt[:, :-count]
        self.settled -= count

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select sequences, for beam search."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)
        self._map_valid(lambda valid: valid.index_select(0, beam_idx.to(valid.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)
        self._map_valid(lambda valid: valid.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        if self.is_initialized:
            super().batch_select_indices(indices)
        self._map_valid(lambda valid: valid[indices])

    def _map_valid(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.kv_valid is not None:
            self.kv_valid = change(self.kv_valid)


class RoutedStaticLayer(StaticLayer):
    """A cache of fixed size: what is left of the logical size after the prompt dropped its share.

    Attributes:
        logical_max: tokens that the whole cache can stand for.
        kv_valid: bool [B, max_cache_len], False = empty or filler; None before the first prompt.
        dropped: logical minus physical length, on the device, so that decoding stays one graph.
        is_routed: whether masks in logical space no longer fit this layer.
    """

    logical_max: int
    dropped: Tensor
    kv_valid: Tensor | None = None
    is_routed: bool = False

    @property
    def past_length(self) -> Tensor:
        """Physical length."""
        return self.cumulative_length

    def total_length(self, num_slots: int) -> int:
        """Keys that attention sees."""
        return self.max_cache_len

    def extend(self, valid: Tensor | None, num_slots: int, like: Tensor) -> Tensor:
        """See `RoutedDynamicLayer.extend`."""
        if self.kv_valid is None:
            self.cumulative_length = self.cumulative_length.to(like.device)
            self.dropped = self.dropped.to(like.device)
            slots = torch.arange(self.max_cache_len, device=like.device)
            self.kv_valid = (slots < self.cumulative_length).repeat(like.shape[0], 1)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.kv_valid)
                torch._dynamo.mark_static_address(self.dropped)
        if valid is None:
            valid = like.new_ones(like.shape[0], num_slots, dtype=torch.bool)
        slots = torch.arange(num_slots, device=like.device) + self.cumulative_length
        self.kv_valid.index_copy_(1, slots, valid)
        return self.kv_valid

    def drop(self, num_slots: int, prompt: Tensor) -> None:
        """See `RoutedDynamicLayer.drop`."""
        self.is_routed = True
        self.dropped.add_(prompt.shape[1] - num_slots)

    def get_seq_length(self) -> Any:
        """Logical length."""
        seen = self.is_initialized or self.is_routed
        return self.cumulative_length + self.dropped if seen else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask in logical space."""
        return self.logical_max, 0

    def get_max_length(self) -> int:
        """Tokens that the cache can stand for."""
        return self.logical_max

    get_max_cache_shape = get_max_length  # its name in older transformers

    def reset(self) -> None:
        """Forget everything; the next prompt decides the physical size anew."""
        self.keys = self.values = self.kv_valid = None
        self.is_initialized = self.is_routed = False
        self.max_cache_len = self.logical_max
        self.cumulative_length.zero_()
        self.dropped.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select sequences, for beam search."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)
        if self.kv_valid is not None:
            self.kv_valid.copy_(self.kv_valid.index_select(0, beam_idx.to(self.kv_valid.device)))


RoutedCacheLayer = RoutedDynamicLayer | RoutedStaticLayer


def routed_cache_layer(
    cache: Any,
    layer: int,
    context: RoutingContext,
    num_slots: int,
    num_tokens: int,
    *,
    name: str = "cache",
) -> RoutedCacheLayer:
    """The cache of `layer`, turned into one that knows about dropped tokens.

    Raises:
        ValueError: the cache, which the caller's argument `name` gave, is of a kind whose layers
            cannot differ in length.
    """
    if not isinstance(cache, Cache) or not isinstance(getattr(cache, "layers", None), list):
        _refuse(name, "a DynamicCache or StaticCache", cache)
    if cache.offloading:
        _refuse(name, "a cache without offloading", cache)
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    own: Any = cache.layers[layer]
    kind = type(own)
    if kind is DynamicLayer:
        own.__class__ = RoutedDynamicLayer
        if context.past_valid is not None and context.past_valid.shape[1] == own.past_length > 0:
            own.kv_valid = context.past_valid
    elif kind is StaticLayer:
        own.__class__ = RoutedStaticLayer
        own.logical_max = own.max_cache_len
        own.dropped = torch.zeros_like(own.cumulative_length)
    elif kind not in (RoutedDynamicLayer, RoutedStaticLayer):
        _refuse(f"{name}.layers[{layer}]", "a DynamicLayer or StaticLayer", own)
    if isinstance(own, RoutedStaticLayer) and not own.is_initialized:
        own.max_cache_len = own.logical_max - num_tokens + num_slots
    return own


def _refuse(name: str, expected: str, got: Any) -> None:
    raise ValueError(
        f"{name}: expected {expected}, got {type(got).__name__};"
        " a routed layer needs a cache of its own length"
    )
