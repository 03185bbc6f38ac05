"""`pmod report MODEL`: counts a model, measures it if asked to, and draws what was found."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from pmod_model.configuration import PModConfig
from pmod_model.data.errors import InputError
from pmod_model.loading import load_pretrained
from pmod_model.presets import build_from_config
from pmod_model.report.efficiency import (
    PLACE,
    TEXT_TOKENS,
    Efficiency,
    count_efficiency,
    read_config,
)
from pmod_model.report.measure import Measured, make_prompt, measure
from pmod_model.report.page import PICTURE_MARK, check_page_path, is_picture, render_page
from pmod_model.report.pictures import CURVES, INK, LINE, inline_svg, plain_axes, style
from pmod_model.report.rows import Row, amount, make_row, milliseconds, operations
from pmod_model.training.run_folder import write_bytes, write_text

PRINTED = {INK: "#1b2330", LINE: "#dfe3e9", CURVES["p-MoD"]: "#0b7a75", CURVES["dense"]: "#c2571a"}


def build_efficiency(
    model: str,
    output: Path,
    pmod: PModConfig | None = None,
    *,
    text_tokens: int = TEXT_TOKENS,
    vision_tokens: int | None = None,
    measured: bool = False,
) -> dict[str, Any]:
    """Write the page, or the figure alone if `output` ends in .png.

    Args:
        model: name of a preset, or a folder with a `config.json`.
        output: the file; an existing one is replaced only if pmod wrote it.
        pmod: settings for a model that has none of its own; None = those of the paper.
        text_tokens: see `count_efficiency`.
        vision_tokens: see `count_efficiency`.
        measured: run the model here as well, with its weights, or with random ones if it has none.

    Returns:
        efficiency: the counts. rows: the table. notes: sentences about it.

    Raises:
        InputError: there is no such model, it does not fit the memory, or `output` is another file.
    """
    check_page_path(output, PLACE)
    config = read_config(model, pmod)
    counts = count_efficiency(
        model, config, pmod, text_tokens=text_tokens, vision_tokens=vision_tokens
    )
    times, weights = None, ""
    if measured:
        _check_memory(model, counts, config)
        built, weights = _load(model, config, pmod)
        lengths = counts.text_tokens, counts.vision_tokens
        times = measure(built, make_prompt(built, *lengths, fixed=counts.fixed_tokens))
    rows = counted_rows(counts) + ([] if times is None else measured_rows(*times))
    figures = {"efficiency": counts, "rows": rows, "notes": _notes(counts, weights)}
    check_page_path(output, PLACE)
    if is_picture(output):
        write_bytes(output, figure_png(counts, rows))
    else:
        chart = figure_svg(counts, rows)
        write_text(output, render_page("efficiency.html.j2", chart=chart, **figures))
    return figures


def counted_rows(counts: Efficiency) -> list[Row]:
    """FLOPs without and with attention, and the cache with text and of vision alone."""
    pair = (counts.pmod, counts.dense)
    shown = [
        ("FLOPs", "linear layers and head: the paper's count", "linear_flops", operations),
        ("FLOPs", "with attention", "all_flops", operations),
        ("KV cache", "vision tokens only: the paper's count", "kv_bytes_vision", amount),
        ("KV cache", "with text", "kv_bytes", amount),
    ]
    return [
        make_row(name, note, [getattr(cost, field) for cost in pair], show)
        for name, note, field, show in shown
    ]


def measured_rows(pmod: Measured, dense: Measured) -> list[Row]:
    """Time and memory on this machine."""
    shown = [
        ("Prefill", "measured, median", "prefill", milliseconds),
        ("Decoding", "measured, a token", "decode", milliseconds),
        ("KV cache", "measured", "cache_bytes", amount),
        ("Peak memory", "measured in a prefill, above the weights", "peak_bytes", amount),
    ]
    return [
        make_row(name, note, [getattr(found, field) for found in (pmod, dense)], show)
        for name, note, field, show in shown
    ]


def figure_svg(counts: Efficiency, rows: Sequence[Row]) -> Any:
    """Inline SVG that follows the colour scheme of its page."""
    with mpl.rc_context(style(INK)):
        return inline_svg(_draw(counts, rows, {color: color for color in PRINTED}))


def figure_png(counts: Efficiency, rows: Sequence[Row]) -> bytes:
    """The same as a PNG, on white."""
    with mpl.rc_context(style(PRINTED[INK])):
        data = io.BytesIO()
        figure = _draw(counts, rows, PRINTED)
        figure.savefig(data, format="png", dpi=200, metadata=PICTURE_MARK)
    return data.getvalue()


def _draw(counts: Efficiency, rows: Sequence[Row], colors: dict[str, str]) -> Figure:
    ours, theirs = colors[CURVES["p-MoD"]], colors[CURVES["dense"]]
    figure = Figure(figsize=(7.6, 3.2 + 0.2 * max(len(rows) - 4, 0)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    left.step(range(len(counts.dense.kept)), counts.dense.kept, color=theirs, where="mid")
    left.bar(range(len(counts.pmod.kept)), counts.pmod.kept, color=ours, width=0.8)
    left.set(title="vision tokens kept by each layer", xlabel="layer", ylim=(0, None))
    shares = [100 * (row.ratio or 0) for row in rows]
    names = [f"{row.name}\n{row.note.split(':')[0]}" for row in rows]
    right.barh(names, shares, color=ours, height=0.6)
    right.axvline(100, color=theirs)
    right.bar_label(right.containers[0], [f"{share:.1f} %" for share in shares], padding=3)
    right.set(title="p-MoD / dense, %", xlim=(0, 1.25 * max(100, *shares)))
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    for axes in (left, right):
        plain_axes(axes, colors[LINE])
    return figure


def _notes(counts: Efficiency, weights: str) -> list[str]:
    stay = f" ({counts.fixed_tokens:,} never skipped)" if counts.fixed_tokens else ""
    notes = [
        f"{counts.vision_tokens:,} vision{stay} and {counts.text_tokens:,} text tokens,"
        f" {counts.dtype};"
        f" {counts.routed_layers} of {len(counts.pmod.kept)} layers are routed, the mean retention"
        f" ratio is {100 * counts.mean_ratio:.1f} %.",
        "FLOPs are 2 per multiply-add, of the decoder and its head, without the vision tower.",
    ]
    if weights:
        notes.append(
            f"Measured on the decoder and head alone, on the CPU, in turns, with {weights}; dense"
            " is the same model with no token to skip."
        )
    return notes


def _load(model: str, config: Any, pmod: PModConfig | None) -> tuple[PreTrainedModel, str]:
    if not any(Path(model).glob("*.safetensors")):
        return build_from_config(config, pmod, "cpu"), "random weights"
    own = getattr(config, "pmod", None) is not None
    settings = None if own else pmod or PModConfig()
    return load_pretrained(model, pmod=settings).eval(), "the weights of the folder"


def _check_memory(model: str, counts: Efficiency, config: Any) -> None:
    itemsize = (config.dtype.itemsize if config.dtype else 4) if config else 4
    needed = counts.parameters * itemsize + 2 * counts.dense.kv_bytes
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and int(value.split()[0]) * 1024 < needed:
            expected = f"{needed / 2**30:.1f} GiB of free memory for {model}"
            got = f"{int(value.split()[0]) / 2**20:.1f} GiB"
            raise InputError(PLACE, "--measure", expected, got)
