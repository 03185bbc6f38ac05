"""Random changes of training images that leave the answers true, from a given source of numbers.

Which of them are allowed is for the user to say: a mirrored picture makes "on the left" wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps

from pmod_model.data.errors import InputError

NONE = "none"
LARGEST_SHIFT = 8  # a picture moves by at most 1 / LARGEST_SHIFT of its side


def augment(image: Image.Image, names: Sequence[str], rng: random.Random) -> Image.Image:
    """Change `image` by each of `names` in turn; the size stays.

    Args:
        image: RGB.
        names: of `NAMES`: "flip" mirrors left and right, half of the time; "shift" moves the
            picture by up to an eighth of its sides (whole pixels) and repeats the edge.
        rng: the only source of randomness.

    Raises:
        InputError: an unknown name.
    """
    for name in check_names(names):
        image = CHANGES[name](image, rng)
    return image


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """`names` without "none".

    Raises:
        InputError: an unknown name.
    """
    wanted = [names] if isinstance(names, str) else names
    for name in wanted:
        if name not in NAMES:
            raise InputError("data", "augment", f"one of {', '.join(NAMES)}", repr(name))
    return tuple(name for name in wanted if name != NONE)


def _flip(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _shift(image: Image.Image, rng: random.Random) -> Image.Image:
    across, down = (side // LARGEST_SHIFT for side in image.size)
    x, y = rng.randint(-across, across), rng.randint(-down, down)
    rows = np.arange(image.height)
    columns = np.arange(image.width)
    rows, columns = (rows - y).clip(0, len(rows) - 1), (columns - x).clip(0, len(columns) - 1)
    return Image.fromarray(np.asarray(image)[rows[:, None], columns])


CHANGES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "flip": _flip,
    "shift": _shift,
}
NAMES = (NONE, *CHANGES)
