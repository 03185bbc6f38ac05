"""Tiny models and batches, and an oracle that shares no code with the routed layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from pmod_model import PModConfig, inject_pmod

IMAGE, PAD = 120, 0
IMAGE_TOKENS = 16
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": PAD,
    "eos_token_id": None,
    "bos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
RATIOS = [1.0, 0.5, 0.25, 0.1]


def make_opinionated(model: Any, seed: int = 1) -> Any:
    """Weights that give every token another score and every step a clear winner."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "mod_router" in name:
                parameter.normal_(0, 1, generator=generator)
            elif parameter.ndim == 2 and ("language_model" in name or "model.layers" in name):
                parameter.normal_(0, 0.12, generator=generator)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    def make(attention: str = "sdpa", **fields: Any) -> Any:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**TEXT))
        model.set_attn_implementation(attention)
        inject_pmod(model, PModConfig(**{"schedule": RATIOS, **fields}))
        return make_opinionated(model)

    return make


def llava_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )


@pytest.fixture
def make_llava() -> Callable[..., Any]:
    def make(attention: str = "sdpa", **fields: Any) -> Any:
        torch.manual_seed(0)
        model: Any = LlavaForConditionalGeneration(llava_config())
        inject_pmod(model, PModConfig(**{"schedule": RATIOS, **fields}))
        model.set_attn_implementation(attention)
        make_opinionated(model)
        model.generation_config.suppress_tokens = [IMAGE]
        return model

    return make


@pytest.fixture
def ragged_batch() -> dict[str, Tensor]:
    """Left padded: one image, two images, text only."""
    image = [IMAGE] * IMAGE_TOKENS
    rows = [
        [5, 6, *image, 7, 8, 9, 10],
        [11, *image, 12, 13, *image, 14],
        [20, 21, 22, 23, 24, 25],
    ]
    return pad_left(rows, images=3)


@pytest.fixture
def one_image_each() -> dict[str, Tensor]:
    """Left padded, one image in both rows: beam search repeats images with their rows."""
    image = [IMAGE] * IMAGE_TOKENS
    return pad_left([[5, 6, *image, 7, 8], [11, 12, 13, *image, 14, 15, 16]], images=2)


def pad_left(rows: list[list[int]], images: int) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    pixels = torch.randn(images, 3, 56, 56, generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


@dataclass
class Oracle:
    """The model on all tokens in every layer: skipped keys are masked, skipped outputs discarded."""

    model: Any

    def __call__(
        self,
        embeddings: Tensor,
        target: Tensor,
        valid: Tensor | None = None,
        pools: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [B, S, V], and the competing tokens [B, S] that each routed layer keeps."""
        decoder = getattr(self.model.model, "language_model", self.model.model)
        valid = torch.ones_like(target) if valid is None else valid.bool()
        target = target & valid
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
        rotary = decoder.rotary_emb(embeddings, positions)
        x, kept = embeddings, {}
        for index, layer in enumerate(decoder.layers):
            if index not in decoder.pmod_ratios:
                residual, update = self.block(layer, x, valid, rotary)
                x = residual + update
                continue
            logits = (x @ layer.mod_router.weight[0] + layer.mod_router.bias).masked_fill(
                ~target, 0
            )
            gate = torch.where(target, 0.2 * torch.tanh(logits) + 1, 1)[..., None]
            kept[index] = self.select(logits, target, decoder.pmod_ratios[index], pools)
            keep = kept[index] | (valid & ~target)
            residual, update = self.block(layer, x, keep, rotary)
            x = torch.where(keep[..., None], residual + gate * update, gate * x)
        return self.model.lm_head(decoder.norm(x)), kept

    def select(self, logits: Tensor, target: Tensor, ratio: float, pools: Tensor | None) -> Tensor:
        keep = torch.zeros_like(target)
        for row in range(len(target)):
            ids = torch.zeros_like(target[row], dtype=torch.int32) if pools is None else pools[row]
            for pool in ids[target[row]].unique():
                rows = (target[row] & (ids == pool)).nonzero()[:, 0]
                k = int(torch.tensor(float(len(rows))) * torch.tensor(ratio))
                order = logits[row, rows].sort(descending=True, stable=True).indices
                keep[row, rows[order[:k]]] = True
        return keep

    def block(
        self, layer: Any, x: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        attention, batch, length = layer.self_attn, *x.shape[:2]
        normed = layer.input_layernorm(x)
        heads = [
            projection(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key = apply_rotary_pos_emb(heads[0], heads[1], *rotary)
        key, value = (repeat_kv(t, attention.num_key_value_groups) for t in (key, heads[2]))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        scores = query @ key.transpose(-1, -2) * attention.scaling
        scores = scores.masked_fill(~(causal & keys[:, None, None, :]), -1e30).softmax(-1)
        mixed = (scores @ value).transpose(1, 2).reshape(batch, length, -1)
        residual = x + attention.o_proj(mixed)
        return residual, layer.mlp(layer.post_attention_layernorm(residual))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Embeddings with image features in their places."""
        embeddings = self.model.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        features = self.model.model.get_image_features(pixel_values=pixel_values, return_dict=True)
        images = torch.cat(list(features.pooler_output)).to(embeddings.dtype)
        return embeddings.masked_scatter((input_ids == IMAGE)[..., None], images)

    @torch.no_grad()
    def greedy(self, inputs: dict[str, Tensor], steps: int) -> Tensor:
        """[B, S + steps] without any cache."""
        ids, valid = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(steps):
            embeddings = self.embed(ids, inputs["pixel_values"])
            logits = self(embeddings, ids == IMAGE, valid)[0][:, -1]
            logits[:, IMAGE] = -torch.inf
            token = logits.argmax(-1, keepdim=True)
            ids, valid = torch.cat((ids, token), 1), torch.cat((valid, torch.ones_like(token)), 1)
        return ids


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle
