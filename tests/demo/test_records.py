"""LLaVA records: what is read, and which record an error names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pmod_model.data.easyvqa import easy_vqa_records
from pmod_model.data.errors import InputError
from pmod_model.data.reading import check_images, load_records
from pmod_model.data.records import Turn, messages_of, parse_records

HUMAN = {"from": "human", "value": "<image>\nwhat color is it?"}
GPT = {"from": "gpt", "value": "blue"}


def record(**changes: Any) -> dict[str, Any]:
    return {"id": "7", "image": "a.png", "conversations": [HUMAN, GPT]} | changes


def test_record_is_read_with_its_turns() -> None:
    (parsed,) = parse_records(
        [record(conversations=[HUMAN, GPT, {**HUMAN, "value": "sure?"}, GPT])], "x"
    )
    assert parsed.images == ("a.png",)
    assert parsed.turns == (Turn("<image>\nwhat color is it?", "blue"), Turn("sure?", "blue"))
    assert parsed.turns[0].text == "what color is it?"


def test_text_only_and_several_images_are_accepted() -> None:
    text = {"from": "human", "value": "hello"}
    both = {"from": "human", "value": "<image> or <image>?"}
    parsed = parse_records(
        [
            record(image=None, conversations=[text, GPT]),
            record(image=["a", "b"], conversations=[both, GPT]),
        ],
        "x",
    )
    assert [len(p.images) for p in parsed] == [0, 2]


def test_image_markers_become_content_parts_in_order() -> None:
    content = messages_of([Turn("is <image> like <image>", "no")])[0]["content"]
    assert [part["type"] for part in content] == ["text", "image", "text", "image"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (record(conversations=[]), "conversations: expected a list of messages, got an empty list"),
        ({"id": "7"}, "conversations: expected a list of messages, got none"),
        (record(conversations=[HUMAN]), "an answer to every question, got 1 messages"),
        (record(conversations=[GPT, HUMAN]), 'conversations[0].from: expected "human" or "user"'),
        (
            record(conversations=[HUMAN, {**GPT, "value": " "}]),
            "conversations[1].value: expected a text",
        ),
        (record(conversations=[HUMAN, {**GPT, "value": "<image>a"}]), "an answer without <image>"),
        (record(conversations=[HUMAN, "blue"]), "conversations[1]: expected an object"),
        (record(conversations="x"), "conversations: expected a list of messages, got str"),
        (record(image=["a", "b"]), "expected 2 <image> for 2 images, got 1"),
        (record(image=3), "image: expected a path or a list of paths, got int"),
        (record(id=None), "id: expected a string or a number, got null"),
        ("text", "record: expected an object, got str"),
    ],
)
def test_malformed_record_is_named(raw: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_records([record(), raw], "data.json")
    assert "data.json record 1" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1,', "data.json: file: expected JSON, got"),
        ("[]", "a list of records, got an empty list"),
        ('{"a": 1}', "a list of records, got a JSON dict"),
    ],
)
def test_malformed_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"data\.json") as caught:
        load_records(path)
    assert message in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json.*No such file"):
        load_records(tmp_path / "absent.json")


def test_missing_image_is_found_before_training(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record()]))
    with pytest.raises(InputError, match=r"data\.json record 0 .*a\.png.*No such file"):
        check_images(load_records(path), tmp_path, path.name)
    with pytest.raises(InputError, match="--image-folder"):
        check_images(load_records(path), None, path.name)


def test_easy_vqa_is_grouped_for_training_and_single_for_testing() -> None:
    train, folder = easy_vqa_records("train")
    test, _ = easy_vqa_records("test")
    assert len(train) == 4000
    assert sum(len(r.turns) for r in train) == 38575
    assert len(test) == 9673
    assert all(len(r.turns) == 1 for r in test)
    assert (folder / train[0].images[0]).is_file()
