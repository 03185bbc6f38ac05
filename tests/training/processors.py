"""Processors of tiny models, with the template of LLaVA-1.5."""

from __future__ import annotations

from typing import Any

from model.llava_next import GRIDS, SIDE
from transformers import (
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from pmod_model.data.processor import build_tokenizer

# of llava-hf/llava-1.5-7b-hf
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WORDS = "user : assistant is there a circle ? what color shape blue red no yes be brief . image why"
TOKENIZER: dict[str, Any] = {"chat_template": LLAVA_TEMPLATE, "patch_size": 14}
SQUARE = {"height": SIDE, "width": SIDE}


def llava_processor() -> Any:
    return LlavaProcessor(
        LlavaImageProcessorPil(do_pad=True, size=SQUARE, crop_size=SQUARE),
        build_tokenizer([WORDS]),
        vision_feature_select_strategy="full",
        **TOKENIZER,
    )


def next_processor() -> Any:
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=GRIDS
        ),
        build_tokenizer([WORDS]),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **TOKENIZER,
    )
