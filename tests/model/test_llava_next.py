"""LLaVA-NeXT: where its images are, which of their tokens compete."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model.conftest import IMAGE, RATIOS, TEXT, VISION, Oracle
from model.llava_next import (
    BASE,
    GRIDS,
    LENGTHS,
    SIDE,
    SIZES,
    images_of,
    make_batch,
    make_next,
    ragged_images,
    views,
)
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution

from pmod_model import (
    PModConfig,
    PModLlavaNextForConditionalGeneration,
    inject_pmod,
    load_pretrained,
    record_routing,
)
from pmod_model.images import cut_to_length, find_images, image_lengths
from pmod_model.llava_next import PModLlavaNextProcessor


@pytest.fixture
def ragged() -> dict[str, Tensor]:
    return ragged_images()


def test_lengths_are_those_of_the_features() -> None:
    model = make_next()
    assert image_lengths(model.model, SIZES) == LENGTHS
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 1200, (40, 2), generator=generator).tolist()
    pixels = torch.zeros(len(sizes), 5, 3, SIDE, SIDE)
    sizes_tensor = torch.tensor(sizes)
    with torch.no_grad():
        for most in (None, 1, 2):
            model = make_next(max_num_patches=most)
            features = model.model.get_image_features(pixels, sizes_tensor, return_dict=True)
            expected = [len(feature) for feature in features.pooler_output]
            assert image_lengths(model.model, sizes) == expected
            counts = PModLlavaNextProcessor.__new__(PModLlavaNextProcessor)
            counts.max_num_patches = most
            cells = SIDE // VISION["patch_size"]
            for size, total in zip(sizes, expected, strict=True):
                height, width = select_best_resolution(size, GRIDS)
                grid = (height // SIDE, width // SIDE)
                parts = counts._get_unpadded_features(*size, cells, cells, *grid)
                assert BASE + sum(parts) == total


def test_images_are_found(ragged: dict[str, Tensor]) -> None:
    images: Any = find_images(make_next().model, ragged)
    image, offset = views(ragged)
    assert list(images.lengths) == [*LENGTHS, LENGTHS[1]]
    assert not images.cut
    vision = ragged["input_ids"] == IMAGE
    assert torch.equal(images.vision, vision)
    got = images.place()
    assert torch.equal(got[0], image)
    assert torch.equal(got[1], offset)
    assert torch.equal(images.high_resolution(), vision & (offset >= BASE))


@pytest.mark.parametrize("tokens", ["vision", "vision_high_res", "all"])
@pytest.mark.parametrize("pool", ["sequence", "image", "frame"])
def test_targets_and_pools(
    tokens: str, pool: str, ragged: dict[str, Tensor], oracle: type[Oracle]
) -> None:
    if tokens == "all" and pool != "sequence":
        with pytest.raises(ValueError, match='pool: expected "sequence" with target_tokens "all"'):
            make_next(target_tokens=tokens, pool=pool)
        return
    model = make_next(target_tokens=tokens, pool=pool)
    image, offset = views(ragged)
    vision, valid = ragged["input_ids"] == IMAGE, ragged["attention_mask"].bool()
    high = vision & (offset >= BASE)
    target = {"vision": vision, "vision_high_res": high, "all": valid}[tokens]
    pools = {"sequence": None, "image": image, "frame": 2 * image + high}[pool]
    features = model.model.get_image_features(
        ragged["pixel_values"], ragged["image_sizes"], return_dict=True
    )
    embeddings = model.get_input_embeddings()(ragged["input_ids"])
    rows = torch.cat(list(features.pooler_output))
    embeddings = embeddings.masked_scatter(vision[..., None], rows)
    with torch.no_grad(), record_routing(model) as records:
        logits = model(**ragged).logits
        expected, kept = oracle(model)(embeddings, target, ragged["attention_mask"], pools)
    assert torch.equal(records[0].target_mask, target)
    assert {layer: mask.tolist() for layer, mask in records[0].kept.items()} == {
        layer: mask.tolist() for layer, mask in kept.items()
    }
    # float32 sums in another order, through four layers
    assert (logits - expected)[valid].abs().max() <= 1e-5 * expected[valid].abs().max()


def test_padding_on_the_left_changes_nothing(ragged: dict[str, Tensor]) -> None:
    model = make_next(target_tokens="vision_high_res", pool="image")
    valid = ragged["attention_mask"].bool()
    rows = [row[mask].tolist() for row, mask in zip(ragged["input_ids"], valid, strict=True)]
    left = make_batch(rows, ragged["image_sizes"].tolist(), left=True)
    left["pixel_values"] = ragged["pixel_values"]
    with torch.no_grad():
        right_logits = model(**ragged).logits[valid]
        left_logits = model(**left).logits[left["attention_mask"].bool()]
    assert (left_logits - right_logits).abs().max() <= 1e-5 * right_logits.abs().max()


def test_generation_equals_repeated_forward_passes(ragged: dict[str, Tensor]) -> None:
    model = make_next(target_tokens="vision_high_res")
    prompt = {name: value[-1:] for name, value in ragged.items()}
    valid = prompt["attention_mask"].bool()
    prompt["input_ids"] = prompt["input_ids"][valid][None]
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    with record_routing(model) as records:
        out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert [int(record.target_mask.sum()) for record in records] == [LENGTHS[1] - BASE]
    ids = prompt["input_ids"]
    logits = model(**prompt, use_cache=False).logits[:, -1]
    logits[:, IMAGE] = -torch.inf
    assert out[0, ids.shape[1]] == logits.argmax()


def test_text_alone_is_dense() -> None:
    model = make_next(target_tokens="vision_high_res", pool="frame")
    ids = torch.tensor([[5, 6, 7, 8]])
    with record_routing(model) as records:
        model(input_ids=ids)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert records == []


def test_what_cannot_be_told_is_refused(ragged: dict[str, Tensor]) -> None:
    model = make_next(target_tokens="vision_high_res")
    embeddings = model.get_input_embeddings()(ragged["input_ids"]).detach()
    rest = {name: ragged[name] for name in ("pixel_values", "image_sizes")}
    with pytest.raises(ValueError, match="target_mask: expected bool"):
        model(inputs_embeds=embeddings, **rest)
    with pytest.raises(ValueError, match=r"target_mask: expected bool .* of high resolution"):
        model(**ragged, vision_feature_layer=-1)
    target = ragged["input_ids"] == IMAGE
    with pytest.raises(ValueError, match='pool: expected "sequence" where the inputs do not tell'):
        make_next(pool="frame")(inputs_embeds=embeddings, target_mask=target)
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        cut_to_length(model, ragged, 0)
    ragged["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask: expected padding on the right, got left"):
        cut_to_length(model, ragged, 5)


def test_round_trip_is_bit_equal(ragged: dict[str, Tensor], tmp_path: Path) -> None:
    model = make_next(max_num_patches=2, target_tokens="vision_high_res", pool="frame")
    lengths = image_lengths(model.model, SIZES)
    rows = [[5, *images_of(lengths[0]), 6], [7, *images_of(lengths[1]), 8, 9]]
    batch = make_batch(rows, SIZES)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    for load in (
        PModLlavaNextForConditionalGeneration.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
        load_pretrained,
    ):
        again: Any = load(tmp_path)
        assert type(again).__name__ == "PModLlavaNextForConditionalGeneration"
        assert again.pmod_config == model.pmod_config
        assert again.config.max_num_patches == 2
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert torch.equal(again(**batch).logits, expected)


def test_a_llava_next_checkpoint_loads_with_zero_routers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            image_grid_pinpoints=GRIDS,
        )
    )
    base.save_pretrained(tmp_path)
    cls: Any = PModLlavaNextForConditionalGeneration
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    routers = {name for name, _ in model.named_parameters() if "mod_router" in name}
    assert set(info["missing_keys"]) == routers
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert not any(state[name].any() for name in routers)
    assert model.config.model_type == "pmod_llava_next"


def test_an_injected_backbone_knows_its_views(ragged: dict[str, Tensor]) -> None:
    own = make_next(target_tokens="vision_high_res", pool="frame")
    base: Any = LlavaNextForConditionalGeneration(own.config)
    settings = PModConfig(schedule=RATIOS, target_tokens="vision_high_res", pool="frame")
    model = inject_pmod(base, settings).eval()
    model.load_state_dict(own.state_dict())
    with torch.no_grad():
        assert torch.equal(model(**ragged).logits, own(**ragged).logits)
