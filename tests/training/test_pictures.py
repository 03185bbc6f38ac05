"""Pictures of every mode, shape and turn; files that would unpack to gigabytes."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training.processors import llava_processor, next_processor
from training.tiny_models import make_model

from pmod_model.data.encoding import encode_conversation
from pmod_model.data.errors import InputError
from pmod_model.data.images import open_source, source_size
from pmod_model.data.turns import Turn
from pmod_model.images import image_lengths

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"]
TURNS = [Turn("<image>\nwhat color?", "blue")]


@pytest.fixture(scope="module")
def processors() -> dict[str, Any]:
    return {"llava": llava_processor(), "next": next_processor()}


@pytest.fixture(scope="module")
def next_model() -> Any:
    return make_model("dense-next").model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 13])
def test_processor_and_model_count_alike(
    processors: dict[str, Any], next_model: Any, mode: str, width: int
) -> None:
    for height in (1, 2, 3, 4, 22, 1000):
        image = Image.new(mode, (width, height))
        if mode == "F":
            with pytest.raises(InputError, match="expected an image of 8 or 16 bits a shade"):
                open_source(image, None, "x")
            continue
        opened = open_source(image, None, "x")
        assert opened.size == source_size(image, None, "x") == (width, height)
        for name, processor in processors.items():
            made = encode_conversation(processor, TURNS, [opened], "x")
            tokens = int((made["input_ids"] == processor.image_token_id).sum())
            counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
            assert counted["num_image_tokens"] == [tokens]
            assert made["pixel_values"].isfinite().all()
            assert made["pixel_values"].shape[-3:] == (3, 56, 56)
            expected = 16
            if name == "next":
                assert made["image_sizes"].tolist() == [[height, width]]
                (expected,) = image_lengths(next_model, [(height, width)])
            assert tokens == expected


def test_a_picture_of_three_rows_is_no_picture_of_three_channels(processors: Any) -> None:
    processor = processors["llava"]
    made = encode_conversation(processor, TURNS, [Image.new("RGB", (22, 3), "red")], "x")
    shades = made["pixel_values"][0, :, 28, 28]  # in the middle: red, not padding
    mean, deviation = (
        torch.tensor(values)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    # float32 rounds 1 to 6e-8 a step, of which there are three
    torch.testing.assert_close(
        shades * deviation + mean, torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0
    )


def test_shades_of_16_bits_keep_their_order() -> None:
    image = Image.new("I;16", (3, 1))
    for x, shade in enumerate((0, 32768, 65535)):
        image.putpixel((x, 0), shade)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    opened = open_source(buffer.getvalue(), None, "x")
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in (0, 128, 255)]


def test_a_turned_picture_is_the_same_picture(processors: dict[str, Any]) -> None:
    picture = Image.effect_mandelbrot((40, 24), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    turn = Image.Transpose
    # what a camera stores that notes each orientation
    stored = {
        1: None,
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    made = []
    for orientation, method in stored.items():
        image = picture if method is None else picture.transpose(method)
        exif = image.getexif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        image.save(buffer, "PNG", exif=exif)
        assert source_size(buffer.getvalue(), None, "x") == picture.size
        opened = open_source(buffer.getvalue(), None, "x")
        made.append(encode_conversation(processors["next"], TURNS, [opened], "x"))
    for other in made[1:]:
        assert all(torch.equal(made[0][name], other[name]) for name in made[0])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *between: bytes) -> bytes:
    """A black picture of a bit a pixel."""
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    body = b"".join(between) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def bomb(name: str) -> bytes:
    sizes = {
        "square": (13_000, 13_000),
        "larger": (14_000, 14_000),
        "flat": (60_000, 1_400),
        "line": (50_000_000, 1),
    }
    if name in sizes:
        return png(*sizes[name])
    if name == "text":
        return png(8, 8, chunk(b"tEXt", b"a\0" + b"b" * 64_000_000))
    if name == "zipped text":
        return png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 64_000_000)))
    if name == "profile":
        return png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(64_000_000))))
    buffer = io.BytesIO()
    count = 30 if name == "TIFF" else 3_000
    frames = [Image.new("L", (16, 16), i % 256) for i in range(count)]
    frames[0].save(buffer, name, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


# Opens a small picture first, so that decoders are loaded, then the file; the peak of resident
# memory is the kernel's, in KB.
OPEN = """
import resource, sys, time
from pathlib import Path
from pmod_model.data.errors import InputError
from pmod_model.data.images import open_image
folder = Path(sys.argv[1])
open_image(folder / "small.png", "x")
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    print(open_image(folder / sys.argv[2], "x").size)
except InputError as error:
    print(error)
seconds = time.process_time() - start
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("square", "at most 50,000,000 pixels, got 169,000,000"),
        ("larger", "at most 50,000,000 pixels"),
        ("flat", "at most 50,000,000 pixels, got 84,000,000"),
        ("text", "at most 8,000,000 bytes beside the pixels, got 64,000,002"),
        ("zipped text", "a complete, readable image"),
        ("profile", "a complete, readable image"),
        ("line", "sides of at most 16,384 pixels, got 50000000 x 1"),
        ("GIF", "(16, 16)"),  # the first frame
        ("WEBP", "(16, 16)"),
        ("TIFF", "expected an image (PNG"),
    ],
)
def test_bombs_are_refused_from_the_header(tmp_path: Path, name: str, message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    (tmp_path / "bomb").write_bytes(bomb(name))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path), "bomb"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer, figures = done.stdout.strip().rsplit("\n", 1)
    assert message in answer
    kilobytes, seconds = figures.split()
    assert int(kilobytes) < 50_000
    # of this process alone, whatever else the machine does
    assert float(seconds) < 0.2
