"""The commands that draw: `pmod report` and `pmod view`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_model.cli_shared import Threads, find_image, pmod_config, quiet

REPORT_EXAMPLE = (
    "Example: pmod report runs/pmod runs/dense --output report.html && "
    "pmod report llava-next-7b --output next.png"
)
VIEW_EXAMPLE = (
    "Example: pmod view --model runs/pmod --image photo.png --prompt 'what color is it?'"
    " --output view.html"
)


def report(
    model: Annotated[
        str,
        typer.Argument(
            help="Run folder of the p-MoD model; or, alone, a model folder, llava-1.5-7b or"
            " llava-next-7b, of which the config is enough."
        ),
    ],
    dense: Annotated[
        Path | None, typer.Argument(help="Run folder of its dense twin, to compare the two.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="HTML file to write; of MODEL alone, .png writes its figure.")
    ] = Path("report.html"),
    examples: Annotated[int, typer.Option(help="Of two runs: test images to draw.")] = 6,
    text_tokens: Annotated[
        int | None, typer.Option(help="Of MODEL alone: text tokens; 58 as in the paper.")
    ] = None,
    vision_tokens: Annotated[
        int | None, typer.Option(help="Of MODEL alone: tokens of the image, if not the model's.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Of MODEL alone: run it here, p-MoD beside dense.")
    ] = False,
    pmod: Annotated[
        list[str] | None,
        typer.Option(help="Of a dense MODEL alone: field of PModConfig, e.g. mean_ratio=0.4."),
    ] = None,
    threads: Threads = 0,
) -> None:
    """Say what MODEL costs with p-MoD and dense; or compare two runs, p-MoD and its dense twin."""
    alone = {
        "--text-tokens": text_tokens is not None,
        "--vision-tokens": vision_tokens is not None,
        "--measure": measure,
        "--pmod": bool(pmod),
    }
    if dense is not None:
        for name, given in alone.items():
            if given:
                raise typer.BadParameter("expected one model, got two runs", param_hint=name)
    settings = pmod_config(pmod) if pmod else None
    quiet(threads)
    from pmod_model.report import terminal

    if dense is not None:
        from pmod_model.report.build import build_report

        comparison = build_report(Path(model), dense, output, examples=examples)
        terminal.print_comparison(comparison, output)
        return
    from pmod_model.report.efficiency import TEXT_TOKENS
    from pmod_model.report.efficiency_page import build_efficiency

    figures = build_efficiency(
        model,
        output,
        settings,
        text_tokens=TEXT_TOKENS if text_tokens is None else text_tokens,
        vision_tokens=vision_tokens,
        measured=measure,
    )
    terminal.print_efficiency(figures, output)


def view(
    model: Annotated[Path, typer.Option(help="Run folder or any saved p-MoD LLaVA.")],
    image: Annotated[str, typer.Option(help="Image file, or easy-vqa:N for its N-th test image.")],
    prompt: Annotated[str, typer.Option(help="Question about the image.")],
    output: Annotated[
        Path, typer.Option(help="File to write: .html has a slider over layers, .png all of them.")
    ] = Path("view.html"),
    threads: Threads = 0,
) -> None:
    """Draw which tokens of an image each layer keeps."""
    quiet(threads)
    from pmod_model.report.view import build_view

    kept = build_view(model, find_image(image, "view"), prompt, output, name=image)
    for line in kept:
        typer.echo(line)
    typer.echo(f"view: {output.absolute()}")
