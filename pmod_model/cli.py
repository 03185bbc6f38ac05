"""The command `pmod`. Sub-commands import what is heavy themselves, so that `--help` is instant."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pmod_model.cli_reports import REPORT_EXAMPLE, VIEW_EXAMPLE, report, view
from pmod_model.cli_shared import (
    BatchSize,
    ImageFolder,
    MaxNewTokens,
    Run,
    Threads,
    assignments,
    data_source,
    find_image,
    quiet,
)
from pmod_model.cli_train import TRAIN_EXAMPLE, train

UsageError: Any = typer.BadParameter.__base__
ClickException: Any = UsageError.__base__
INTERRUPTED = 130

app = typer.Typer(
    name="pmod",
    help="Train, evaluate and inspect p-MoD vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command(epilog=TRAIN_EXAMPLE)(train)


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
    quiet(threads)
    from pmod_model.training.answering import answer, make_question, unknown_words
    from pmod_model.training.models import load_model

    picture = find_image(image, "generate")
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
    ratios: Annotated[
        list[str] | None,
        typer.Option(help="Other retention ratios, e.g. --ratios mean_ratio=0.3; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for the result instead of evaluation.json.")
    ] = None,
    threads: Threads = 0,
) -> None:
    """Measure exact-match accuracy on held-out questions; writes evaluation.json into the run.

    With --ratios, the run keeps the evaluation that it has.
    """
    quiet(threads)
    from pmod_model.report.terminal import print_evaluation
    from pmod_model.training import evaluate as evaluation

    source = None if data is None else data_source(data, image_folder)
    result = evaluation.evaluate(
        model,
        source,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        ratios=assignments(ratios or [], "--ratios"),
        output=output,
    )
    print_evaluation(result)


app.command(epilog=REPORT_EXAMPLE)(report)
app.command(epilog=VIEW_EXAMPLE)(view)


@app.command(
    epilog="Example: pmod convert p-MoD-LLaVA-NeXT-7B converted && "
    "pmod convert converted p-MoD-again --to official"
)
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder to read.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[
        Literal["transformers", "official"],
        typer.Option(help="Format to write: ours, for transformers, or that of the authors' code."),
    ] = "transformers",
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Folder of the CLIP model, unless it is openai/clip-vit-large-patch14-336 and its"
            " weights are in SOURCE; with --to official, the name to write."
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of the authors' p-MoD code for transformers, or back."""
    quiet()
    from pmod_model import checkpoint

    if to == "official":
        made = checkpoint.to_official(source, destination, vision_tower)
    else:
        tower = None if vision_tower is None else Path(vision_tower)
        made = checkpoint.from_official(source, destination, tower)
    for note in made.notes:
        typer.echo(f"pmod convert: {note}", err=True)
    typer.echo(f"{made.model}: {made.parameters:,} parameters, saved in {destination}")


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


if __name__ == "__main__":
    sys.exit(main())
