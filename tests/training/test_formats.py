"""Records in every form: what is read, what a text may hold, and what a file must be."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pmod_model.data.broken import BrokenRecords
from pmod_model.data.errors import InputError
from pmod_model.data.reading import LazyRecords, load_records
from pmod_model.data.records import Turn, parse_record, parse_records

LLAVA = {
    "id": "7",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "blue"},
    ],
}
PICTURE = {"type": "image"}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def messages(*contents: Any, system: Any = None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def encoded(color: str = "blue") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_parts_and_texts_become_turns() -> None:
    parts = messages(
        [text("is"), PICTURE, text("like"), PICTURE],
        [text("no")],
        "why?",
        "so",
        system=[text("Be brief.")],
    )
    data = encoded()
    entry = {"messages": parts, "images": [{"bytes": data, "path": None}, "b.png"]}
    record = parse_record(entry, "x", 4)
    assert record.turns == (Turn("is\n<image>\nlike\n<image>", "no"), Turn("why?", "so"))
    assert record.images == (data, "b.png")
    assert (record.id, record.system, record.paths) == ("4", "Be brief.", ("b.png",))


def test_images_without_a_place_come_first() -> None:
    picture = Image.new("RGB", (4, 4))
    record = parse_record({"messages": messages("what?", "a"), "images": [picture] * 2}, "x", 0)
    assert record.turns[0].question == "<image><image>\nwhat?"
    marked = parse_record({"messages": messages("a <image>?", "a"), "images": [picture]}, "x", 0)
    assert marked.turns[0].question == "a <image>?"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"messages": []}, "messages: expected a list of messages, got an empty list"),
        ({"messages": messages("a")}, "an answer to every question, got 1 messages"),
        (
            {"messages": messages([text("<image>?")], "a")},
            "messages[0].content[0]: expected a text without <image>",
        ),
        (
            {"messages": messages([PICTURE, text("?")], "a")},
            "expected 0 <image> for 0 images, got 1",
        ),
        (
            {"messages": messages([text("?")], "a"), "images": ["a.png"]},
            "expected 1 <image> for 1 images, got 0",
        ),
        ({"messages": messages([{"type": "video"}], "a")}, "a part of type image or text"),
        ({"messages": messages([PICTURE], "a"), "images": ["x"]}, "expected a text, got none"),
        (
            {"messages": messages("a", "<image>b")},
            "messages[1].content: expected an answer without",
        ),
        ({"messages": messages("a", "b", system="<image>")}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, 'messages[1].role: expected "assi'),
        ({"messages": ["a", "b"]}, "messages[0]: expected an object with role and content"),
        ({"messages": messages(3, "b")}, "messages[0].content: expected a text or a list of parts"),
        ({"messages": messages("a", "b"), "images": [3]}, "images: expected a list of images or"),
        ({"messages": messages("a", "b"), "images": [], "image": "a"}, "image or images, got both"),
        ({**LLAVA, "messages": messages("a", "b")}, "conversations or messages, got both"),
        ({"messages": messages("a\ud800", "b")}, "messages[0].content: expected Unicode text"),
    ],
)
def test_malformed_messages_are_named(entry: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_record(entry, "x record 3", 3)
    assert message in str(caught.value)
    assert "x record 3" in str(caught.value)


def test_lines_are_records(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    both = {"messages": messages("what?", "a"), "images": ["b.png"]}
    path.write_bytes(f"\ufeff{json.dumps(LLAVA)}\r\n\r\n{json.dumps(both)}\r\n".encode())
    records = load_records(path)
    assert [record.id for record in records] == ["7", "3"]
    assert [record.place.split(" (")[0] for record in records] == [
        "data.jsonl line 1",
        "data.jsonl line 3",
    ]
    path.write_text(json.dumps(LLAVA) + "\n{")
    with pytest.raises(InputError, match=r"data\.jsonl line 2: record: expected JSON"):
        load_records(path)


WHOLE = json.dumps([LLAVA])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 1_000_000, "nested too deep"),
        ('{"a":' * 1_000_000, "nested too deep"),
        (WHOLE.replace('"7"', "NaN"), "expected JSON, got NaN"),
        (WHOLE.replace('"7"', "-Infinity"), "expected JSON, got -Infinity"),
        (WHOLE.replace('"7"', "1e999"), "id: expected a string or a number, got float"),
        (WHOLE.replace('"7"', "9" * 5000), "expected JSON, got Exceeds the limit"),
        (WHOLE.replace('"7"', '"7", "id": "8"'), "each key of an object once, got 'id' twice"),
        (WHOLE[:-1] + ",]", "line 1 column"),
        (WHOLE.replace("blue", "\\ud800"), "a lone surrogate at character 0"),
        (WHOLE.replace("a.png", "\\udfff"), "a lone surrogate"),
        (WHOLE.replace('"7"', '"\\ud800"'), "id: expected Unicode text"),
        (WHOLE[:40], "line 1 column"),
        (f"{json.dumps(LLAVA)}\n" * 2, r"Extra data at line 2 column 1; .*named .jsonl"),
        ("", "Expecting value at line 1"),
        (b"\xff\xfe[", "JSON in UTF-8"),
    ],
)
def test_odd_json_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_records(path)
    assert "data.json" in str(caught.value)


def test_byte_order_mark_and_line_ends_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(("\ufeff" + json.dumps([LLAVA], indent=1)).replace("\n", "\r\n").encode())
    assert [record.id for record in load_records(path)] == ["7"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
TEXT = st.sampled_from(["", " ", "hi", "<image>", "<image>\nhi", "\ud800", "</s>"]) | st.text()
SAID = st.fixed_dictionaries(
    {}, optional={"from": st.sampled_from(["human", "gpt", "user", "x"]), "value": TEXT | ANYTHING}
)
PART = st.fixed_dictionaries({"type": st.sampled_from(["image", "text"])}, optional={"text": TEXT})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"])},
    optional={"content": TEXT | st.lists(PART | ANYTHING, max_size=3)},
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=3) | ANYTHING,
        "image": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3) | ANYTHING,
        "images": st.lists(st.text(max_size=3) | ANYTHING, max_size=2) | ANYTHING,
        "conversations": st.lists(SAID | ANYTHING, max_size=4) | ANYTHING,
        "messages": st.lists(MESSAGE | ANYTHING, max_size=4) | ANYTHING,
    },
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ENTRY | ANYTHING, max_size=3))
def test_any_json_is_records_or_a_named_error(raw: Any) -> None:
    broken = BrokenRecords("skip", 1)
    records = parse_records(raw, "data.json", broken)
    assert len(records) + broken.total == len(raw)
    assert all("data.json record" in message for message in broken.messages)
    for record in records:
        assert record.turns
        assert sum(turn.question.count("<image>") for turn in record.turns) == len(record.images)


WORDS = st.text(min_size=1, max_size=12).filter(
    lambda value: value.strip() and "<image>" not in value and value.isprintable()
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), WORDS, WORDS), min_size=1, max_size=4), st.integers())
def test_every_valid_record_is_read(turns: list[tuple[int, str, str]], name: int) -> None:
    said, count = [], 0
    for images, question, answer in turns:
        value = "<image>\n" * images + question
        said += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        count += images
    images = [f"{i}.png" for i in range(count)]
    (record,) = parse_records([{"id": name, "image": images, "conversations": said}], "x")
    assert record.id == str(name)
    assert [turn.answer for turn in record.turns] == [answer.strip() for *_, answer in turns]
    assert len(record.images) == count


def test_lazy_records_are_checked_when_asked_for() -> None:
    rows = LazyRecords([LLAVA, {"messages": []}, LLAVA], "set")
    assert len(rows) == 3
    assert rows[-1].id == "7"
    assert [record.id for record in rows[::2]] == ["7", "7"]
    with pytest.raises(InputError, match="set record 1"):
        rows[1]


def test_datasets_keep_images_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    said = [messages([PICTURE, text("what?")], [text("a")]) for _ in range(2)]
    for message in said[0]:
        message["content"] = [{"text": None, **part} for part in message["content"]]
    pictures = [[Image.new("RGB", (5, 3))], [Image.new("RGB", (4, 2))]]
    features = datasets.Features(
        {
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List(
                        {"type": datasets.Value("string"), "text": datasets.Value("string")}
                    ),
                }
            ),
            "images": datasets.List(datasets.Image()),
        }
    )
    made = datasets.Dataset.from_dict({"messages": said, "images": pictures}, features=features)
    path = tmp_path / "set.parquet"
    made.to_parquet(str(path))
    for records in (LazyRecords(made, "set"), load_records(path)):
        assert [record.turns for record in records] == [(Turn("<image>\nwhat?", "a"),)] * 2
        assert all(isinstance(record.images[0], bytes) for record in records)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"set\.parquet: file: expected a parquet file"):
        load_records(path)
