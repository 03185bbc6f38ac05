"""What is learnt: answers and their ends, by LLaVA-1.5's template and the project's, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import normalizers
from training.processors import llava_processor, next_processor

from pmod_model.data.collators import Collator, dummy_image
from pmod_model.data.encoding import encode_conversation, tokenize_conversation
from pmod_model.data.errors import InputError
from pmod_model.data.processor import CHAT_TEMPLATE
from pmod_model.data.turns import Turn
from pmod_model.images import image_lengths

PICTURE = Image.new("RGB", (30, 20), "blue")
TURNS = [
    Turn("<image>\nwhat color is the shape ?", "blue"),
    Turn("assistant : is there a circle ?", "no ."),
    Turn("why ?", "be brief assistant : yes"),
]


def words(processor: Any, ids: Any) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.fixture(params=["llava-1.5", "project"])
def processor(request: pytest.FixtureRequest) -> Any:
    made = llava_processor()
    if request.param == "project":
        made.chat_template = CHAT_TEMPLATE
    return made


@pytest.mark.parametrize("system", ["", "be brief ."])
def test_answers_are_learnt_and_nothing_else(processor: Any, system: str) -> None:
    encoded = encode_conversation(processor, TURNS, [PICTURE], "x", system)
    ids, labels = encoded["input_ids"], encoded["labels"]
    learnt = labels != -100
    assert torch.equal(labels[learnt], ids[learnt])
    # LLaVA-1.5's template ends the last answer alone
    end = ["<eos>"] if processor.chat_template == CHAT_TEMPLATE else []
    answers = ["blue", *end, "no", ".", *end, "be", "brief", "assistant", ":", "yes", "<eos>"]
    assert words(processor, ids[learnt]) == answers
    # each answer as one run, after a word that opens it
    starts = (learnt[1:] & ~learnt[:-1]).nonzero()[:, 0]
    assert len(starts) == 3
    opens = "<assistant>" if end else ":"
    assert words(processor, ids[starts]) == [opens] * 3
    text = " ".join(words(processor, ids))
    assert ("be brief . " in text) == bool(system)
    assert int((ids == processor.image_token_id).sum()) == 16
    assert not bool(learnt[ids == processor.image_token_id].any())


@pytest.mark.parametrize("token", ["<image>", "<eos>", "<unk>", "<pad>", "<assistant>"])
@pytest.mark.parametrize("place", ["system", "question 1", "answer 0"])
def test_special_token_in_a_text_is_named(processor: Any, token: str, place: str) -> None:
    said = f"no {token * 3} yes"
    turns = [
        Turn("<image>\nwhat ?", said if place == "answer 0" else "blue"),
        Turn(said if place == "question 1" else "why ?", "no"),
    ]
    system = said if place == "system" else ""
    if (token, place) == ("<image>", "question 1"):
        # markers of images that are not there
        with pytest.raises(InputError, match="1 image tokens for 1 images, got 4"):
            encode_conversation(processor, turns, [PICTURE], "x", system)
        return
    with pytest.raises(InputError, match=f"{place}: expected a text without .*'{token}'") as caught:
        encode_conversation(processor, turns, [PICTURE], "x", system)
    assert caught.value.kind == "special token"


@pytest.mark.parametrize(
    "said", ["<ima\u200bge>", "< image >", "<IMAGE>", "[INST] no [/INST]", "</s>", "USER: no"]
)
def test_what_only_looks_like_a_token_is_text(processor: Any, said: str) -> None:
    encoded = encode_conversation(processor, [Turn(f"<image>\n{said}", said)], [PICTURE], "x")
    ids = encoded["input_ids"]
    assert int((ids == processor.image_token_id).sum()) == 16
    assert int((ids == processor.tokenizer.eos_token_id).sum()) == 1


@pytest.mark.parametrize(
    ("template", "got"),
    [
        ("{% for m in messages %}{{ m['role'] }} {% endfor %}", "assistant"),
        # of a text model: prints what is a list here
        ("{% for m in messages %}{{ m['role'] + m['content'] | string }}{% endfor %}", "'type'"),
    ],
)
def test_template_without_answers_is_named(processor: Any, template: str, got: str) -> None:
    processor.chat_template = template
    with pytest.raises(InputError, match="chat template: expected one that renders") as caught:
        tokenize_conversation(processor, [Turn("a", "no")], 0, "x")
    assert caught.value.kind == "template"
    assert got in str(caught.value)


def test_answer_without_tokens_is_named() -> None:
    processor = llava_processor()
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="an answer that template and tokenizer make tokens of"):
        tokenize_conversation(processor, [Turn("why ?", "~")], 0, "x")


def test_template_without_images_is_named(processor: Any) -> None:
    processor.chat_template = processor.chat_template.replace("<image>", "picture")
    with pytest.raises(InputError, match="chat template: expected one with 1 image tokens"):
        encode_conversation(processor, TURNS, [PICTURE], "x")


@pytest.mark.parametrize("make", [llava_processor, next_processor])
def test_dummy_image_has_the_tokens_of_its_pixels(make: Any) -> None:
    from training.tiny_models import make_model

    processor = make()
    made = dummy_image(processor)
    assert (made["input_ids"] == processor.image_token_id).all()
    if "image_sizes" in made:
        model = make_model("dense-next").model
        expected = image_lengths(model, made["image_sizes"].tolist())
    else:
        expected = [16]
    assert [len(made["input_ids"])] == expected
    text = encode_conversation(processor, [Turn("why ?", "no")], [], "x")
    batch = Collator(0, made)([text])
    assert int(batch["attention_mask"].sum()) == len(text["input_ids"])
    assert len(batch["pixel_values"]) == 1
