"""p-MoD LLaVA-NeXT as a model type of transformers: `from_pretrained`, Auto classes, processor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from pmod_model.configuration import PModConfig
from pmod_model.inject import inject_pmod


class PModLlavaNextConfig(LlavaNextConfig):
    """A `LlavaNextConfig` with two fields more.

    Attributes:
        pmod: a `PModConfig` or its dict; a config without it (that of a LLaVA-NeXT checkpoint) gets
            the defaults of the paper.
        max_num_patches: shrink the high-resolution map of an image to about so many crops
            (`anyres_max` of LLaVA); None keeps its resolution.
    """

    model_type = "pmod_llava_next"

    def __init__(
        self,
        pmod: PModConfig | dict[str, Any] | None = None,
        max_num_patches: int | None = None,
        **kwargs: Any,
    ) -> None:
        pmod = PModConfig() if pmod is None else pmod
        pmod = pmod if isinstance(pmod, PModConfig) else PModConfig.from_dict(pmod)
        self.pmod = pmod.to_dict()
        self.max_num_patches = max_num_patches
        # the config.json of a LLaVA-NeXT checkpoint names its own type
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)


class PModLlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT whose decoder layers skip image tokens (p-MoD, arXiv:2412.04449).

    Loads p-MoD checkpoints and plain LLaVA-NeXT checkpoints; routers missing from the latter are
    zero.
    """

    config_class = PModLlavaNextConfig

    def __init__(self, config: PModLlavaNextConfig) -> None:
        super().__init__(config)
        if config.max_num_patches is not None:
            model: Any = self.model
            model.__class__ = _ShrinkingModel
        inject_pmod(self, PModConfig.from_dict(config.pmod))


class PModLlavaNextProcessor(LlavaNextProcessor):
    """A `LlavaNextProcessor` that counts the image tokens of a model with `max_num_patches`."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        max_num_patches: int | None = None,
        **kwargs: Any,
    ) -> None:
        # named one by one, because transformers saves what it finds in the signature
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.max_num_patches = max_num_patches

    @property
    def vision_aspect_ratio(self) -> str:
        """The name of that setting in LLaVA-OneVision."""
        return f"anyres_max_{self.max_num_patches}"

    def _get_unpadded_features(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        shrinks = self.max_num_patches is not None
        counting: Any = LlavaOnevisionProcessor if shrinks else LlavaNextProcessor
        return counting._get_unpadded_features(self, *args, **kwargs)


class _ShrinkingModel(LlavaNextModel):
    """Packs features as LLaVA-OneVision does, which shrinks high-resolution maps; else the same."""

    def pack_image_features(
        self,
        image_features: Any,
        image_sizes: Any,
        vision_feature_select_strategy: str,
        image_newline: Tensor | None = None,
    ) -> Any:
        packing: Any = LlavaOnevisionModel.pack_image_features
        most = f"anyres_max_{self.config.max_num_patches}"
        return packing(self, image_features, image_sizes, image_newline, vision_aspect_ratio=most)


# on disk a LLaVA-NeXT checkpoint has the key layout of the first releases
_MAPPING: Any = get_checkpoint_conversion_mapping("llava_next")
register_checkpoint_conversion_mapping(PModLlavaNextConfig.model_type, _MAPPING, overwrite=True)
AutoConfig.register(PModLlavaNextConfig.model_type, PModLlavaNextConfig, exist_ok=True)
AutoProcessor.register(PModLlavaNextConfig, PModLlavaNextProcessor, exist_ok=True)
AutoModelForImageTextToText.register(
    PModLlavaNextConfig, PModLlavaNextForConditionalGeneration, exist_ok=True
)
