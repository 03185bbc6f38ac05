"""Scores: exact match, standard errors, and what can be had without the image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pmod_model.data.easyvqa import easy_vqa_records
from pmod_model.data.encoding import encode_prompt
from pmod_model.data.errors import InputError
from pmod_model.data.records import Record, Turn
from pmod_model.training.answering import make_question, record_question, unknown_words
from pmod_model.training.evaluate import blind_baselines, normal, score, share, spaced


def question(text: str, answer: str, name: str = "0") -> Record:
    return Record(name, ("a.png",), (Turn(f"<image>\n{text}", answer),))


def test_blind_answers_of_easy_vqa() -> None:
    train, _ = easy_vqa_records("train")
    test, _ = easy_vqa_records("test")
    blind = blind_baselines(train, test)
    assert blind is not None
    assert blind["majority_answer"] == "yes"
    assert round(100 * blind["majority"]["accuracy"], 1) == 37.3
    assert round(100 * blind["per_question"]["accuracy"], 1) == 67.0


def test_unseen_question_falls_back_to_the_majority() -> None:
    train = [question("a?", "yes"), question("b?", "no"), question("c?", "yes")]
    blind = blind_baselines(
        train, [question("b?", "no"), question("new?", "yes"), question("a?", "no")]
    )
    assert blind is not None
    assert blind["per_question"]["correct"] == 2
    assert blind["majority"]["correct"] == 1


def test_no_training_data_means_not_recorded() -> None:
    assert blind_baselines(None, [question("a?", "yes")]) is None


def test_answers_are_compared_but_for_case_space_and_full_stop() -> None:
    assert normal("  A  Blue\nCircle. ") == "a blue circle"
    result = score([question("a?", "Yes"), question("b?", "red")], [" yes.", "reddish"])
    assert [p["correct"] for p in result["predictions"]] == [True, False]
    assert result["by_kind"]["yes/no"]["accuracy"] == 1
    assert result["by_kind"]["other"]["accuracy"] == 0


def test_standard_error_is_binomial() -> None:
    result = share([True] * 30 + [False] * 10)
    assert result["accuracy"] == 0.75
    assert result["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 40))


def test_spaced_questions_cover_the_set() -> None:
    records = [question("a?", "b", str(i)) for i in range(10)]
    assert [record.id for record in spaced(records, 4)] == ["0", "2", "5", "7"]
    assert spaced(records, 0) is records
    assert spaced(records, 99) is records


def test_image_comes_first_unless_the_prompt_places_it(picture: Image.Image) -> None:
    assert make_question("color?", picture, "x").turn.question == "<image>\ncolor?"
    assert make_question("in <image>, color?", picture, "x").turn.question == "in <image>, color?"


def test_image_of_a_later_turn_comes_before_the_first_question(
    processor: Any, training_records: tuple[list[Record], Path]
) -> None:
    records, folder = training_records
    (name,) = records[0].images
    late = Record("7", (name,), (Turn("is it big?", "no"), Turn("<image>\ncolor?", "blue")))
    asked = record_question(late, folder, "data.json")
    assert asked.turn == Turn("<image>\nis it big?", "no")
    ids = encode_prompt(processor, asked.turn, asked.image)["input_ids"]
    assert int((ids == processor.image_token_id).sum()) == 64
    placed = Record("8", (name,), (Turn("in <image>, color?", "blue"),))
    assert record_question(placed, folder, "data.json").turn == placed.turns[0]
    text = Record("9", (), (Turn("color?", "blue"),))
    assert record_question(text, None, "data.json").turn == text.turns[0]


def test_record_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    several = Record("7", ("a.png", "b.png"), (Turn("<image> or <image>?", "b"),))
    with pytest.raises(
        InputError, match=r"data.json record \(id '7'\): image: expected at most one"
    ):
        record_question(several, tmp_path, "data.json")
    with pytest.raises(InputError, match=r"data.json record \(id '0'\): image 'a.png': expected"):
        record_question(question("a?", "b"), tmp_path, "data.json")


@pytest.mark.parametrize("prompt", ["", "  \n", "<image>"])
def test_empty_prompt_is_refused(prompt: str, picture: Image.Image) -> None:
    with pytest.raises(InputError, match="--prompt: expected a question"):
        make_question(prompt, picture, "generate")


def test_words_that_were_never_seen_are_known(processor: Any) -> None:
    assert unknown_words(processor, "what color is the zebra?") == ["zebra"]


def test_prompt_with_more_markers_than_images_is_refused(picture: Image.Image) -> None:
    with pytest.raises(InputError, match=r"1 <image> for 1 image\(s\), got 2"):
        make_question("<image><image>x", picture, "generate")
