"""The command `pmod train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pmod_model.cli_shared import assignments, quiet

TRAIN_EXAMPLE = (
    "Example: pmod train demo --output runs/pmod && pmod train demo --dense --output runs/dense"
)


def train(
    config: Annotated[
        str | None,
        typer.Argument(help="YAML file, or a preset by name; --list-configs shows them."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder to make.")] = None,
    data: Annotated[
        str | None, typer.Option(help='"easy-vqa", or the path of a data file.')
    ] = None,
    image_folder: Annotated[
        str | None, typer.Option(help="Folder of the images that the data names.")
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Train the dense twin: no routers.")
    ] = False,
    pmod: Annotated[
        list[str] | None,
        typer.Option(help="Field of PModConfig, e.g. --pmod mean_ratio=0.4; repeatable."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="LLaVA or p-MoD checkpoint to start from.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Conversations at a time.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the schedule.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, order, turns and augmentation.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0 leaves it to torch.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field, e.g. --set turns=0; repeatable."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a pmod run at --output (nothing else).")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint, if any.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every field with its value, and stop.")
    ] = False,
    list_configs: Annotated[
        bool, typer.Option("--list-configs", help="Print the presets, and stop.")
    ] = False,
) -> None:
    """Train a p-MoD LLaVA, or its dense twin, on easy-VQA or on your own data.

    Options take the place of fields of CONFIG.
    """
    if dense and pmod:
        raise typer.BadParameter("expected no settings with --dense", param_hint="--pmod")
    given = {
        "output": output,
        "data": data,
        "image_folder": image_folder,
        "model": model,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "threads": threads,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= assignments(set_ or [], "--set")
    if pmod:
        changes["pmod"] = assignments(pmod, "--pmod")
    if dense:
        changes["pmod"] = None
    from pmod_model.training.config import load_config, presets, render_config

    if list_configs:
        for name, about in presets().items():
            typer.echo(f"{name:14} {about}")
        return
    settings = load_config(config, changes)
    if print_config:
        typer.echo(render_config(settings), nl=False)
        return
    quiet()
    from pmod_model.training import train as training
    from pmod_model.training.guards import Interrupted

    try:
        facts = training.train(settings, overwrite=overwrite, resume=resume)
    except Interrupted as error:
        hint = "" if error.checkpoint is None else "; the same command with --resume goes on"
        kept = hint if settings.save_every else "; nothing was left behind"
        typer.echo(f"pmod train: {str(error).split(';')[0]}{kept}", err=True)
        raise typer.Exit(error.exit_code) from None
    if os.environ.get("RANK", "0") != "0":
        return
    typer.echo(
        f"{facts['model']}: {facts['parameters']:,} parameters, {facts['steps']} steps of"
        f" {facts['batch_size']} in {facts['seconds']:.0f} s, saved in {settings.output}"
    )
