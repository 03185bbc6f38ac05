"""What the model classes of a backbone learn when p-MoD is injected into them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from pmod_model.cache_name import find_cache
from pmod_model.configuration import PModConfig
from pmod_model.context import RoutingRecord, make_context
from pmod_model.images import ImageTokens, embed_cut_images, find_images
from pmod_model.packing import Packing, apart_from_vision, find_packing, packed_inputs
from pmod_model.recompute import SavesSelection
from pmod_model.router import Router
from pmod_model.targets import derive_target_mask, has_high_resolution, has_mrope

VAR_KEYWORD = Parameter.VAR_KEYWORD


class DecoderModel(SavesSelection):
    """Mixed into the text decoder: plans the routing of a batch, hands it to the layers.

    Attributes:
        pmod_config: the settings.
        pmod_ratios: retention ratio of every routed layer.
        pmod_tokens_per_image: see `pmod_model.targets.tokens_per_image`.
        pmod_cache_name: see `pmod_model.cache_name`.
    """

    pmod_config: PModConfig
    pmod_ratios: Mapping[int, float]
    pmod_tokens_per_image: int | None
    pmod_cache_name: str

    def forward(
        self,
        *args: Any,
        target_mask: Tensor | None = None,
        valid_mask: Tensor | None = None,
        pool_id: Tensor | None = None,
        text_packing: Mapping[str, Any] | None = None,
        routing_records: list[RoutingRecord] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward; tokens where `target_mask` [B, S] is True are routed.

        `pool_id`, int [B, S], says which of them share a budget where `pool` is not "sequence".
        """
        inputs = by_name(super().forward, args, kwargs) | dict(text_packing or {})
        embeddings, input_ids = inputs.get("inputs_embeds"), inputs.get("input_ids")
        hidden = embeddings if embeddings is not None else input_ids
        if hidden is None:
            return super().forward(**inputs)  # which says what is missing
        packing = None if target_mask is None else self._packing(inputs, hidden)
        if packing is not None:
            inputs |= packed_inputs(packing, inputs, has_mrope(self.config))
        layers: Any = self.layers
        context = make_context(
            self.pmod_ratios,
            hidden,
            target_mask=target_mask,
            attention_mask=inputs.get("attention_mask"),
            valid_mask=valid_mask,
            pool=self.pmod_config.pool,
            pool_id=pool_id,
            tokens_per_image=self.pmod_tokens_per_image,
            records=routing_records,
            layers=layers,
            packing=packing,
        )
        return super().forward(**inputs, routing_context=context)

    def _packing(self, inputs: Mapping[str, Any], hidden: Tensor) -> Packing | None:
        use_cache = inputs.get("use_cache")
        cached = bool(use_cache) or find_cache(inputs, self.pmod_cache_name) is not None
        caches = use_cache is None and self.config.use_cache and not self.training
        return find_packing(inputs, hidden, cached=cached, caches=caches)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            module.reset()
        else:
            super()._init_weights(module)


class MultimodalModel(SavesSelection):
    """Mixed into the model that owns the decoder: derives the target mask from the inputs."""

    pmod_config: PModConfig
    pmod_cache_name: str

    def forward(self, *args: Any, target_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's forward; a missing `target_mask` [B, S] is derived from the inputs.

        A row of LLaVA may end within an image, if it was cut to a longest length.
        """
        inputs = by_name(super().forward, args, kwargs)
        images = find_images(self, inputs)
        if target_mask is None:
            cache = find_cache(inputs, self.pmod_cache_name)
            target_mask = derive_target_mask(self.config, self.pmod_config, inputs, cache, images)
        if target_mask is not None:
            inputs["target_mask"] = target_mask
            inputs |= self._pools(images)
        if images is not None and images.cut:
            inputs = embed_cut_images(self, inputs, images)
        return super().forward(**apart_from_vision(inputs, hasattr(self, "get_rope_index")))

    def _pools(self, images: ImageTokens | None) -> dict[str, Tensor]:
        pool = self.pmod_config.pool
        if pool == "sequence":
            return {}
        if images is not None:
            return {"pool_id": images.pools(pool)}
        if has_high_resolution(self.config):
            raise ValueError(
                f'pool: expected "sequence" where the inputs do not tell which tokens of'
                f' {type(self).__name__} are of which image, got "{pool}"'
            )
        return {}


class GenerativeModel(SavesSelection):
    """Mixed into the model with the head: `forward` and `generate` accept `target_mask`."""

    pmod_config: PModConfig
    pmod_cache_name: str

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, target_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`; the target mask belongs to the prompt only."""
        backbone: Any = super()
        inputs = backbone.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        embeddings = inputs.get("inputs_embeds")
        batch, length = (embeddings if embeddings is not None else inputs["input_ids"]).shape[:2]
        mask = inputs.get("attention_mask")
        if length > 1 and mask is not None and getattr(mask, "ndim", 0) != 2:
            # a static cache comes with a mask made ready for attention: hand on the padding as well
            valid = kwargs.get("attention_mask")
            ones = torch.ones(batch, length, dtype=torch.bool, device=input_ids.device)
            inputs["valid_mask"] = ones if valid is None else valid
        if target_mask is not None and (length > 1 or kwargs.get("is_first_iteration")):
            cache = find_cache(inputs, self.pmod_cache_name)
            past = 0 if cache is None else int(cache.get_seq_length())
            # a chunk of the prompt, the prompt again without a cache, or guesses after it
            if past < target_mask.shape[1]:
                ahead = max(past + length - target_mask.shape[1], 0)
                mask = torch.nn.functional.pad(target_mask, (0, ahead))
                inputs["target_mask"] = mask[:, past : past + length]
        return inputs


def with_target_mask(
    forward: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """`forward` under the signature of `original` and a keyword argument `target_mask`.

    Trainer and `generate` read there what a model accepts.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, target_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if target_mask is not None:
            kwargs["target_mask"] = target_mask
        return forward(self, *args, **kwargs)

    signature = inspect.signature(original)
    parameters = {**signature.parameters}
    rest = [
        parameters.pop(name) for name in list(parameters) if parameters[name].kind is VAR_KEYWORD
    ]
    parameters["target_mask"] = Parameter("target_mask", Parameter.KEYWORD_ONLY, default=None)
    everything = [*parameters.values(), *rest]
    wrapper.__signature__ = signature.replace(parameters=everything)  # type: ignore[attr-defined]
    return wrapper


def by_name(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Positional and keyword arguments of `forward` as keywords."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs
