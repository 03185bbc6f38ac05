"""Token ids and labels: only answers are learnt, at positions that come from the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pmod_model.data.collators import Collator
from pmod_model.data.dataset import ConversationDataset
from pmod_model.data.encoding import encode_conversation, encode_prompt
from pmod_model.data.errors import InputError
from pmod_model.data.processor import build_processor
from pmod_model.data.records import Record, Turn

TURNS = [Turn("<image>\nwhat color is the shape?", "blue"), Turn("is there a circle?", "no")]


def learnt(processor: Any, labels: torch.Tensor) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())


def test_labels_are_the_answers_and_their_ends(processor: Any, picture: Image.Image) -> None:
    encoded = encode_conversation(processor, TURNS, [picture], "x")
    assert learnt(processor, encoded["labels"]) == ["blue", "<eos>", "no", "<eos>"]
    kept = encoded["labels"] != -100
    assert torch.equal(encoded["labels"][kept], encoded["input_ids"][kept])
    assert encoded["pixel_values"].shape == (1, 3, 64, 64)
    assert int((encoded["input_ids"] == processor.image_token_id).sum()) == 64


def test_answer_that_repeats_the_question_is_labelled_once(
    processor: Any, picture: Image.Image
) -> None:
    turns = [Turn("<image>\nis there a blue shape?", "is there a blue shape?")]
    encoded = encode_conversation(processor, turns, [picture], "x")
    positions = (encoded["labels"] != -100).nonzero().flatten().tolist()
    length = len(encoded["input_ids"])
    assert positions == list(range(length - 7, length))  # six words or marks, and the end


def test_prompt_is_the_conversation_up_to_the_answer(processor: Any, picture: Image.Image) -> None:
    prompt = encode_prompt(processor, TURNS[0], picture)
    whole = encode_conversation(processor, TURNS[:1], [picture], "x")
    assert torch.equal(whole["input_ids"][: len(prompt["input_ids"])], prompt["input_ids"])
    assert (whole["labels"][: len(prompt["input_ids"])] == -100).all()
    assert len(whole["input_ids"]) == len(prompt["input_ids"]) + 2


def test_template_without_an_end_gets_one(processor: Any, picture: Image.Image) -> None:
    template = processor.chat_template
    processor.chat_template = template.replace(
        "{{ eos_token if message['role'] == 'assistant' else '' }}", ""
    )
    try:
        encoded = encode_conversation(processor, TURNS, [picture], "x")
    finally:
        processor.chat_template = template
    assert learnt(processor, encoded["labels"]) == ["blue", "no", "<eos>"]


def test_template_that_rewrites_the_past_is_refused(processor: Any, picture: Image.Image) -> None:
    template = processor.chat_template
    processor.chat_template = "{{ messages | length }}" + template
    try:
        with pytest.raises(InputError, match="chat template"):
            encode_conversation(processor, TURNS, [picture], "data.json record 4")
    finally:
        processor.chat_template = template


def test_processor_is_saved_and_loaded(
    processor: Any, picture: Image.Image, tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    ours, theirs = (encode_conversation(p, TURNS, [picture], "x") for p in (processor, loaded))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_vocabulary_does_not_depend_on_the_order_of_records() -> None:
    records = [Record("0", (), (Turn("b a c", "a"),)), Record("1", (), (Turn("c d", "b"),))]
    vocabularies = [
        build_processor(order, 64, 8).tokenizer.get_vocab() for order in (records, records[::-1])
    ]
    assert vocabularies[0] == vocabularies[1]


def dataset(processor: Any, data: tuple[list[Record], Path], **options: Any) -> ConversationDataset:
    return ConversationDataset(*data, processor, **options)


def test_turns_depend_on_seed_epoch_and_index_only(processor: Any, training_records: Any) -> None:
    torch.manual_seed(1)
    first = dataset(processor, training_records, max_turns=3, seed=5)
    again = dataset(processor, training_records, max_turns=3, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first[7]["input_ids"], again[7]["input_ids"])
    again.set_epoch(1)
    assert not torch.equal(first[7]["input_ids"], again[7]["input_ids"])
    assert int((first[7]["labels"] != -100).sum()) == 6  # three answers of one word, and their ends


def test_image_stays_first_whatever_the_order(processor: Any, training_records: Any) -> None:
    ids = dataset(processor, training_records, max_turns=2)[3]["input_ids"]
    image = ids == processor.image_token_id
    assert image[1:65].all()
    assert int(image.sum()) == 64


def test_turns_of_several_images_stay_in_order(processor: Any, training_records: Any) -> None:
    records, folder = training_records
    names = (*records[0].images, *records[1].images)
    two = Record("two", names, (Turn("<image>\nis there a circle?", "no"), *records[1].turns[:1]))
    for epoch in range(4):
        drawn = dataset(processor, ([two], folder), max_turns=1, seed=1)
        drawn.set_epoch(epoch)
        assert drawn._turns(two, 0) == two.turns


def test_too_long_conversation_is_named(processor: Any, training_records: Any) -> None:
    with pytest.raises(
        InputError, match=r"record 2 \(id '2'\): length: expected at most 70 tokens"
    ):
        dataset(processor, training_records, max_length=70)[2]


def test_collator_pads_and_ignores_padding(processor: Any, training_records: Any) -> None:
    items = dataset(processor, training_records)
    features = [items[0], items[1]]
    pad = processor.tokenizer.pad_token_id
    batch = Collator(pad)(features)
    lengths = [len(feature["input_ids"]) for feature in features]
    assert lengths[0] != lengths[1]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == -100).all()
    assert (batch["input_ids"][padding] == pad).all()
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
