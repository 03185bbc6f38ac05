"""Pictures of the report, as data URIs and inline SVG: loss curves, test images, kept tokens."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

TILE = 128
DARKEN = 0.18
# Colours that the style sheet's variables replace, so that a figure follows the colour scheme.
VARIABLES = {"#010203": "var(--ink)", "#040506": "var(--line)"}
INK, LINE = VARIABLES
CURVES = {"p-MoD": "#070809", "dense": "#0a0b0c"}
VARIABLES |= {CURVES["p-MoD"]: "var(--pmod)", CURVES["dense"]: "var(--dense)"}


def loss_curves(losses: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """Inline SVG of training loss over steps, one curve for each of "p-MoD" and "dense"."""
    with mpl.rc_context(style(INK)):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for name, points in losses.items():
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, color=CURVES[name], linewidth=1.6, label=name)
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        ticks = (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
        shown = [value for points in losses.values() for _, value in points]
        if shown:
            axes.set_ylim(0.9 * min(shown), 1.1 * max(shown))
        plain_axes(axes, LINE)
        axes.legend(frameon=False, loc="upper right")
        return inline_svg(figure)


def style(ink: str) -> dict[Any, Any]:
    """Settings of matplotlib for a figure with text of this colour."""
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "pmod", "font.size": 9}
    return settings | dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink
    )


def plain_axes(axes: Any, line: str) -> None:
    """Leave a light grid of these lines, without frame and ticks."""
    axes.grid(color=line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def inline_svg(figure: Figure) -> Markup:
    """The SVG of a figure in the colours of `VARIABLES`, which has no text of the user."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    return Markup(svg[svg.index("<svg") :])


def data_uri(image: Image.Image) -> str:
    """A PNG of `image`, enlarged by a whole factor to at least `TILE` pixels, as a data URI."""
    factor = max(1, -(-TILE // min(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def model_view(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """What the model saw: one image [3, H, W] of `pixel_values`, without its normalisation."""
    pixels = pixel_values.permute(1, 2, 0).double().numpy() * np.asarray(std) + np.asarray(mean)
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def kept_view(image: Image.Image, kept: Tensor) -> Image.Image:
    """`image` with the patches that were skipped darkened.

    Args:
        image: what the model saw.
        kept: bool [rows, columns], whether each patch was kept; or [P * P], row by row.
    """
    side = round(kept.numel() ** 0.5)
    cells = kept if kept.ndim == 2 else kept.view(side, side)
    mask = Image.fromarray(cells.numpy().astype(np.uint8) * 255)
    dark = image.point([round(value * DARKEN) for value in range(256)] * 3)
    return Image.composite(image, dark, mask.resize(image.size, Image.Resampling.NEAREST))
