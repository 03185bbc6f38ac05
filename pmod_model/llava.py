"""p-MoD LLaVA-1.5 as a model type of transformers: `from_pretrained`, Auto classes, checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from pmod_model.configuration import PModConfig
from pmod_model.inject import inject_pmod


class PModLlavaConfig(LlavaConfig):
    """A `LlavaConfig` with a field `pmod`: a `PModConfig` or its dict.

    A config without it (that of a LLaVA checkpoint) gets the defaults of the paper.
    """

    model_type = "pmod_llava"

    def __init__(self, pmod: PModConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        pmod = PModConfig() if pmod is None else pmod
        pmod = pmod if isinstance(pmod, PModConfig) else PModConfig.from_dict(pmod)
        self.pmod = pmod.to_dict()
        # the config.json of a LLaVA checkpoint names its own type
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)


class PModLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-1.5 whose decoder layers skip image tokens (p-MoD, arXiv:2412.04449).

    Loads p-MoD checkpoints and plain LLaVA checkpoints; routers missing from the latter are zero.
    """

    config_class = PModLlavaConfig

    def __init__(self, config: PModLlavaConfig) -> None:
        super().__init__(config)
        inject_pmod(self, PModConfig.from_dict(config.pmod))


# on disk a LLaVA checkpoint has the key layout of the first releases
_MAPPING: Any = get_checkpoint_conversion_mapping("llava")
register_checkpoint_conversion_mapping(PModLlavaConfig.model_type, _MAPPING, overwrite=True)
AutoConfig.register(PModLlavaConfig.model_type, PModLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(
    PModLlavaConfig, PModLlavaForConditionalGeneration, exist_ok=True
)
