"""The routed decoder layer: the only caller of pmod_ops.

A pre-norm layer, x -> x + attention(norm(x)) -> ... + mlp(norm(...)), run on the tokens it keeps
(p-MoD, arXiv:2412.04449). The backbone's own attention, MLP and norms do the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pmod_model.cache import RoutedCacheLayer, routed_cache_layer
from pmod_model.cache_name import find_cache
from pmod_model.configuration import PModConfig
from pmod_model.context import RoutingContext
from pmod_model.masks import attention_mask as own_mask
from pmod_model.packing import segment_arguments
from pmod_model.router import Router, ZeroGradient
from pmod_ops import Routing, gather, gather_add_rmsnorm, route_gather, weighted_scatter_add

# Norms of transformers that compute round(x * rstd) * weight, as the fused ops do.
FUSED_NORMS = frozenset(
    {
        "GraniteRMSNorm",
        "LlamaRMSNorm",
        "MistralRMSNorm",
        "Phi3RMSNorm",
        "Qwen2RMSNorm",
        "Qwen3RMSNorm",
        "Qwen3VLTextRMSNorm",
        "SmolLM3RMSNorm",
    }
)

NO_NORM = (None, 0.0)  # weight and eps for ops that only gather

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class DenseLayer(_Base):
    """Mixed into a layer without a router: it has no use for the routing context."""

    def forward(
        self, *args: Any, routing_context: RoutingContext | None = None, **kwargs: Any
    ) -> Any:
        """The backbone's forward."""
        return super().forward(*args, **kwargs)


class RoutedLayer(_Base):
    """Mixed into a decoder layer whose tokens compete for its attention.

    Attributes:
        mod_router: the router.
        pmod_config: settings of the gate.
        pmod_cache_name: see `pmod_model.cache_name`.
    """

    mod_router: Router
    pmod_config: PModConfig
    pmod_cache_name: str
    self_attn: Any
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        *,
        routing_context: RoutingContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, S, D] of all tokens in, the same out.

        With a plan, kept tokens run through the layer and skipped ones are weighted. Without one,
        all run through it.
        """
        context = routing_context or RoutingContext(None, None)
        routed = context.plan is not None
        if routed:
            return self.route_tokens(hidden_states, context, **kwargs)
        num_tokens = hidden_states.shape[1]
        router = None
        if num_tokens > 1 or torch.is_grad_enabled():
            # first, as in a routed pass: ranks of ZeRO-3 gather parameters in the order of calls
            router = self.mod_router(hidden_states)
        cache = self._own_cache(kwargs, context, num_tokens, num_tokens)
        keys = _announce(cache, hidden_states, context.valid)
        if cache is not None and cache.is_routed:
            # model-wide masks count all tokens seen, so they fit only while none was dropped
            attention_mask = own_mask(self.self_attn.config, hidden_states, **keys)
        out = super().forward(
            hidden_states, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        if router is not None and torch.is_grad_enabled():
            # last, as the op that scatters: checkpointing replays a layer up to what is saved last
            out = ZeroGradient.apply(out, *router)
        return out

    def route_tokens(
        self,
        x: Tensor,
        context: RoutingContext,
        *,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """One routed pass over x [B, S, D]; `context.plan` must know this layer."""
        config, layer = self.pmod_config, self.self_attn.layer_idx
        plan, hand_over = context.plan, context.hand_over
        assert plan is not None
        weight, bias = self.mod_router(x)
        norm = fused_norm(self.input_layernorm, x)
        # every op hands x on to the next, so that its gradient is summed in one buffer
        routing, rows, x = route_gather(
            x,
            weight,
            bias,
            plan,
            layer,
            *(norm or NO_NORM),
            gate_scale=config.gate_scale,
            gate_bias=config.gate_bias,
            activation=config.gate_activation,
            logits=None if hand_over is None else hand_over.take(x, (weight, bias)),
            layout="packed" if context.packed else "padded",
            return_x=True,
        )
        if context.record is not None:
            context.record.add(layer, routing)
        ragged = len(set(plan.kept_per_sequence(layer))) > 1
        # attention takes sequences [B, slots, D], or all of a packed batch as one row
        batch = rows[None] if context.packed else rows
        num_slots = batch.shape[1]
        cache = self._own_cache(kwargs, context, num_slots, x.shape[1])
        kwargs |= self._attention_arguments(batch, routing, cache, ragged)
        if cache is not None:
            cache.drop(num_slots, plan.kind.view(x.shape[:2]))
        if num_slots == 0:  # attention modules cannot be called without tokens
            return self._scatter(x, rows, rows, routing, context)
        # position_ids would have gaps, which masks for packed batches take for new sequences
        attn_out = self.self_attn(
            hidden_states=batch if norm is not None else self.input_layernorm(batch),
            position_ids=None,
            position_embeddings=gather_positions(position_embeddings, routing, x.shape[:2]),
            **kwargs,
        )[0]
        attn_out = self._scaled(attn_out, "resid_attn_dropout").reshape(rows.shape)
        residual, rows, x = self._add_and_norm(x, attn_out, routing)
        update = self._scaled(self.mlp(rows.reshape(batch.shape)), "resid_mlp_dropout")
        return self._scatter(x, residual, update.reshape(rows.shape).to(x.dtype), routing, context)

    def _scatter(
        self, x: Tensor, residual: Tensor, update: Tensor, routing: Routing, context: RoutingContext
    ) -> Tensor:
        config, hand_over, next_router = self.pmod_config, context.hand_over, None
        if hand_over is not None:
            next_router = hand_over.next_router(self.self_attn.layer_idx, x)
        record = context.record
        finite = None if record is None else record.finite_on(x.device)
        out = weighted_scatter_add(
            x,
            residual,
            update,
            routing,
            gate_mlp=config.gate_mlp,
            scale_skipped=config.scale_skipped,
            next_router=next_router,
            finite=finite,
        )
        if record is not None and finite is not None and finite is not record.finite:
            record.finite.logical_and_(finite.to(record.finite.device))
        if hand_over is None or next_router is None:
            return out
        out, next_logits = out
        hand_over.give(next_logits, out, next_router)
        return out

    def _add_and_norm(
        self, x: Tensor, attn_out: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn_out = attn_out.to(x.dtype)  # under autocast the attention has another dtype
        norm = fused_norm(self.post_attention_layernorm, x)
        if norm is not None:
            return gather_add_rmsnorm(x, attn_out, routing, *norm, return_x=True)
        kept, x = gather(x, routing, return_x=True)
        # attention leaves anything in filler slots, and their gradient must not pass through it
        filler = None if routing.mask is None else ~routing.mask[..., None]
        residual = kept + (attn_out if filler is None else attn_out.masked_fill(filler, 0))
        return residual, self.post_attention_layernorm(residual), x

    def _scaled(self, branch: Tensor, dropout: str) -> Tensor:
        """What some backbones do to a branch before they add it (Phi-3, Granite)."""
        if hasattr(self, dropout):
            branch = getattr(self, dropout)(branch)
        if hasattr(self, "residual_multiplier"):
            multiplier: Any = self.residual_multiplier
            branch = branch * multiplier
        return branch

    def _own_cache(
        self, arguments: dict[str, Any], context: RoutingContext, num_slots: int, num_tokens: int
    ) -> RoutedCacheLayer | None:
        name = self.pmod_cache_name
        cache = find_cache(arguments, name)
        if cache is None:
            return None
        layer = self.self_attn.layer_idx
        return routed_cache_layer(cache, layer, context, num_slots, num_tokens, name=name)

    def _attention_arguments(
        self,
        rows: Tensor,
        routing: Routing,
        cache: RoutedCacheLayer | None,
        ragged: bool,
    ) -> dict[str, Any]:
        """What tells attention which of `rows` [B or 1, slots, D] see which keys."""
        config = self.self_attn.config
        if routing.layout == "packed":
            order = torch.arange(rows.shape[1], device=rows.device)
            sequence = torch.bucketize(order, routing.cu_seqlens[1:], right=True)
            mask = own_mask(config, rows, total=rows.shape[1], sequence=sequence)
            segments = segment_arguments(routing.cu_seqlens, routing.max_kept)
            return {"attention_mask": mask, **segments}
        keys = _announce(cache, rows, routing.mask if ragged else None)
        return {"attention_mask": own_mask(config, rows, **keys)}


def _announce(cache: RoutedCacheLayer | None, rows: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """Tell the cache of the keys of `rows`; past keys, all keys, and which of all are real."""
    num_slots = rows.shape[1]
    if cache is None:
        return {"past": 0, "total": num_slots, "valid": valid}
    past, total = cache.past_length, cache.total_length(num_slots)
    return {"past": past, "total": total, "valid": cache.extend(valid, num_slots, like=rows)}


def fused_norm(norm: nn.Module, x: Tensor) -> tuple[Tensor, float] | None:
    """Weight and eps for the fused ops, or None if only calling `norm` gives what it computes."""
    untouched = (
        type(norm).__name__ in FUSED_NORMS
        and type(norm).__module__.startswith("transformers.")
        and "forward" not in vars(norm)  # offloading and kernel libraries replace it
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and not norm._backward_hooks
        and not norm._backward_pre_hooks
    )
    if not untouched:
        return None
    weight: Any = norm.weight
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != x.dtype:
        return None
    epsilon: Any = norm.variance_epsilon
    return weight, float(epsilon)


def gather_positions(embeddings: Any, routing: Routing, shape: tuple[int, ...]) -> Any:
    """Rotary tables of the kept tokens, each [..., B or 1, S, d] -> [..., B, slots, d].

    Args:
        embeddings: the tables, or None.
        routing: the kept tokens.
        shape: (B, S) of the batch, in which a packed one is a single row.
    """
    if embeddings is None:
        return None
    batch, length = shape
    rows = routing.index.clamp(min=0).long().view(batch, -1)

    def take(table: Tensor) -> Tensor:
        if table.shape[-3] == 1:  # the same positions in every sequence
            return table.squeeze(-3)[..., rows % length, :]
        return table.flatten(-3, -2)[..., rows, :]

    return tuple(take(table) for table in embeddings)
