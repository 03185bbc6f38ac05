"""From raw images on, models equal the authors' code on fixtures that it made.

A fixture is written as an official checkpoint, converted, and loaded with the Auto classes; its images
go through the processor that the conversion wrote. `tests/data/parity/README.md` has the details.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model.caches import cache_of
from model.official_folder import (
    NEXT_CASE,
    OFFICIAL_IMAGE,
    as_text,
    official_batch,
    write_official,
)
from model.test_parity import FOLDER, ROUTER_NOISE, assert_close
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from pmod_model import record_routing
from pmod_model.checkpoint import from_official
from pmod_model.convert import state_dict_from_official
from pmod_model.images import cut_to_length


def is_from_pixels(folder: Path) -> bool:
    file = folder / "inputs.safetensors"
    return file.exists() and "image_sizes" in load_file(file)


CASES = [
    pytest.param(path.name, marks=NEXT_CASE.marks if "next" in path.name else ())
    for path in sorted(FOLDER.iterdir())
    if path.is_dir() and is_from_pixels(path)
]
IGNORED = -100


class PixelCase:
    def __init__(self, name: str, scratch: Path) -> None:
        self.folder = FOLDER / name
        self.about = json.loads((self.folder / "config.json").read_text())
        self.vocabulary = self.about["config"]["vocab_size"]
        self.texts, self.images, self.inputs = official_batch(self.folder)
        source = write_official(self.folder, scratch / "official")
        self.converted = scratch / "converted"
        from_official(source, self.converted, vision_tower=source / "tower")
        # with torchvision installed, transformers would resize with it, to other pixels
        self.processor = AutoProcessor.from_pretrained(self.converted, backend="pil")
        self.model: Any = AutoModelForImageTextToText.from_pretrained(self.converted)
        self.batch = self.encode(self.texts, self.images)

    def load(self, file: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{file}.safetensors")

    def encode(self, texts: list[str], images: list[Any]) -> dict[str, Tensor]:
        inputs = self.processor(
            text=texts,
            images=images or None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        longest = self.about["config"]["tokenizer_model_max_length"]
        return cut_to_length(self.model, dict(inputs), longest)

    def parameters(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the row of the placeholder, which the official vocabulary lacks."""
        grown = ("embed_tokens.weight", "lm_head.weight")
        return {
            name: value[: self.vocabulary] if name.endswith(grown) else value
            for name, value in named.items()
        }


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PixelCase:
    return PixelCase(request.param, tmp_path_factory.mktemp(request.param))


def test_pixels_are_bit_equal(case: PixelCase) -> None:
    numbers = [
        i for i in range(len(case.inputs["image_sizes"])) if f"raw_images.{i}" in case.inputs
    ]
    got = case.processor.image_processor(case.images, return_tensors="pt")
    for pixels, number in zip(got["pixel_values"], numbers, strict=True):
        official = case.inputs[f"pixel_values.{number}"]
        pixels = pixels if official.ndim == 3 else pixels[: len(official)]
        assert torch.equal(pixels, official), f"image {number}"


def test_hidden_states_kept_tokens_loss_and_gradients(case: PixelCase) -> None:
    official = case.load("outputs")
    valid = official["expanded_attention_mask"]
    assert torch.equal(case.batch["attention_mask"].bool(), valid)
    case.model.zero_grad(set_to_none=True)
    with record_routing(case.model) as records:
        out = case.model(**case.batch, output_hidden_states=True, use_cache=False)
    (record,) = records
    assert torch.equal(record.target_mask, official["mod_target_mask"] & valid)
    routing = case.load("routing")
    assert record.kept.keys() == {int(layer) for layer in case.about["mod_layer_ratios"]}
    for layer, kept in record.kept.items():
        assert torch.equal(kept, routing[f"layers.{layer}.kept_target_mask"]), f"layer {layer}"
    for i, hidden in enumerate(out.hidden_states):
        expected = official.get(f"hidden_states.{i}")  # the repository has the first only
        if expected is not None:
            assert_close(hidden[valid], expected[valid], f"hidden_states.{i}")
    logits = out.logits[..., : case.vocabulary]
    assert_close(logits[valid], official["logits"][valid], "logits")
    labels = official["expanded_labels"][:, 1:].flatten()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED)
    assert_close(loss, official["loss"], "loss")

    loss.backward()
    expected = state_dict_from_official(
        {name: grad for name, grad in case.load("grads").items() if name != "inputs_embeds"}
    )
    named = dict(case.model.named_parameters())
    got = case.parameters({name: named[name].grad for name in expected})
    largest = max(grad.abs().max().item() for grad in expected.values())
    last = case.model.config.text_config.num_hidden_layers - 1
    for name, grad in expected.items():
        cancels = f".{last}.mod_router." in name or grad.abs().max() < 1e-5 * largest
        noise = ROUTER_NOISE if "mod_router" in name and cancels else 1e-4
        assert_close(got[name], grad, name, floor=noise * largest)
    outside = {name for name in named if "layers." not in name and "vision_tower" not in name}
    assert outside <= expected.keys()


def test_greedy_tokens_and_cache_lengths(case: PixelCase) -> None:
    official = case.load("generation")
    first, last = case.about["meta"]["gen_images"]
    # the fixture counts the dummy images of text-only rows, the processor gets none
    dummies = [f"raw_images.{i}" not in case.inputs for i in range(len(case.inputs["image_sizes"]))]
    images = case.images[first - sum(dummies[:first]) : last - sum(dummies[:last])]
    ids = official["input_ids"][0]
    assert int((ids == OFFICIAL_IMAGE).sum()) == len(images)
    prompt = case.encode([as_text(ids)], images)
    steps = official["tokens"].shape[1]
    with torch.no_grad():
        prefill = cache_of(case.model(**prompt, use_cache=True))
    out = case.model.generate(
        **prompt,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(out.sequences[:, -steps:], official["tokens"])
    logits = torch.stack(out.logits, 1)[..., : case.vocabulary]
    assert_close(logits, official["step_logits"], "step logits")
    for cache, lengths in (
        (prefill, official["kv_len_prefill"]),
        (cache_of(out), official["kv_len_final"]),
    ):
        assert [own.keys.shape[-2] for own in cache.layers] == lengths.tolist()
    if "final_kv.0.k" in official:  # the repository has none
        for i, own in enumerate(cache_of(out).layers):
            assert_close(own.keys, official[f"final_kv.{i}.k"], f"keys of layer {i}")
            assert_close(own.values, official[f"final_kv.{i}.v"], f"values of layer {i}")
