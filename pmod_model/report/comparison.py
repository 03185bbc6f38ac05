"""Figures of a p-MoD run beside those of its dense twin, from their folders and their models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pmod_model.data.encoding import encode_prompt
from pmod_model.data.errors import InputError
from pmod_model.report.prefill import PrefillCost, PrefillTime, prefill_cost, time_prefills
from pmod_model.report.rows import Row, amount, make_row, milliseconds, operations
from pmod_model.training.answering import Question, pad_prompts
from pmod_model.training.models import load_model
from pmod_model.training.run_folder import read_evaluation, read_run

PLACE = "report"
BATCHES = (1, 32)
PREFILL_TIME = "Prefill time"


@dataclass(frozen=True)
class Run:
    """A run folder: its facts, its evaluation if there is one, its model and processor."""

    folder: Path
    facts: dict[str, Any]
    evaluation: dict[str, Any] | None
    model: PreTrainedModel
    processor: Any

    @property
    def name(self) -> str:
        """The kind of model: "p-MoD" or "dense"."""
        return self.facts["model"]


# What twins have in common, so that a difference between them is one of routing.
SHARED = ("source", "steps", "batch_size", "turns", "learning_rate", "seed", "layers", "records")


def load_runs(pmod: Path, dense: Path) -> tuple[Run, Run]:
    """Both runs, in that order.

    Raises:
        InputError: a folder holds no run, or one of the other kind.
    """
    runs = []
    for folder, kind in ((pmod, "p-MoD"), (dense, "dense")):
        facts = read_run(folder, PLACE)
        if facts["model"] != kind:
            raise InputError(
                PLACE, f"run {str(folder)!r}", f"a {kind} run", f"a {facts['model']} run"
            )
        model, processor = load_model(folder, PLACE)
        runs.append(Run(folder, facts, read_evaluation(folder), model, processor))
    for name in SHARED:
        values = [run.facts.get(name) for run in runs]
        if values[0] != values[1]:
            expected = f"runs with the same {name}"
            raise InputError(PLACE, "runs", expected, f"{values[0]!r} and {values[1]!r}")
    return runs[0], runs[1]


def cost_rows(pmod: Run, dense: Run, question: Question) -> list[Row]:
    """Training time, arithmetic, cache and time of a prefill of both models."""
    prompt = encode_prompt(dense.processor, question.turn, question.image, question.system)
    pad = dense.processor.tokenizer.pad_token_id or 0
    single = pad_prompts([prompt], pad)
    costs = [prefill_cost(run.model, single) for run in (pmod, dense)]
    rows = [_training_row(pmod, dense), *_counted_rows(*costs)]
    for batch in BATCHES:
        times = time_prefills([pmod.model, dense.model], pad_prompts([prompt] * batch, pad))
        rows += _time_rows(*times)
    return rows


def accuracy_gain(pmod: Run, dense: Run) -> tuple[float, float] | None:
    """Accuracy of p-MoD minus dense, and its standard error over pairs; None if they differ."""
    if pmod.evaluation is None or dense.evaluation is None:
        return None
    pairs = [run.evaluation["predictions"] for run in (pmod, dense) if run.evaluation]
    if [p["id"] for p in pairs[0]] != [p["id"] for p in pairs[1]]:
        return None
    differences = [int(a["correct"]) - int(b["correct"]) for a, b in zip(*pairs, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / len(differences)
    return mean, math.sqrt(variance / len(differences))


def speed_note(rows: Sequence[Row]) -> str:
    """Says plainly how fast the measured prefill is, and where it is not faster."""
    walls = [row for row in rows if row.name == PREFILL_TIME and "wall clock" in row.note]
    shown = [f"{100 * (row.ratio or 0):.0f} % with {row.note.split(',')[0]}" for row in walls]
    text = (
        f"In wall-clock time the prefill of p-MoD takes {' and '.join(shown)} of the dense one's."
    )
    if any((row.ratio or 0) >= 1 for row in walls):
        text += " At 100 % and more it is not faster."
    return text


def _training_row(pmod: Run, dense: Run) -> Row:
    seconds = [run.facts["cpu_seconds"] for run in (pmod, dense)]
    note = f"CPU time of all threads, {pmod.facts['steps']} steps"
    return make_row("Training", note, seconds, lambda value: f"{value:.0f} s")


def _counted_rows(pmod: PrefillCost, dense: PrefillCost) -> list[Row]:
    tokens = f"{dense.vision_tokens} vision + {dense.text_tokens} text tokens"
    pairs = [
        ("FLOPs", f"linear layers and head, {tokens}", "linear_flops", operations),
        ("FLOPs", "with attention", "all_flops", operations),
        ("KV cache", f"measured, {tokens}", "kv_bytes", amount),
        ("KV cache", "vision tokens only", "kv_bytes_vision", amount),
    ]
    return [
        make_row(name, note, [getattr(cost, field) for cost in (pmod, dense)], show)
        for name, note, field, show in pairs
    ]


def _time_rows(pmod: PrefillTime, dense: PrefillTime) -> list[Row]:
    prompts = f"{pmod.batch} prompt{'s' if pmod.batch > 1 else ''}"
    return [
        make_row(
            PREFILL_TIME, f"{prompts}, wall clock, median", [pmod.wall, dense.wall], milliseconds
        ),
        make_row(PREFILL_TIME, f"{prompts}, CPU time, median", [pmod.cpu, dense.cpu], milliseconds),
    ]
