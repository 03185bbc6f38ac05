"""Opens images that a data set or a user names or brings, and nothing else.

A data set is untrusted: its image paths may leave the folder, name a device, or decode to
gigabytes.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pmod_model.data.errors import InputError

MAX_IMAGE_PIXELS = 50_000_000
MAX_SIDE = 16_384  # LLaVA-1.5 pads to a square before it resizes
MAX_BYTES = 4 * MAX_IMAGE_PIXELS
MAX_CHUNK = 8_000_000
ORIENTATION = 0x0112  # of EXIF
SIDEWAYS = (5, 6, 7, 8)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
BACKGROUND = (255, 255, 255)


def resolve_image(folder: Path, name: str, place: str) -> Path:
    """Path of the image `name` of `folder`, which it must not leave, by `..` or by a link.

    Args:
        folder: the image folder.
        name: relative path, as a record gives it.
        place: named in the error.

    Raises:
        InputError: `name` is empty, absolute, a URL, holds a NUL or a backslash, leaves the folder,
            or is not an existing regular file with content.
    """
    argument = f"image {name!r}"
    if not name or "\0" in name or "\\" in name or urlsplit(name).scheme:
        raise InputError(place, argument, "a relative file path", name or "none", kind="image path")
    try:
        root = folder.resolve()
        path = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # links that lead to each other
        raise InputError(place, argument, "a path", error, kind="image path") from None
    if not path.is_relative_to(root):
        expected = f"a path inside {folder}"
        raise InputError(place, argument, expected, "one that leaves it", kind="image path")
    _check_file(path, place, argument)
    return path


def open_source(source: str | bytes | Image.Image, folder: Path | None, place: str) -> Image.Image:
    """The image of a record, as `open_image` decodes it.

    Args:
        source: a path relative to `folder`, an encoded file, or an image.
        folder: the image folder; None if no image is a path.
        place: named in the error.

    Raises:
        InputError: it cannot be used.
    """
    with _opened(source, folder, place) as (image, argument):
        return _decoded(image, place, argument)


def source_size(
    source: str | bytes | Image.Image, folder: Path | None, place: str
) -> tuple[int, int]:
    """Width and height of `open_source`, from the header of the file.

    Raises:
        InputError: the header is not that of an image that may be decoded.
    """
    # the EXIF block of a PNG may come after its pixels
    with _opened(source, folder, place) as (image, argument), _named(place, argument):
        turned = image.getexif().get(ORIENTATION) in SIDEWAYS
        return (image.height, image.width) if turned else image.size


def open_image(path: Path, place: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode the image at `path` to RGB: turned as EXIF says, transparency over white, first frame.

    Raises:
        InputError: not a regular file, not one of `FORMATS`, truncated, of more than `max_pixels`
            pixels, which the header tells before anything is decoded, of numbers that are no
            shades, or a PNG with more than `MAX_CHUNK` bytes of something else than pixels.
    """
    argument = f"image {str(path)!r}"
    _check_file(path, place, argument)
    with _file(path, place, argument) as file, _header(file, place, argument, max_pixels) as image:
        return _decoded(image, place, argument)


@contextmanager
def _opened(
    source: str | bytes | Image.Image, folder: Path | None, place: str
) -> Iterator[tuple[Image.Image, str]]:
    """The image of a record, of which only the header was read, and its name in errors."""
    if isinstance(source, Image.Image):
        argument = f"image of mode {source.mode}"
        _check_size(source, place, argument, MAX_IMAGE_PIXELS)
        yield source, argument
        return
    if isinstance(source, bytes):
        argument = f"image of {len(source)} bytes"
        with _header(io.BytesIO(source), place, argument, MAX_IMAGE_PIXELS) as image:
            yield image, argument
        return
    if folder is None:
        raise InputError(place, "--image-folder", "the folder of the images", "none")
    path = resolve_image(folder, source, place)
    argument = f"image {str(path)!r}"
    with (
        _file(path, place, argument) as file,
        _header(file, place, argument, MAX_IMAGE_PIXELS) as image,
    ):
        yield image, argument


@contextmanager
def _named(place: str, argument: str, size: int = 0) -> Iterator[None]:
    """Errors of Pillow under the name of the image."""
    try:
        yield
    except UnidentifiedImageError:
        expected = f"an image ({', '.join(FORMATS)})"
        got = f"{size} bytes of another kind"
        raise InputError(place, argument, expected, got, kind="unreadable image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        expected = f"at most {MAX_IMAGE_PIXELS:,} pixels"
        raise InputError(place, argument, expected, error, kind="large image") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, InputError):
            raise
        expected = "a complete, readable image"
        raise InputError(place, argument, expected, error, kind="unreadable image") from None


@contextmanager
def _file(path: Path, place: str, argument: str) -> Iterator[BinaryIO]:
    with _named(place, argument):
        # O_NONBLOCK: if a pipe took the file's place since the check, do not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        yield file


@contextmanager
def _header(file: BinaryIO, place: str, argument: str, max_pixels: int) -> Iterator[Image.Image]:
    size = file.seek(0, os.SEEK_END)
    with _named(place, argument, size):
        _check_chunks(file, size, place, argument)
        image = Image.open(file, formats=FORMATS)
    with image:
        _check_size(image, place, argument, max_pixels)
        yield image


def _check_size(image: Image.Image, place: str, argument: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        got = f"{image.width * image.height:,} ({image.width} x {image.height})"
        expected = f"at most {max_pixels:,} pixels"
        raise InputError(place, argument, expected, got, kind="large image")
    if max(image.size) > MAX_SIDE:
        got = f"{image.width} x {image.height}"
        expected = f"sides of at most {MAX_SIDE:,} pixels"
        raise InputError(place, argument, expected, got, kind="large image")
    if image.width * image.height == 0:
        raise InputError(place, argument, "an image", "no pixels", kind="unreadable image")


def _check_chunks(file: BinaryIO, size: int, place: str, argument: str) -> None:
    """Refuse files of more bytes than pixels could have, and PNGs with such texts and profiles.

    Pillow reads those whole, before it says how large the picture is.
    """
    if size > MAX_BYTES:
        expected = f"at most {MAX_BYTES:,} bytes"
        raise InputError(place, argument, expected, f"{size:,}", kind="large image")
    file.seek(0)
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if length > MAX_CHUNK and kind != b"IDAT":
                expected = f"at most {MAX_CHUNK:,} bytes beside the pixels"
                raise InputError(place, argument, expected, f"{length:,}", kind="large image")
            file.seek(length + 4, os.SEEK_CUR)
    file.seek(0)


def _decoded(image: Image.Image, place: str, argument: str) -> Image.Image:
    with _named(place, argument):
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), place, argument)


def _check_file(path: Path, place: str, argument: str) -> None:
    expected, got, kind = "an image file", "", "missing image"
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise InputError(place, argument, "an existing image file", got, kind=kind) from None
    if not stat.S_ISREG(status.st_mode):
        got, kind = "something that is not a regular file", "image path"
    elif status.st_size == 0:
        got, kind = "an empty file (0 bytes)", "unreadable image"
    if got:
        raise InputError(place, argument, expected, got, kind=kind)


def _to_rgb(image: Image.Image, place: str, argument: str) -> Image.Image:
    if image.mode in ("I", "F"):
        expected = "an image of 8 or 16 bits a shade"
        raise InputError(place, argument, expected, f"mode {image.mode}", kind="unreadable image")
    if image.mode.startswith("I;16"):
        # Pillow would make white of all but the 256 darkest shades
        shades = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(shades.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
