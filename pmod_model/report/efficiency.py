"""What a prefill of one model costs, with p-MoD and dense: counted from its config, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlavaNextModel, PreTrainedModel

from pmod_model.configuration import PModConfig
from pmod_model.data.errors import InputError
from pmod_model.flops import DecoderSize, attention_flops, kept_per_layer, kv_bytes, linear_flops
from pmod_model.images import image_lengths
from pmod_model.inject import find_decoder
from pmod_model.presets import PRESETS, build_from_config, preset_config
from pmod_model.schedule import layer_ratios
from pmod_model.targets import has_high_resolution, tokens_per_image, tokens_per_view

PLACE = "report"
TEXT_TOKENS = 58  # of the paper's table


@dataclass(frozen=True)
class Cost:
    """One prefill; FLOPs as `pmod_model.flops` counts them.

    Attributes:
        kept: vision tokens that each layer processes.
        linear_flops: linear layers and head: the paper's figure.
        all_flops: the same with attention.
        kv_bytes: keys and values of all tokens.
        kv_bytes_vision: those of vision tokens: the paper's figure.
    """

    kept: Sequence[int]
    linear_flops: int
    all_flops: int
    kv_bytes: int
    kv_bytes_vision: int


@dataclass(frozen=True)
class Efficiency:
    """A model with p-MoD beside itself without.

    Attributes:
        name: what was asked for: a preset or a folder.
        parameters: of the whole model, routers included.
        dtype: of the keys and values.
        text_tokens: tokens that are not vision.
        vision_tokens: tokens of the image.
        fixed_tokens: those of them that never compete: the base view, for "vision_high_res".
        mean_ratio: mean retention ratio over layers, 1 for a dense one.
        routed_layers: how many layers have a router.
        pmod: cost with p-MoD.
        dense: cost without.
    """

    name: str
    parameters: int
    dtype: str
    text_tokens: int
    vision_tokens: int
    fixed_tokens: int
    mean_ratio: float
    routed_layers: int
    pmod: Cost
    dense: Cost


def read_config(model: str, pmod: PModConfig | None) -> Any:
    """The config of a preset or of a model folder, which needs no weights.

    Args:
        model: name of a preset, or a folder with a `config.json`.
        pmod: settings for a model that has none of its own; None = those of the paper.

    Raises:
        InputError: there is neither, or settings are given to a model that has its own.
    """
    if model in PRESETS:
        return preset_config(model, pmod)
    folder = Path(model)
    if not (folder / "config.json").is_file():
        expected = f"a folder with a config.json, or {' or '.join(PRESETS)}"
        got = "one without" if folder.is_dir() else "no folder"
        raise InputError(PLACE, f"MODEL {model!r}", expected, got)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(PLACE, f"MODEL {model!r}", "a model of transformers", error) from None
    if pmod is not None and getattr(config, "pmod", None) is not None:
        raise InputError(PLACE, "--pmod", "no settings for a model that has its own", "some")
    return config


def count_efficiency(
    name: str,
    config: Any,
    pmod: PModConfig | None = None,
    *,
    text_tokens: int = TEXT_TOKENS,
    vision_tokens: int | None = None,
) -> Efficiency:
    """Count a prefill of one prompt with one image.

    Args:
        name: what to call the model.
        config: of a model of transformers; it is built without weights.
        pmod: settings for a config that has none of its own; None = those of the paper.
        text_tokens: tokens that are not vision, 58 in the paper.
        vision_tokens: tokens of the image; None = those of LLaVA-1.5's, or of a square image in
            LLaVA-NeXT's largest square grid.

    Raises:
        InputError: a number is negative, the config does not tell the tokens of an image, or text
            may be skipped as well.
    """
    if text_tokens < 0:
        raise InputError(PLACE, "--text-tokens", "an integer >= 0", text_tokens)
    if vision_tokens is not None and vision_tokens < 1:
        raise InputError(PLACE, "--vision-tokens", "an integer >= 1", vision_tokens)
    model = build_from_config(config, pmod, "meta")
    vision = vision_tokens or _image_tokens(model)
    size = DecoderSize.of(model.config.get_text_config())
    settings = PModConfig.from_dict(model.config.pmod)
    ratios = layer_ratios(settings, size.layers)
    element = model.dtype.itemsize
    pools = _pools(model.config, settings, vision)
    fixed = vision - sum(pools)
    each = [kept_per_layer(ratios, size.layers, tokens) for tokens in pools]
    routed = [fixed + sum(kept) for kept in zip(*each, strict=True)]
    return Efficiency(
        name,
        sum(parameter.numel() for parameter in model.parameters()),
        str(model.dtype).removeprefix("torch."),
        text_tokens,
        vision,
        fixed,
        (sum(ratios.values()) + size.layers - len(ratios)) / size.layers,
        len(ratios),
        *(
            _cost(size, text_tokens, vision, kept, element)
            for kept in (routed, [vision] * size.layers)
        ),
    )


def _cost(size: DecoderSize, text: int, vision: int, kept: Sequence[int], element: int) -> Cost:
    linear = linear_flops(size, text, vision, kept)
    return Cost(
        kept,
        linear,
        linear + attention_flops(size, text, kept),
        kv_bytes(size, text, kept, element),
        kv_bytes(size, 0, kept, element),
    )


def _pools(config: Any, settings: PModConfig, vision: int) -> list[int]:
    """Vision tokens that compete, by the budget that they share."""
    if settings.target_tokens == "all":
        expected = '"vision" or "vision_high_res", which leave text alone'
        raise InputError(PLACE, "target_tokens", expected, '"all"')
    views = tokens_per_view(config) if has_high_resolution(config) else None
    if views is None:
        return [vision]
    base = min(views, vision)
    if settings.target_tokens == "vision_high_res":
        return [vision - base]
    return [base, vision - base] if settings.pool == "frame" else [vision]


def _image_tokens(model: PreTrainedModel) -> int:
    tokens = tokens_per_image(model.config)
    if tokens is not None:
        return tokens
    for module in model.modules():
        if isinstance(module, LlavaNextModel):
            grids = model.config.image_grid_pinpoints
            squares = [height for height, width in grids if height == width]
            if squares:
                return image_lengths(module, [(max(squares),) * 2])[0]
    got = f"{type(find_decoder(model)).__name__} and no such number in the config"
    raise InputError(PLACE, "--vision-tokens", "how many tokens an image has", got)
