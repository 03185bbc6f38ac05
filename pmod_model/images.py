"""Which token of a batch is of which image of LLaVA, and of which view of it.

An image of LLaVA-NeXT is a base view (the whole image in one crop), then a high-resolution map with
an `image_newline` after each of its rows. `input_ids` hold one placeholder for all of them, so
lengths come from the features or from the model's own packing of them. No layer runs any of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import LlavaModel, LlavaNextModel

from pmod_model.targets import tokens_per_view

# overrides of how features are chosen, which the config does not know of
FEATURE_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")
REPLACED = ("input_ids", "pixel_values", "image_sizes", "mm_encoder_outputs")


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The image tokens of a batch.

    Attributes:
        vision: bool [B, S], the placeholders of images.
        lengths: tokens of each image, in the order of the placeholders.
        present: how many of them the batch has: fewer for an image in which its row was cut off.
        base: tokens of the base view of an image.
    """

    vision: Tensor
    lengths: Sequence[int]
    present: Sequence[int]
    base: int

    @property
    def cut(self) -> bool:
        """Whether a row ends within an image."""
        return self.present != self.lengths

    def place(self) -> tuple[Tensor, Tensor]:
        """For each token its image and its offset in it: int64 [B, S], 0 outside images."""
        ends = torch.tensor(self.present, device=self.vision.device).cumsum(0)
        starts = torch.nn.functional.pad(ends, (1, 0))
        order = (self.vision.flatten().cumsum(0) - 1).clamp(min=0)
        image = torch.searchsorted(ends, order, right=True).clamp(max=len(self.present) - 1)
        offset = order - starts[image]
        placed = torch.stack((image, offset)).view(2, *self.vision.shape) * self.vision
        return placed[0], placed[1]

    def high_resolution(self) -> Tensor:
        """Bool [B, S], the tokens of high-resolution maps, newlines included."""
        return self.vision & (self.place()[1] >= self.base)

    def pools(self, pool: str) -> Tensor:
        """Int32 [B, S]: the image, or for "frame" the view, of each token."""
        image, offset = self.place()
        number = image if pool == "image" else 2 * image + (offset >= self.base)
        return number.to(torch.int32)


def cuts_images(model: torch.nn.Module) -> bool:
    """Whether `model` has a `LlavaNextModel`, the one with grids whose views are told apart."""
    return any(isinstance(module, LlavaNextModel) for module in model.modules())


def find_images(model: Any, inputs: Mapping[str, Any]) -> ImageTokens | None:
    """The image tokens in the inputs of a `LlavaModel` or `LlavaNextModel`.

    Waits for the device at most twice. None if there are no images among the inputs, or their
    tokens cannot be told: no `input_ids`, image sizes that the model does not cut into crops
    (Pixtral), features chosen by other options than those of the config, or a model that is being
    compiled.

    Raises:
        ValueError: the numbers of image tokens are not those of the images, where an image may lack
            its last tokens only at the end of its row.
    """
    input_ids = inputs.get("input_ids")
    lengths = None if input_ids is None else _lengths(model, inputs)
    if input_ids is None or not lengths or torch.compiler.is_compiling():
        return None
    vision = input_ids == model.config.image_token_id
    rows: list[int] = vision.sum(dim=1).tolist()
    present = lengths
    if sum(rows) != sum(lengths):
        present = _present(rows, lengths)
        _check_ends(vision, inputs.get("attention_mask"), rows, lengths)
    return ImageTokens(vision, lengths, present, tokens_per_view(model.config) or 0)


def image_lengths(model: Any, image_sizes: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of images of (height, width) pixels, counted by packing features without values.

    Args:
        model: a `LlavaNextModel`.
        image_sizes: per image, as in `image_sizes` of the processor.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    counts: dict[tuple[int, ...], int] = {}
    for size in {tuple(size) for size in image_sizes}:
        crops = image_size_to_num_patches(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        features, _ = model.pack_image_features(
            [torch.empty(crops, tokens_per_view(config) or 0, 1, device="meta")],
            [size],
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=torch.empty(1, device="meta"),
        )
        counts[size] = features[0].shape[0]
    return [counts[tuple(size)] for size in image_sizes]


def embed_cut_images(model: Any, inputs: Mapping[str, Any], images: ImageTokens) -> dict[str, Any]:
    """`inputs` with embeddings instead of ids and images, without features whose tokens were cut.

    The backbone itself refuses images with more features than placeholders.
    """
    encoded = _encoded(inputs)
    if encoded is None:
        options = {name: inputs[name] for name in ("image_sizes",) if name in inputs}
        encoded = model.get_image_features(
            pixel_values=inputs["pixel_values"], return_dict=True, **options
        )
    features = [
        feature[:count]
        for feature, count in zip(encoded.pooler_output, images.present, strict=True)
    ]
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    rows = torch.cat(features).to(embeddings.device, embeddings.dtype)
    kept = {name: value for name, value in inputs.items() if name not in REPLACED}
    return kept | {"inputs_embeds": embeddings.masked_scatter(images.vision[..., None], rows)}


def cut_to_length(
    model: torch.nn.Module, batch: Mapping[str, Tensor], max_length: int
) -> dict[str, Tensor]:
    """Cut the sequences of a batch to `max_length` tokens, even within an image, as the authors do.

    Args:
        model: the p-MoD LLaVA that the batch is for; it says how many tokens an image has.
        batch: what a processor or collator made, padded on the right: input_ids [B, S], other
            tensors [B, S, ...], pixel_values, image_sizes.
        max_length: longest sequence in tokens, >= 1.

    Returns:
        The batch, without the images of which no token is left.

    Raises:
        ValueError: rows are padded on the left, or crops of images are not [images, crops, ...].
    """
    ids = batch["input_ids"]
    if max_length < 1:
        raise ValueError(f"cut_to_length: max_length: expected at least 1, got {max_length}")
    if ids.shape[1] <= max_length:
        return dict(batch)
    valid = batch.get("attention_mask")
    if valid is not None and not bool(valid[:, 0].all()):
        raise ValueError("cut_to_length: attention_mask: expected padding on the right, got left")
    cut = {
        name: value[:, :max_length] if value.shape[:2] == ids.shape else value
        for name, value in batch.items()
    }
    owners = (part for part in model.modules() if isinstance(part, (LlavaModel, LlavaNextModel)))
    owner = next(owners, None)
    images = None if owner is None else find_images(owner, batch)
    if images is None:
        return cut
    left = images.place()[0][:, :max_length][images.vision[:, :max_length]].unique()
    for name in ("pixel_values", "image_sizes"):
        if name in cut and len(left) == 0:
            del cut[name]
        elif name in cut and len(left) < len(images.lengths):
            if len(batch[name]) != len(images.lengths):
                expected, got = f"{len(images.lengths)} images", len(batch[name])
                raise ValueError(f"cut_to_length: {name}: expected {expected}, got {got}")
            cut[name] = batch[name][left.to(batch[name].device)]
    return cut


def _lengths(model: Any, inputs: Mapping[str, Any]) -> list[int] | None:
    for name in FEATURE_OPTIONS:
        if inputs.get(name) not in (None, getattr(model.config, name, None)):
            return None
    encoded, sizes = _encoded(inputs), inputs.get("image_sizes")
    pixels: Any = inputs.get("pixel_values")
    if not isinstance(model, (LlavaModel, LlavaNextModel)) or (encoded is None and pixels is None):
        return None
    if encoded is not None:
        # `generate` encodes images before it calls the model, and keeps their sizes to itself
        return [len(feature) for feature in encoded.pooler_output]
    if isinstance(model, LlavaNextModel):
        return None if sizes is None else image_lengths(model, torch.as_tensor(sizes).tolist())
    length = tokens_per_view(model.config)
    return None if sizes is not None or length is None else [length] * len(pixels)


def _encoded(inputs: Mapping[str, Any]) -> Any:
    return (inputs.get("mm_encoder_outputs") or {}).get("image")


def _present(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Give each row, in order, images until it has no tokens left."""
    present: list[int] = []
    for left in rows:
        while left > 0 and len(present) < len(lengths):
            present.append(min(left, lengths[len(present)]))
            left -= present[-1]
        if left > 0:
            _fail(f"images for {sum(rows)} image tokens", f"images of {list(lengths)} tokens")
    if len(present) < len(lengths):
        expected = f"at least one token of each of {len(lengths)} images"
        _fail(expected, f"{sum(rows)} image tokens, which are of {len(present)}")
    return present


def _check_ends(
    vision: Tensor, attention_mask: Any, rows: Sequence[int], lengths: Sequence[int]
) -> None:
    """Refuse rows that are short of image tokens and end otherwise: those were never whole."""
    valid = torch.ones_like(vision)
    if getattr(attention_mask, "ndim", 0) == 2:
        valid = attention_mask[:, -vision.shape[1] :] != 0
    last = vision.shape[1] - 1 - valid.int().flip(1).argmax(dim=1)
    ends_in_image = vision.gather(1, last[:, None])[:, 0].tolist()
    taken = 0
    for row, (count, at_end) in enumerate(zip(rows, ends_in_image, strict=True)):
        before = taken
        while count > 0:
            count -= lengths[taken]
            taken += 1
        if count < 0 and not at_end:
            expected = f"{sum(lengths[before:taken])} image tokens in row {row}"
            _fail(expected, f"{rows[row]}, and the row does not end within an image")


def _fail(expected: str, got: str) -> NoReturn:
    raise ValueError(f"input_ids: expected {expected}, got {got}")
