"""`pmod evaluate`: exact-match accuracy on held-out questions, and what can be had without looking.

Every question is asked alone and answered in words by greedy generation; an answer counts if it
equals the reference, but for case, white space and a final full stop.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from pmod_model.data.errors import InputError
from pmod_model.data.records import Record
from pmod_model.ratios import set_ratios
from pmod_model.training.answering import answer, record_question
from pmod_model.training.models import load_model
from pmod_model.training.run_folder import EVALUATION_FILE, read_run, write_json
from pmod_model.training.sources import EASY_VQA, Data, Source

PLACE = "evaluate"
CHUNK = 512


def evaluate(
    folder: Path,
    source: Source | None = None,
    *,
    limit: int = 0,
    batch_size: int = 128,
    max_new_tokens: int = 16,
    ratios: Mapping[str, Any] | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Answer held-out questions with the model in `folder`, and write `evaluation.json` there.

    Args:
        folder: a run folder of `pmod train`.
        source: held-out data, of which each record's first question is asked; None = the test split
            of easy-VQA, for a run that was trained on it.
        limit: ask this many questions, evenly spaced; 0 asks all.
        batch_size: questions generated together.
        max_new_tokens: longest answer.
        ratios: fields for `pmod_model.ratios.set_ratios`: the model as it answers at other
            retention ratios than it was trained with. The run then keeps its own evaluation.
        output: where to write the result instead of into the run.

    Returns:
        What `evaluation.json` holds.

    Raises:
        InputError: there is no run in `folder`, or the data is not usable.
        ValueError: the ratios are not usable.
    """
    facts = read_run(folder, PLACE)
    if limit < 0:
        raise InputError(PLACE, "--limit", "an integer >= 0", limit)
    trained_on = Source.from_dict(facts["source"])
    if source is None and trained_on.data != EASY_VQA:
        got = f"none, for a run trained on {trained_on.data}"
        raise InputError(PLACE, "--data", "a file of held-out questions", got)
    source = source or Source()
    data = source.load("test")
    records = spaced(data.records, limit)
    model, processor = load_model(folder, PLACE)
    changed = set_ratios(model, **ratios) if ratios else None
    wall, cpu = time.perf_counter(), time.process_time()
    ask = partial(
        answer,
        model,
        processor,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        place=PLACE,
    )
    answers = _answers(ask, Data(data.name, records, data.folder), facts["model"])
    result = {
        "format": "pmod-evaluation",
        "model": facts["model"],
        "data": data.name,
        "source": source.to_dict(),
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "threads": torch.get_num_threads(),
        **({} if changed is None else {"ratios": {str(k): v for k, v in changed.items()}}),
        **score(records, answers),
        "blind": blind_baselines(_training_records(trained_on), records),
    }
    if output is not None or not ratios:
        write_json(output or folder / EVALUATION_FILE, result)
    return result


def _answers(ask: Callable[..., list[str]], data: Data, name: str) -> list[str]:
    """Answers to the first question of each record, with a progress bar."""
    answers: list[str] = []
    with Progress(transient=True) as progress:
        task = progress.add_task(f"{name} answers", total=len(data.records))
        for start in range(0, len(data.records), CHUNK):  # so that not all images are held at once
            questions = [
                record_question(record, data.folder, data.name)
                for record in data.records[start : start + CHUNK]
            ]
            answers += ask(questions, on_batch=partial(progress.advance, task))
    return answers


def score(records: Sequence[Record], answers: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its binomial standard error, by kind of answer, and every prediction."""
    predictions = [
        {
            "id": record.id,
            "image": record.image_name,
            "question": record.turns[0].text,
            "answer": record.turns[0].answer,
            "generated": given,
            "correct": normal(given) == normal(record.turns[0].answer),
        }
        for record, given in zip(records, answers, strict=True)
    ]
    groups: dict[str, list[bool]] = defaultdict(list)
    for prediction in predictions:
        yes_or_no = normal(prediction["answer"]) in ("yes", "no")
        groups["yes/no" if yes_or_no else "other"].append(prediction["correct"])
    return {
        **share([prediction["correct"] for prediction in predictions]),
        "by_kind": {kind: share(hits) for kind, hits in sorted(groups.items(), reverse=True)},
        "predictions": predictions,
    }


def blind_baselines(
    training: Sequence[Record] | None, records: Sequence[Record]
) -> dict[str, Any] | None:
    """Accuracy without the image: with the most frequent answer, and with that of each question.

    Both are learnt from the training records; only what a model scores above them is seeing.
    """
    if not training:
        return None
    overall: Counter[str] = Counter()
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for record in training:
        for turn in record.turns:
            overall[normal(turn.answer)] += 1
            by_text[normal(turn.text)][normal(turn.answer)] += 1
    majority = overall.most_common(1)[0][0]
    best = {text: counts.most_common(1)[0][0] for text, counts in by_text.items()}
    truth = [(normal(record.turns[0].text), normal(record.turns[0].answer)) for record in records]
    return {
        "majority_answer": majority,
        "majority": share([majority == given for _, given in truth]),
        "per_question": share([best.get(text, majority) == given for text, given in truth]),
    }


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """Hits, total, their ratio and its binomial standard error."""
    total, correct = len(hits), sum(hits)
    ratio = correct / total
    error = math.sqrt(ratio * (1 - ratio) / total)
    return {"correct": correct, "total": total, "accuracy": ratio, "standard_error": error}


def spaced(records: Sequence[Record], limit: int) -> Sequence[Record]:
    """`limit` records, evenly spaced over all; all of them if `limit` is 0 or too large."""
    if not 0 < limit < len(records):
        return records
    return [records[i * len(records) // limit] for i in range(limit)]


def normal(text: str) -> str:
    """An answer or question as it is compared: lower case, single spaces, no final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").strip()


def _training_records(source: Source) -> Sequence[Record] | None:
    try:
        return source.load("train").records
    except InputError:  # the data a run was trained on may be gone
        return None
