"""`pmod view`: the image tokens that each layer keeps, as a page with a slider or a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pmod_model.data.encoding import encode_prompt
from pmod_model.data.errors import InputError
from pmod_model.report.kept import Region, image_regions, record_kept
from pmod_model.report.page import PICTURE_MARK, check_page_path, is_picture, render_page
from pmod_model.report.pictures import data_uri, kept_view, style
from pmod_model.training.answering import make_question
from pmod_model.training.models import load_model
from pmod_model.training.run_folder import write_bytes, write_text

PLACE = "view"
COLUMNS = 8
SCRIPT = """
const slider = document.getElementById("layer"), said = document.getElementById("said");
const tiles = document.querySelectorAll("[data-said]");
function show() {
  const layer = slider.value;
  said.textContent = slider.ariaValueText = tiles[layer].dataset.said;
  document.querySelectorAll("[data-region]").forEach(use =>
    use.setAttribute("href", "#skipped-" + layer + "-" + use.dataset.region));
}
slider.addEventListener("input", show);
document.getElementById("controls").hidden = false;
show();
"""


@dataclass(frozen=True, eq=False)
class LayerView:
    """What one layer keeps: in words, and the cells that it skips in each region.

    Attributes:
        number: of the layer.
        said: how many tokens of how many.
        skipped: for each region an SVG path, a unit square per cell.
    """

    number: int
    said: str
    skipped: Sequence[str]


def build_view(
    model: Path, image: Image.Image, prompt: str, output: Path, *, name: str
) -> list[str]:
    """Run a prompt and write what every layer kept.

    Args:
        model: folder of a p-MoD LLaVA.
        image: the image.
        prompt: a question about it.
        output: the file: .png has a grid of layers, anything else is a page.
        name: what to call the image.

    Returns:
        A line per layer.

    Raises:
        InputError: there is no such model, its layout is not known, no token can be skipped, or
            `output` is another file.
    """
    check_page_path(output, PLACE)
    question = make_question(prompt, image, PLACE)
    built, processor = load_model(model, PLACE)
    inputs = encode_prompt(processor, question.turn, image)
    regions = image_regions(built, processor, inputs, image)
    kept = record_kept(built, inputs)
    argument = f"--model {str(model)!r}"
    if regions is None:
        got = type(built).__name__
        raise InputError(PLACE, argument, "a LLaVA-1.5 or LLaVA-NeXT, whose layout is known", got)
    if not kept:
        raise InputError(PLACE, argument, "a p-MoD model", "one whose layers skip no token")
    count = int((inputs["input_ids"] == built.config.image_token_id).sum())
    number = built.config.get_text_config().num_hidden_layers
    said = [_said(layer, kept, count) for layer in range(number)]
    if is_picture(output):
        content = layers_png(regions, kept, number)
        check_page_path(output, PLACE)
        write_bytes(output, content)
    else:
        shown = Path(name).name  # a page that is passed on does not say where files were
        page = view_page(regions, kept, said, name=shown, prompt=prompt, model=model.name)
        check_page_path(output, PLACE)
        write_text(output, page)
    return said


def view_page(
    regions: Sequence[Region],
    kept: Mapping[int, Tensor],
    said: Sequence[str],
    *,
    name: str,
    prompt: str,
    model: str,
) -> str:
    """The page: a picture per region, a slider over layers, and below it all layers at once."""
    layers = [
        LayerView(layer, text, [_skipped(kept.get(layer), region.tokens) for region in regions])
        for layer, text in enumerate(said)
    ]
    shown = [
        {
            "name": region.name,
            "uri": data_uri(region.picture),
            "rows": region.tokens.shape[0],
            "columns": region.tokens.shape[1],
            # the shape of the picture, which a base view of LLaVA-NeXT does not have
            "width": region.picture.width,
            "height": region.picture.height,
        }
        for region in regions
    ]
    return render_page(
        "view.html.j2",
        script=SCRIPT,
        regions=shown,
        layers=layers,
        start=max(kept),
        name=name,
        prompt=prompt,
        model=model,
    )


def layers_png(regions: Sequence[Region], kept: Mapping[int, Tensor], layers: int) -> bytes:
    """A grid of all layers, for each region one beneath the other."""
    columns = min(COLUMNS, layers)
    rows = math.ceil(layers / columns)
    with mpl.rc_context({**style("#1b2330"), "font.size": 7}):
        figure = Figure(figsize=(1.4 * columns, 1.6 * rows * len(regions)), layout="constrained")
        grids: Any = figure.subplots(rows * len(regions), columns, squeeze=False)
        for axes in grids.flat:
            axes.set_axis_off()
        for part, region in enumerate(regions):
            for layer in range(layers):
                axes = grids[part * rows + layer // columns, layer % columns]
                cells = _cells(kept.get(layer), region.tokens)
                picture = region.picture if cells is None else kept_view(region.picture, cells)
                axes.imshow(picture)
                share = 1.0 if cells is None else float(cells.float().mean())
                axes.set_title(f"layer {layer}: {100 * share:.0f} %", pad=2)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, metadata=PICTURE_MARK)
    return data.getvalue()


def _cells(kept: Tensor | None, tokens: Tensor) -> Tensor | None:
    return None if kept is None else kept[tokens.flatten()].view(tokens.shape)


def _skipped(kept: Tensor | None, tokens: Tensor) -> Markup:
    """The path of the skipped cells, runs of a row joined."""
    cells = _cells(kept, tokens)
    parts = []
    for y, row in enumerate([] if cells is None else cells.tolist()):
        x = 0
        while x < len(row):
            start = x
            while x < len(row) and not row[x]:
                x += 1
            if x > start:
                parts.append(f"M{start} {y}h{x - start}v1h{start - x}z")
            x += 1
    return Markup("".join(parts))  # numbers and letters of ours


def _said(layer: int, kept: Mapping[int, Tensor], count: int) -> str:
    if layer not in kept:
        return f"layer {layer}: dense, all {count:,} tokens"
    number = int(kept[layer].sum())
    return f"layer {layer}: {number:,} of {count:,} tokens, {100 * number / count:.1f} %"
