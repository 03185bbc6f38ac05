"""Test images of the report: what both models answered, and which image tokens each layer kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from pmod_model.data.encoding import encode_prompt
from pmod_model.report.comparison import Run
from pmod_model.report.kept import record_kept
from pmod_model.report.pictures import data_uri, kept_view, model_view
from pmod_model.training.answering import Question, record_question
from pmod_model.training.evaluate import normal
from pmod_model.training.sources import Data

QUESTIONS = 3


@dataclass(frozen=True)
class Answer:
    """A question, the true answer, and what each model said (None: not recorded)."""

    question: str
    truth: str
    pmod: str | None
    dense: str | None

    def right(self, model: Literal["pmod", "dense"]) -> bool:
        """Whether that model's words equal the truth."""
        given: str | None = getattr(self, model)
        return given is not None and normal(given) == normal(self.truth)


@dataclass(frozen=True)
class Tile:
    """One layer's view of an image."""

    label: str
    detail: str
    uri: str


@dataclass(frozen=True)
class Example:
    """A test image, its questions, and one tile for each group of layers."""

    name: str
    uri: str
    asked: str
    answers: Sequence[Answer]
    tiles: Sequence[Tile]


def choose_examples(pmod: Run, dense: Run, data: Data, count: int) -> list[Example]:
    """`count` images, evenly spaced through those asked about, each with up to three questions."""
    groups = _answers_by_image(pmod, dense)
    names = list(groups)
    chosen = [names[i * len(names) // count] for i in range(min(count, len(names)))]
    # the first record of an image, whose question the page says it draws the routing for
    by_image = {record.image_name: record for record in reversed(data.records) if record.images}
    examples = []
    for name in chosen:
        if name in by_image:
            question = record_question(by_image[name], data.folder, data.name)
            examples.append(_example(pmod, name, question, groups[name][:QUESTIONS]))
    return examples


def _answers_by_image(pmod: Run, dense: Run) -> dict[str, list[Answer]]:
    lists: list[dict[str, Any]] = [
        {} if run.evaluation is None else {p["id"]: p for p in run.evaluation["predictions"]}
        for run in (pmod, dense)
    ]
    groups: dict[str, list[Answer]] = defaultdict(list)
    for key, prediction in (lists[0] or lists[1]).items():
        if prediction["image"] is not None:
            given = [answers.get(key, {}).get("generated") for answers in lists]
            groups[prediction["image"]].append(
                Answer(prediction["question"], prediction["answer"], *given)
            )
    for answers in groups.values():  # what is seen is more telling than yes or no
        answers.sort(key=lambda answer: normal(answer.truth) in ("yes", "no"))
    return groups


def _example(run: Run, name: str, question: Question, answers: Sequence[Answer]) -> Example:
    inputs = encode_prompt(run.processor, question.turn, question.image, question.system)
    vision = inputs["input_ids"] == run.model.config.image_token_id
    settings = run.processor.image_processor
    seen = model_view(inputs["pixel_values"][0], settings.image_mean, settings.image_std)
    kept = record_kept(run.model, inputs)
    tiles = _tiles(seen, kept, run.facts["layers"], int(vision.sum()))
    return Example(name, data_uri(seen), question.turn.text, answers, tiles)


def _tiles(seen: Image.Image, kept: dict[int, Tensor], layers: int, tokens: int) -> list[Tile]:
    dense = [layer for layer in range(layers) if layer not in kept]
    tiles = []
    if dense:
        label = f"layer {_ranges(dense)}"
        tiles.append(Tile(label, f"dense: all {tokens}", data_uri(seen)))
    for layer, mask in sorted(kept.items()):
        detail = f"{int(mask.sum())} of {tokens}"
        tiles.append(Tile(f"layer {layer}", detail, data_uri(kept_view(seen, mask))))
    return tiles


def _ranges(numbers: Sequence[int]) -> str:
    """Text for 0, 1, 2, 5: "0-2, 5"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{g[0]}" if len(g) == 1 else f"{g[0]}\N{EN DASH}{g[-1]}" for g in groups)
