"""Convert whole checkpoints of the authors' p-MoD code, both ways: the command `pmod convert`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from pmod_model.convert import state_dict_from_official, state_dict_to_official
from pmod_model.folders import (
    beside,
    check_absent,
    copy_files,
    existing,
    fail,
    listed,
    read_json,
    read_weights,
    write_json,
)
from pmod_model.llava import PModLlavaForConditionalGeneration
from pmod_model.llava_next import PModLlavaNextConfig, PModLlavaNextForConditionalGeneration
from pmod_model.loading import load_pretrained
from pmod_model.official import (
    IMAGE,
    RELEASED_TOWER,
    build_processor,
    image_processor,
    model_config,
    official_config,
    released_tower,
)

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
VISION = "model.vision_tower."
DEFAULT_LENGTH = 2048  # of the authors' recipe for LLaVA-1.5


@dataclass(frozen=True)
class Converted:
    """What a conversion made: the class of the model, its number of parameters, and remarks."""

    model: str
    parameters: int
    notes: tuple[str, ...]


def from_official(source: Path, destination: Path, vision_tower: Path | None = None) -> Converted:
    """Convert an official checkpoint folder to one that `from_pretrained` and `AutoProcessor` load.

    Args:
        source: config.json, weights (safetensors or pytorch_model.bin, sharded or not), and the
            files of a tokenizer if there is one.
        destination: folder to make.
        vision_tower: folder of the CLIP model that `mm_vision_tower` names: needed for its sizes if
            it is not the released one, and for its weights if `source` has none.

    Raises:
        ValueError: keys are unknown, missing or surplus (the message lists them), the config is not
            one that transformers can express, or the destination exists.
        FileNotFoundError: a file is missing.
    """
    check_absent(destination)
    official = read_json(source / "config.json")
    state = state_dict_from_official(read_weights(source))
    if "lm_head.weight" not in state:
        fail("weights", "those of config.json", "missing: lm_head.weight")
    vision = _vision_config(official, vision_tower)
    notes = []
    if not any(key.startswith(VISION) for key in state):
        if vision_tower is None:
            fail("vision_tower", "a folder, since the checkpoint has no vision tower", None)
        state |= _vision_weights(vision_tower, vision, like=state["lm_head.weight"])
        notes.append(f"vision tower from {vision_tower}")
    rows = state["lm_head.weight"].shape[0]
    tokenizer, image_id = _tokenizer(source, rows, notes)
    config = model_config(official, vision, image_id, max(rows, image_id + 1))
    for name in (key for key in state if key.endswith(VOCABULARY)):
        state[name] = _grown(state[name], image_id + 1)
    model = _filled(config, state)
    model.generation_config = _generation_config(source, image_id, model.generation_config)
    with beside(destination) as folder:
        model.save_pretrained(folder)
        if tokenizer is None:
            image_processor(official, vision).save_pretrained(folder)
        else:
            length = official.get("tokenizer_model_max_length")
            tokenizer.model_max_length = length or tokenizer.model_max_length
            build_processor(official, config, tokenizer).save_pretrained(folder)
            copy_files(source, folder, ("tokenizer.model",))
    return Converted(type(model).__name__, model.num_parameters(), tuple(notes))


def to_official(source: Path, destination: Path, vision_tower: str | None = None) -> Converted:
    """Convert a p-MoD LLaVA-1.5 or LLaVA-NeXT of ours to a folder for the authors' code.

    The rows of the vocabulary from the placeholder of images on are left out if nothing but special
    tokens comes after it, since the official code has no such token.

    Args:
        source: a folder saved by `save_pretrained`.
        destination: folder to make.
        vision_tower: what `mm_vision_tower` shall name; None = the released tower.

    Raises:
        ValueError: the official code cannot express the model, or the destination exists.
    """
    check_absent(destination)
    model: Any = load_pretrained(source)
    known = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)
    if not isinstance(model, known):
        fail("source", " or ".join(cls.__name__ for cls in known), type(model).__name__)
    processor = None
    if any((source / name).exists() for name in TOKENIZER_FILES):
        processor = AutoProcessor.from_pretrained(source)
    tokenizer = getattr(processor, "tokenizer", None)
    rows = _official_rows(model.config, tokenizer)
    length = min(getattr(tokenizer, "model_max_length", DEFAULT_LENGTH), 10**6)
    pads = getattr(getattr(processor, "image_processor", None), "do_pad", True)
    official = official_config(model, rows, vision_tower, pads, length)
    state = state_dict_to_official(model.state_dict())
    for name in (key for key in state if key.endswith(VOCABULARY)):
        state[name] = state[name][:rows].clone()
    with beside(destination) as folder:
        save_torch_state_dict(state, folder)
        write_json(folder / "config.json", official)
        copy_files(source, folder, TOKENIZER_FILES)
        if (source / "generation_config.json").exists():
            generation = read_json(source / "generation_config.json")
            generation.pop("suppress_tokens", None)
            write_json(folder / "generation_config.json", generation)
    notes = () if tokenizer else ("no tokenizer",)
    return Converted(official["architectures"][0], sum(t.numel() for t in state.values()), notes)


def _vision_config(official: Mapping[str, Any], folder: Path | None) -> CLIPVisionConfig:
    name = official.get("mm_vision_tower")
    if folder is None and name == RELEASED_TOWER:
        return released_tower()
    if folder is None:
        fail("vision_tower", f"the folder of {name}, for its config.json", None)
    existing(folder / "config.json")
    config: Any = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if not isinstance(config, CLIPVisionConfig):
        fail("vision_tower", "a CLIP model", type(config).__name__)
    return config


def _vision_weights(folder: Path, config: CLIPVisionConfig, like: Tensor) -> dict[str, Tensor]:
    cls: Any = CLIPVisionModel
    tower, info = cls.from_pretrained(
        folder, config=config, dtype=like.dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        fail("vision_tower", "every weight", f"none for {listed(info['missing_keys'])}")
    return {VISION + key: value for key, value in tower.state_dict().items()}


def _tokenizer(source: Path, rows: int, notes: list[str]) -> tuple[Any, int]:
    """The tokenizer, which knows the placeholder of images, and the placeholder's id."""
    if not any((source / name).exists() for name in TOKENIZER_FILES):
        notes.append(f"no tokenizer in {source}: the image token is {rows}")
        return None, rows
    # config.json is of no type that transformers knows; it is not needed to load a tokenizer
    tokenizer: Any = AutoTokenizer.from_pretrained(source, config=LlamaConfig())
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token  # as the authors' code pads
    tokenizer.padding_side = "left"  # so that a batch of prompts can be continued
    return tokenizer, tokenizer.convert_tokens_to_ids(IMAGE)


def _official_rows(config: Any, tokenizer: Any) -> int:
    rows, image_id = config.text_config.vocab_size, config.image_token_id
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    words = set() if tokenizer is None else set(tokenizer.get_vocab().values())
    after = range(image_id + 1, rows)
    if tokenizer is None:
        return image_id if not after else rows
    return image_id if all(token in special or token not in words for token in after) else rows


def _grown(weight: Tensor, rows: int) -> Tensor:
    # the embedding is overwritten by image features, the output suppressed in generation
    return torch.cat((weight, weight.new_zeros(max(rows - len(weight), 0), weight.shape[1])))


def _filled(config: Any, state: dict[str, Tensor]) -> PreTrainedModel:
    is_next = isinstance(config, PModLlavaNextConfig)
    cls: Any = (
        PModLlavaNextForConditionalGeneration if is_next else PModLlavaForConditionalGeneration
    )
    with torch.device("meta"):
        model = cls(config)
    try:
        result = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        fail("weights", "the shapes of config.json", " ".join(str(error).split()))
    if result.missing_keys or result.unexpected_keys:
        missing, surplus = listed(result.missing_keys), listed(result.unexpected_keys)
        fail("weights", "those of config.json", f"missing: {missing}; surplus: {surplus}")
    return model.eval()


def _generation_config(source: Path, image_id: int, default: Any) -> GenerationConfig:
    config: Any = default
    if (source / "generation_config.json").exists():
        values = read_json(source / "generation_config.json")
        if not values.get("do_sample"):  # Vicuna's has a temperature all the same
            values = {k: v for k, v in values.items() if k not in ("temperature", "top_p", "top_k")}
        config = GenerationConfig(**values)
    config.suppress_tokens = [image_id]
    return config
