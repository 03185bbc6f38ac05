"""A few real easy-VQA records as a user's own LLaVA json, and a processor built from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pmod_model.data.easyvqa import easy_vqa_records
from pmod_model.data.processor import build_processor
from pmod_model.data.records import Record


@pytest.fixture(scope="session")
def training_records() -> tuple[list[Record], Path]:
    records, folder = easy_vqa_records("train")
    return records[:40], folder


@pytest.fixture(scope="session")
def processor(training_records: tuple[list[Record], Path]) -> Any:
    return build_processor(training_records[0], image_size=64, patch_size=8)


@pytest.fixture
def picture() -> Image.Image:
    """64 x 64, a blue square on the upper left eighth of a white ground."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste((0, 0, 255), (0, 0, 8, 8))
    return image


@pytest.fixture
def user_data(
    tmp_path: Path, training_records: tuple[list[Record], Path]
) -> Callable[[int], tuple[Path, Path]]:
    """Writes the first records as `data.json` beside a folder `images`; returns both paths."""
    records, source = training_records

    def write(count: int) -> tuple[Path, Path]:
        folder = tmp_path / "images"
        folder.mkdir()
        for record in records[:count]:
            shutil.copy(source / record.images[0], folder)
        raw = [
            {
                "id": record.id,
                "image": record.images[0],
                "conversations": [
                    message
                    for turn in record.turns
                    for message in (
                        {"from": "human", "value": turn.question},
                        {"from": "gpt", "value": turn.answer},
                    )
                ],
            }
            for record in records[:count]
        ]
        path = tmp_path / "data.json"
        path.write_text(json.dumps(raw))
        return path, folder

    return write
