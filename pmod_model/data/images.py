"""Opens images that a data set or a user names, and nothing else.

A data set is untrusted: its image paths may leave the folder, name a device, or decode to
gigabytes.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from pmod_model.data.errors import InputError

MAX_IMAGE_PIXELS = 50_000_000
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
        raise InputError(place, argument, "a relative file path", name or "none")
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise InputError(place, argument, f"a path inside {folder}", "one that leaves it")
    _check_file(path, place, argument)
    return path


def open_image(path: Path, place: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode the image at `path` to RGB: turned as EXIF says, transparency over white, first frame.

    Raises:
        InputError: not a regular file, not one of `FORMATS`, truncated, or of more than
            `max_pixels` pixels, which the header tells before anything is decoded.
    """
    argument = f"image {str(path)!r}"
    _check_file(path, place, argument)
    try:
        # O_NONBLOCK: if a pipe took the file's place since the check, do not wait for a writer
        with (
            os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            if image.width * image.height > max_pixels:
                got = f"{image.width * image.height:,} ({image.width} x {image.height})"
                raise InputError(place, argument, f"at most {max_pixels:,} pixels", got)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        wanted = f"an image ({', '.join(FORMATS)})"
        raise InputError(
            place, argument, wanted, f"{path.stat().st_size} bytes of another kind"
        ) from None
    except Image.DecompressionBombError as error:
        raise InputError(place, argument, f"at most {max_pixels:,} pixels", error) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(place, argument, "a complete, readable image", error) from None


def _check_file(path: Path, place: str, argument: str) -> None:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(place, argument, "an existing image file", reason) from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(place, argument, "an image file", "something that is not a regular file")
    if status.st_size == 0:
        raise InputError(place, argument, "an image file", "an empty file (0 bytes)")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
