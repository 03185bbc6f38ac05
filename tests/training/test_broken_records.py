"""Records that cannot be used: each kind under each policy, at the start and later."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from training.processors import llava_processor
from training.test_pictures import png

from pmod_model.data.broken import KINDS, BrokenRecords
from pmod_model.data.checking import check_records
from pmod_model.data.collators import Collator, PackedCollator
from pmod_model.data.dataset import ConversationDataset
from pmod_model.data.errors import InputError
from pmod_model.data.reading import LazyRecords, load_records
from pmod_model.data.stream import ConversationStream
from pmod_model.training.sources import Source

GOOD = 40


@pytest.fixture(scope="module")
def processor() -> Any:
    return llava_processor()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "images"
    inside.mkdir()
    for i in range(GOOD):
        Image.new("RGB", (8, 6), (i, 2 * i, 0)).save(inside / f"{i}.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "outside.png")
    (inside / "empty.png").touch()
    (inside / "text.jpg").write_text("no picture")
    (inside / "cut.png").write_bytes((inside / "1.png").read_bytes()[:40])
    (inside / "huge.png").write_bytes(png(13_000, 13_000))
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "zero.png").symlink_to("/dev/zero")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "folder.png").mkdir()
    os.mkfifo(inside / "pipe.png")
    return inside


def record(
    name: str, image: Any = None, question: str = "what color ?", answer: str = "blue"
) -> Any:
    count = 0 if image is None else 1 if isinstance(image, str) else len(image)
    said = [("human", "<image>\n" * count + question), ("gpt", answer)]
    conversations = [{"from": who, "value": value} for who, value in said]
    return {"id": name, "image": image, "conversations": conversations}


def good(count: int = GOOD) -> list[Any]:
    """Every fourth without an image."""
    return [record(f"good {i}", f"{i}.png" if i % 4 else None) for i in range(count)]


BROKEN: dict[str, tuple[str, Any, str]] = {
    "missing": ("missing image", record("bad", "absent.png"), "No such file"),
    "empty": ("unreadable image", record("bad", "empty.png"), "0 bytes"),
    "text": ("unreadable image", record("bad", "text.jpg"), "10 bytes of another kind"),
    "cut header": ("unreadable image", record("bad", "cut.png"), "expected an image (PNG"),
    "huge": ("large image", record("bad", "huge.png"), "at most 50,000,000 pixels"),
    "dots": ("image path", record("bad", "../outside.png"), "one that leaves it"),
    "absolute": ("image path", record("bad", "/etc/hostname"), "one that leaves it"),
    "link": ("image path", record("bad", "link.png"), "one that leaves it"),
    "device": ("image path", record("bad", "zero.png"), "one that leaves it"),
    "loop": ("image path", record("bad", "loop.png"), "loop"),
    "url": ("image path", record("bad", "http://example.org/a.png"), "a relative file path"),
    "nul": ("image path", record("bad", "a\0.png"), "a relative file path"),
    "directory": ("image path", record("bad", "folder.png"), "not a regular file"),
    "pipe": ("image path", record("bad", "pipe.png"), "not a regular file"),
    "too few markers": ("image count", {**record("bad"), "image": "1.png"}, "got 0"),
    "too many": ("image count", {**record("bad", "1.png"), "image": None}, "got 1"),
    "image in answer": ("image count", record("bad", answer="a <image>"), "without <image>"),
    "empty answer": ("no text", record("bad", answer=" "), "a text"),
    "end in text": ("special token", record("bad", question="is <eos> a tag ?"), "'<eos>'"),
    "role in text": ("special token", record("bad", answer="<assistant> no"), "'<assistant>'"),
    "long": ("length", record("bad", "1.png", "what " * 100), "at most 64 tokens, got 1"),
    "malformed": ("record", {"id": "bad"}, "a list of messages, got none"),
    "no object": ("record", 3, "an object, got int"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_record_is_an_error_or_left_out(case: str, folder: Path, processor: Any) -> None:
    kind, bad, message = BROKEN[case]
    rows = [*good()[:20], bad, *good()[20:]]
    records = LazyRecords(rows, "set")
    with pytest.raises(InputError) as caught:
        check_records(records, folder, processor, max_length=64)
    assert message in str(caught.value)
    name = "20" if bad == 3 else "bad"
    assert "set record 20" in str(caught.value)
    assert f"id {name!r}" in str(caught.value) or bad == 3
    broken = BrokenRecords("skip")
    checked = check_records(records, folder, processor, max_length=64, broken=broken)
    assert broken.ids == {kind: [name]}
    assert kind in KINDS
    assert message in broken.messages[0]
    assert [row.id for row in checked.records] == [f"good {i}" for i in range(GOOD)]
    assert checked.has_images == [bool(i % 4) for i in range(GOOD)]
    dataset = ConversationDataset(checked.records, folder, processor, max_length=64)
    assert [len(dataset[i]["input_ids"]) for i in range(GOOD)] == checked.lengths


def test_only_decoding_finds_a_cut_picture(folder: Path, processor: Any) -> None:
    noise = Image.effect_noise((64, 64), 90)
    noise.save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-500])
    records = LazyRecords([*good(), record("bad", "half.jpg")], "set")
    assert len(check_records(records, folder, processor).records) == GOOD + 1
    with pytest.raises(InputError, match=r"set record 40 \(id 'bad'\).*complete, readable"):
        check_records(records, folder, processor, decode=True)


def test_too_many_broken_records_are_an_error(folder: Path, processor: Any) -> None:
    rows = [*good(38), *(record(f"bad {i}", "absent.png") for i in range(2))]
    check_records(LazyRecords(rows, "set"), folder, processor, broken=BrokenRecords("skip"))
    rows = rows[1:]  # 2 of 39 are more than 5 %
    message = r"at most 5.0% broken records.*2 broken \(missing image 2\) of 39, ids bad 0, bad 1"
    with pytest.raises(InputError, match=message):
        check_records(LazyRecords(rows, "set"), folder, processor, broken=BrokenRecords("skip"))
    rows = [record(f"bad {i}", "absent.png") for i in range(30)]
    everything = BrokenRecords("skip", max_share=1)
    with pytest.raises(InputError, match="bad 19 and 10 more; the first: pmod set record 0"):
        check_records(LazyRecords(rows, "set"), folder, processor, broken=everything)


def test_share_counts_what_the_file_was_missing(
    tmp_path: Path, folder: Path, processor: Any
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*good(19), {"id": "a"}]))
    broken = BrokenRecords("skip")
    records = load_records(path, broken)
    assert (len(records), broken.counts) == (19, {"record": 1})
    check_records(records, folder, processor, broken=broken)
    path.write_text("\n".join([*map(json.dumps, good(19)), "{", "{"]))
    path.rename(path.with_suffix(".jsonl"))
    with pytest.raises(InputError, match=r"2 broken \(record 2\) of 21, ids 20, 21"):
        load_records(path.with_suffix(".jsonl"), BrokenRecords("skip"))


def test_source_leaves_images_to_the_check(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [*good(39), record("bad", "absent.png")])))
    source = Source(str(path), str(folder))
    with pytest.raises(InputError, match=r"data.jsonl line 40 \(id 'bad'\).*No such file"):
        source.load("train")
    assert len(source.load("train", BrokenRecords("skip")).records) == 40


def test_report_is_saved(tmp_path: Path) -> None:
    broken = BrokenRecords("skip", 0.5)
    broken.add("a", InputError("x", "image", "y", "z", kind="image path"))
    broken.save(tmp_path / "broken.json")
    assert json.loads((tmp_path / "broken.json").read_text()) == {
        "on_broken": "skip",
        "max_broken_share": 0.5,
        "total": 1,
        "counts": {"image path": 1},
        "ids": {"image path": ["a"]},
        "messages": ["pmod x: image: expected y, got z"],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("ignore",), "on_broken: expected error or skip"), (("skip", 1.5), "max_broken_share")],
)
def test_unknown_policy_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BrokenRecords(*arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_record_that_breaks_later_is_replaced(
    folder: Path, processor: Any, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    records = LazyRecords(good(), "set")
    checked = check_records(records, folder, processor)
    dataset = ConversationDataset(
        checked.records, folder, processor, seed=4, broken=BrokenRecords("skip")
    )
    (folder / "5.png").unlink()
    loader = DataLoader(dataset, 4, collate_fn=Collator(0), num_workers=workers)
    with caplog.at_level(logging.WARNING, "pmod_model.data.dataset"):
        batches = list(loader)
    assert len(batches) == GOOD // 4
    assert sum(len(batch["pixel_values"]) for batch in batches) == 30  # an image for an image
    assert dataset.replaced() == {"missing image": ["good 5"]}
    assert dataset.report()["replaced"] == {"missing image": ["good 5"]}
    assert len(caplog.records) == (0 if workers else 1)
    again = list(DataLoader(dataset, 4, collate_fn=Collator(0)))
    for one, other in zip(batches, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    dataset.set_epoch(1)
    others = {tuple(dataset[5]["pixel_values"].flatten().tolist())}
    for epoch in range(2, 6):
        dataset.set_epoch(epoch)
        others.add(tuple(dataset[5]["pixel_values"].flatten().tolist()))
    assert len(others) > 1


def test_record_that_breaks_later_is_an_error_by_default(folder: Path, processor: Any) -> None:
    dataset = ConversationDataset(LazyRecords(good(), "set"), folder, processor)
    (folder / "5.png").unlink()
    with pytest.raises(InputError, match=r"set record 5 \(id 'good 5'\).*No such file"):
        dataset[5]


def test_too_many_that_break_later_are_an_error(folder: Path, processor: Any) -> None:
    dataset = ConversationDataset(
        LazyRecords(good(), "set"), folder, processor, broken=BrokenRecords("skip")
    )
    for i in (5, 6, 7):
        (folder / f"{i}.png").unlink()
    assert dataset[5].keys() == dataset[6].keys()
    with pytest.raises(InputError, match=r"at most 5.0% records that break .* 3 of 40, ids"):
        dataset[7]


def stream(
    rows: Callable[[], Any], folder: Path, processor: Any, **options: Any
) -> ConversationStream:
    class Rows:
        def __iter__(self) -> Any:
            return iter(rows())

    return ConversationStream(Rows(), folder, processor, **options)


def test_stream_yields_what_the_data_set_does(folder: Path, processor: Any) -> None:
    dataset = ConversationDataset(LazyRecords(good(), "set"), folder, processor)
    found = list(stream(good, folder, processor))
    assert len(found) == GOOD
    for i, encoded in enumerate(found):
        assert all(torch.equal(encoded[name], dataset[i][name]) for name in encoded)
    loader = DataLoader(
        stream(good, folder, processor), 5, collate_fn=PackedCollator(), num_workers=2
    )
    ids = torch.cat([batch["input_ids"][0] for batch in loader])
    assert len(ids) == sum(len(encoded["input_ids"]) for encoded in found)


@pytest.mark.parametrize("case", BROKEN)
def test_stream_stops_or_goes_on(case: str, folder: Path, processor: Any) -> None:
    kind, bad, message = BROKEN[case]
    options = {"max_length": 64}
    with pytest.raises(InputError) as caught:
        list(stream(lambda: [*good(), bad], folder, processor, **options))
    assert message in str(caught.value)
    broken = BrokenRecords("skip")
    rows = stream(lambda: [bad, *good()], folder, processor, broken=broken, **options)
    assert len(list(rows)) == GOOD
    assert broken.counts == {kind: 1}
    rows = stream(lambda: [bad] * 2, folder, processor, broken=BrokenRecords("skip"), **options)
    with pytest.raises(InputError, match=r"at most 5.0% broken records.* of 2, ids"):
        list(rows)


def test_used_up_generator_is_named(folder: Path, processor: Any) -> None:
    rows = ConversationStream((row for row in good(4)), folder, processor)
    assert len(list(rows)) == 4
    with pytest.raises(InputError, match="source: expected at least one record, in every epoch"):
        list(rows)
