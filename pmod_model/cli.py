"""The command `pmod`. Sub-commands import what is heavy themselves, so that `--help` is instant."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from pmod_model.configuration import PModConfig
    from pmod_model.training.sources import Source

UsageError: Any = typer.BadParameter.__base__
ClickException: Any = UsageError.__base__
EASY_VQA_IMAGE = "easy-vqa:"
INTERRUPTED = 130

app = typer.Typer(
    name="pmod",
    help="Train, evaluate and inspect p-MoD vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str, typer.Option(help='"easy-vqa", or a LLaVA json: [{id, image, conversations}].')
]
ImageFolder = Annotated[str | None, typer.Option(help="Folder of the images that the json names.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch.")]
BatchSize = Annotated[int, typer.Option(help="Conversations or questions at a time.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer in tokens.")]
Run = Annotated[Path, typer.Option(help="Run folder, made by pmod train.")]


@app.command(
    epilog="Example: pmod train --output runs/pmod && pmod train --dense --output runs/dense"
)
def train(
    output: Annotated[Path, typer.Option(help="Run folder to make.")],
    data: Data = "easy-vqa",
    image_folder: ImageFolder = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Train the dense twin: no routers.")
    ] = False,
    pmod: Annotated[
        list[str] | None,
        typer.Option(help="Field of PModConfig, e.g. --pmod mean_ratio=0.4; repeatable."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="LLaVA checkpoint to start from; else a small one from scratch."),
    ] = None,
    image_size: Annotated[int, typer.Option(help="From scratch: pixels a side.")] = 64,
    patch_size: Annotated[int, typer.Option(help="From scratch: pixels a side of a token.")] = 8,
    hidden_size: Annotated[int, typer.Option(help="From scratch: width.")] = 128,
    layers: Annotated[int, typer.Option(help="From scratch: decoder layers.")] = 8,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 400,
    batch_size: BatchSize = 16,
    turns: Annotated[int, typer.Option(help="Turns drawn from each conversation; 0 = all.")] = 6,
    max_length: Annotated[int, typer.Option(help="Longest conversation in tokens.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights, order and turns.")] = 0,
    threads: Threads = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a pmod run at --output (nothing else).")
    ] = False,
) -> None:
    """Train a p-MoD LLaVA, or its dense twin, on easy-VQA or on your own LLaVA json."""
    if dense and pmod:
        raise typer.BadParameter("expected no settings with --dense", param_hint="--pmod")
    settings = None if dense else _pmod_config(pmod or [])
    _quiet()
    from pmod_model.training import train as training
    from pmod_model.training.preset import Preset

    options = training.TrainOptions(
        output=output,
        source=_source(data, image_folder),
        pmod=settings,
        model=model,
        preset=Preset(image_size, patch_size, hidden_size, layers),
        steps=steps,
        batch_size=batch_size,
        turns=turns,
        max_length=max_length,
        learning_rate=learning_rate,
        seed=seed,
        threads=threads,
        overwrite=overwrite,
    )
    facts = training.train(options)
    typer.echo(
        f"{facts['model']}: {facts['parameters']:,} parameters, {steps} steps of {batch_size} in"
        f" {facts['seconds']:.0f} s, saved in {output}"
    )


@app.command(
    epilog="Example: pmod generate --model runs/pmod --image photo.png --prompt 'what color is it?'"
)
def generate(
    model: Annotated[Path, typer.Option(help="Run folder or any saved p-MoD or LLaVA model.")],
    prompt: Annotated[list[str], typer.Option(help="Question; repeat the option to ask several.")],
    image: Annotated[str, typer.Option(help="Image file, or easy-vqa:N for its N-th test image.")],
    max_new_tokens: MaxNewTokens = 16,
    threads: Threads = 0,
) -> None:
    """Answer questions about an image in words."""
    _quiet(threads)
    from pmod_model.training.answering import answer, make_question, unknown_words
    from pmod_model.training.models import load_model

    picture = _image(image)
    questions = [make_question(text, picture, "generate") for text in prompt]
    language_model, processor = load_model(model, "generate")
    unknown = unknown_words(processor, " ".join(prompt))
    if unknown:
        typer.echo(f"pmod generate: words this model never saw: {', '.join(unknown)}", err=True)
    answers = answer(
        language_model, processor, questions, max_new_tokens=max_new_tokens, place="generate"
    )
    for text, given in zip(prompt, answers, strict=True):
        typer.echo(given if len(prompt) == 1 else f"{text} {given}")


@app.command(epilog="Example: pmod evaluate --model runs/pmod --limit 2000")
def evaluate(
    model: Run,
    data: Annotated[
        str | None, typer.Option(help='"easy-vqa" (its test set) or a LLaVA json.')
    ] = None,
    image_folder: ImageFolder = None,
    limit: Annotated[
        int, typer.Option(help="Ask this many questions, evenly spaced; 0 = all.")
    ] = 0,
    batch_size: BatchSize = 128,
    max_new_tokens: MaxNewTokens = 16,
    threads: Threads = 0,
) -> None:
    """Measure exact-match accuracy on held-out questions; writes evaluation.json into the run."""
    _quiet(threads)
    from pmod_model.report.terminal import print_evaluation
    from pmod_model.training import evaluate as evaluation

    source = None if data is None else _source(data, image_folder)
    result = evaluation.evaluate(
        model, source, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    print_evaluation(result)


@app.command(epilog="Example: pmod report runs/pmod runs/dense --output report.html")
def report(
    pmod: Annotated[Path, typer.Argument(help="Run folder of the p-MoD model.")],
    dense: Annotated[Path, typer.Argument(help="Run folder of its dense twin.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    examples: Annotated[int, typer.Option(help="Test images to draw.")] = 6,
    threads: Threads = 0,
) -> None:
    """Compare two runs in a self-contained report.html, and in a table here."""
    _quiet(threads)
    from pmod_model.report.build import build_report
    from pmod_model.report.terminal import print_comparison

    comparison = build_report(pmod, dense, output, examples=examples)
    print_comparison(comparison, output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; an error becomes one line on stderr and the status 2 (usage) or 1."""
    # so that a run that is asked to end removes what it has written so far
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(
            args=None if argv is None else list(argv), prog_name="pmod", standalone_mode=False
        )
    except UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "pmod"
        return _fail(f"{command}: {_one_line(error.format_message())}", 2)
    except ClickException as error:
        return _fail(f"pmod: {_one_line(error.format_message())}", 1)
    except (ValueError, TypeError, OSError) as error:
        text = _one_line(str(error))
        return _fail(text if text.startswith("pmod") else f"pmod: {text}", 1)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if status == INTERRUPTED:  # typer returns this status itself when it sees the signal first
        return _fail("pmod: interrupted; nothing was left behind", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    typer.echo(message, err=True)
    return status


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quiet(threads: int = 0) -> None:
    """Leave one progress bar at a time: silence those of loading and saving weights."""
    if threads < 0:
        raise typer.BadParameter(f"expected an integer >= 0, got {threads}", param_hint="--threads")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)


def _pmod_config(settings: Sequence[str]) -> PModConfig:
    from pmod_model.configuration import PModConfig

    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"expected field=value, got {setting!r}", param_hint="--pmod")
        try:
            values[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            values[name.strip()] = value
    try:
        return PModConfig(**values)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error), param_hint="--pmod") from None


def _source(data: str, image_folder: str | None) -> Source:
    from pmod_model.training.sources import Source

    return Source(data, image_folder)


def _image(name: str) -> Image:
    from pmod_model.data.easyvqa import easy_vqa_records
    from pmod_model.data.errors import InputError
    from pmod_model.data.images import open_image, resolve_image

    if not name.startswith(EASY_VQA_IMAGE):
        return open_image(Path(name), "generate")
    number = name.removeprefix(EASY_VQA_IMAGE)
    if not number.isdecimal():
        raise InputError("generate", "--image", "easy-vqa:NUMBER", name)
    _, folder = easy_vqa_records("test")
    return open_image(resolve_image(folder, f"{number}.png", "generate"), "generate")


if __name__ == "__main__":
    sys.exit(main())
