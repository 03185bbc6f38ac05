"""easy-VQA (Victor Zhou, MIT), the visual question answering set that ships as a PyPI package.

64 x 64 images of one coloured shape, in a training set (4,000 images) and a held-out test set
(1,000).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal

from pmod_model.data.errors import InputError
from pmod_model.data.records import IMAGE, Record, parse_records


def easy_vqa_records(split: Literal["train", "test"]) -> tuple[list[Record], Path]:
    """Records of one split, and the image folder.

    A training record holds all questions about one image, as LLaVA's own mixture does: the image is
    encoded once for about ten answers. A test record holds one question, so that no answer can leak
    into another.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import easy_vqa
    except ModuleNotFoundError:
        hint = "pip install easy-vqa"
        raise InputError("data", "easy-vqa", "the package installed", "no package", hint) from None
    if split == "train":
        questions, answers, images = easy_vqa.get_train_questions()
    else:
        questions, answers, images = easy_vqa.get_test_questions()
    groups: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for i, (question, answer, image) in enumerate(zip(questions, answers, images, strict=True)):
        groups[f"{image}" if split == "train" else f"{i}"].append((image, question, answer))
    raw = [_raw_record(name, turns) for name, turns in groups.items()]
    folder = Path(easy_vqa.__file__).parent / "data" / split / "images"
    return parse_records(raw, f"easy-vqa {split}"), folder


def _raw_record(name: str, turns: list[tuple[int, str, str]]) -> dict[str, object]:
    conversations = []
    for i, (_, question, answer) in enumerate(turns):
        value = question if i else f"{IMAGE}\n{question}"
        conversations += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{turns[0][0]}.png", "conversations": conversations}
