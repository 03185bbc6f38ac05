"""The model that `pmod train` builds when no checkpoint is given: LLaVA in miniature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlavaConfig


@dataclass(frozen=True)
class Preset:
    """Sizes of a from-scratch LLaVA: a SigLIP vision tower of two layers and a Llama decoder.

    Standard parts, so that the result loads like any LLaVA. With 64 x 64 pixels in patches of 8, an
    image is 64 tokens; the whole has about 2 million parameters.

    Attributes:
        image_size: pixels a side.
        patch_size: pixels a side of a patch, one token each.
        hidden_size: width of the decoder and of the vision tower.
        layers: decoder layers.
    """

    image_size: int = 64
    patch_size: int = 8
    hidden_size: int = 128
    layers: int = 8

    def config(self, tokenizer: Any, image_token_id: int) -> dict[str, Any]:
        """Fields of a `LlavaConfig` for the vocabulary of `tokenizer`."""
        heads = max(self.hidden_size // 32, 1)
        # The default deviation of 0.02 suits widths of thousands; here it lets the signal vanish.
        # About hidden_size ** -0.5 trains several times faster (docs/demo.md).
        spread = 0.7 * self.hidden_size**-0.5
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.hidden_size,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "initializer_range": spread,
        }
        text = {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": 11 * self.hidden_size // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "initializer_range": spread,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        }
        return {
            "vision_config": vision,
            "text_config": text,
            "image_token_id": image_token_id,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "initializer_range": spread,
            "tie_word_embeddings": False,
        }

    def llava_config(self, tokenizer: Any, image_token_id: int) -> LlavaConfig:
        """The config of the dense model."""
        return LlavaConfig(**self.config(tokenizer, image_token_id))
