"""A processor for a model trained from scratch.

Its tokenizer knows the words of the data; its image processor is that of LLaVA-1.5.
It is saved and loaded like any other (`AutoProcessor`), with its chat template.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from pmod_model.data.records import IMAGE, Record

PAD, UNKNOWN, END, USER, ASSISTANT = "<pad>", "<unk>", "<eos>", "<user>", "<assistant>"
MAX_WORDS = 16_000
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)


def build_tokenizer(texts: Iterable[str], max_words: int = MAX_WORDS) -> PreTrainedTokenizerFast:
    """Tokenizer of the `max_words` most frequent lower-cased words and punctuation of `texts`."""
    tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [PAD, UNKNOWN, END, USER, ASSISTANT, IMAGE]
    trainer = WordLevelTrainer(vocab_size=max_words, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, IMAGE],
        padding_side="left",  # batched generation continues at the right end
        clean_up_tokenization_spaces=False,
    )


def build_processor(records: Iterable[Record], image_size: int, patch_size: int) -> LlavaProcessor:
    """Processor of a from-scratch model: `image_size` x `image_size` pixels, one token per patch.

    Images keep their aspect: they are padded to a square, then resized.
    """
    tokenizer = build_tokenizer(
        text for record in records for turn in record.turns for text in (turn.text, turn.answer)
    )
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"height": image_size, "width": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",  # the vision tower has no class token
        chat_template=CHAT_TEMPLATE,
    )
