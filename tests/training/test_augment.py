"""Changes of images: what they do, and that only (seed, epoch, index) decides."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training.processors import llava_processor

from pmod_model.data.augment import augment
from pmod_model.data.dataset import ConversationDataset
from pmod_model.data.errors import InputError
from pmod_model.data.records import Record, Turn

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def test_flip_mirrors_half_of_the_time() -> None:
    made = [np.asarray(augment(PICTURE, ["flip"], random.Random(i))) for i in range(400)]
    mirrored = [np.array_equal(pixels, PIXELS[:, ::-1]) for pixels in made]
    assert all(m or np.array_equal(p, PIXELS) for m, p in zip(mirrored, made, strict=True))
    assert 140 < sum(mirrored) < 260  # 6 standard deviations of 400 throws of a coin


def test_shift_repeats_the_edge() -> None:
    found = set()
    for i in range(400):
        made = np.asarray(augment(PICTURE, ["shift"], random.Random(i)))
        shifts = [
            (x, y)
            for x in range(-3, 4)
            for y in range(-2, 3)
            if np.array_equal(
                made,
                np.pad(PIXELS, ((2, 2), (3, 3), (0, 0)), "edge")[2 - y : 18 - y, 3 - x : 27 - x],
            )
        ]
        assert len(shifts) == 1
        found.add(shifts[0])
    assert len(found) == 35  # 400 draws miss one of 35 once in 3,000 times


def test_none_leaves_the_picture() -> None:
    for names in ("none", [], ["none"]):
        assert augment(PICTURE, names, random.Random(0)) is PICTURE


def test_unknown_change_is_named() -> None:
    with pytest.raises(InputError, match="augment: expected one of none, flip, shift, got 'turn'"):
        augment(PICTURE, ["turn"], random.Random(0))
    with pytest.raises(InputError, match="augment"):
        ConversationDataset([], None, None, augment="turn")


def test_seed_epoch_and_index_decide(tmp_path: Path) -> None:
    records = [Record(str(i), (PICTURE,), (Turn("<image>\nwhat ?", "no"),)) for i in range(3)]
    processor = llava_processor()

    def pixels(seed: int, epoch: int, index: int, names: Any = ("flip", "shift")) -> Any:
        made = ConversationDataset(records, None, processor, augment=names, seed=seed)
        made.set_epoch(epoch)
        torch.manual_seed(random.randrange(1000))
        return tuple(made[index]["pixel_values"].flatten().tolist())

    places = [(seed, epoch, index) for seed in (0, 1) for epoch in range(3) for index in range(3)]
    first = [pixels(*place) for place in places]
    assert [pixels(*place) for place in places] == first
    assert len(set(first)) > 12  # of 70 changes, 18 drawn; fewer than 13 once in 10^6 times
    assert len({pixels(*place, names="none") for place in places}) == 1
