"""A case of the fixtures as the checkpoint folder that the authors' code would have saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlavaNextImageProcessorPil, PreTrainedTokenizerFast

OFFICIAL_IMAGE = -200


def cuts_crops() -> bool:
    """Whether LLaVA-NeXT's image processor is there: older transformers import it with torchvision."""
    try:
        LlavaNextImageProcessorPil()
    except ImportError:
        return False
    return True


# a parameter of tests that convert a LLaVA-NeXT
NEXT_CASE = pytest.param(
    "h_next_vision_hr",
    marks=pytest.mark.skipif(not cuts_crops(), reason="this transformers needs torchvision"),
)


def words(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token N is the word tN; t0 pads."""
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0")


def as_text(ids: Tensor) -> str:
    """Official ids of one row, without padding, in `words`."""
    return " ".join("<image>" if i == OFFICIAL_IMAGE else f"t{i}" for i in ids.tolist())


def write_official(
    case: Path,
    folder: Path,
    *,
    shard_size: str = "5GB",
    pickled: bool = False,
    tokenizer: bool = True,
    tower_apart: bool = False,
) -> Path:
    """Write `case` as an official checkpoint in `folder`, and its vision tower in `folder/tower`."""
    about = json.loads((case / "config.json").read_text())
    state = load_file(case / "weights.safetensors")
    tower = folder / "tower"
    tower.mkdir(parents=True)
    clip = {**about["clip_config"], "model_type": "clip_vision_model"}
    (tower / "config.json").write_text(json.dumps(clip))
    prefix = "model.vision_tower.vision_tower."
    if tower_apart:
        apart = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        apart = {key.removeprefix(prefix): value for key, value in apart.items()}
        save_torch_state_dict(apart, tower)
    (folder / "config.json").write_text(json.dumps(about["config"]))
    save_torch_state_dict(state, folder, max_shard_size=shard_size, safe_serialization=not pickled)
    if tokenizer:
        words(about["config"]["vocab_size"]).save_pretrained(folder)
    return folder


def official_batch(case: Path) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Texts and images of a batch, without the dummy images of text-only rows, and its inputs."""
    inputs = load_file(case / "inputs.safetensors")
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    texts = [as_text(ids[valid]) for ids, valid in rows]
    images = []
    for number in range(len(inputs["image_sizes"])):
        raw = inputs.get(f"raw_images.{number}")
        if raw is not None:
            images.append(to_image(raw))
    return texts, images, inputs


def to_image(raw: Tensor) -> Any:
    """A picture from uint8 [h, w, 3]."""
    from PIL import Image

    return Image.fromarray(raw.to(torch.uint8).numpy())
