"""Images: what may be opened, and what an error says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from pmod_model.data.errors import InputError
from pmod_model.data.images import open_image, resolve_image


@pytest.fixture
def folder(tmp_path: Path, picture: Image.Image) -> Path:
    inside = tmp_path / "images"
    inside.mkdir()
    picture.save(inside / "good.png")
    picture.save(tmp_path / "outside.png")
    (inside / "text.png").write_text("not an image")
    (inside / "empty.png").touch()
    (inside / "cut.png").write_bytes((inside / "good.png").read_bytes()[:-40])
    picture.save(inside / "whole.jpg", quality=95)
    (inside / "cut.jpg").write_bytes((inside / "whole.jpg").read_bytes()[:-200])
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(inside / "pipe.png")
    (inside / "folder.png").mkdir()
    return inside


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.png", "a path inside .*one that leaves it"),
        ("/etc/hostname", "a path inside .*one that leaves it"),
        ("link.png", "a path inside .*one that leaves it"),
        ("a/../../outside.png", "a path inside .*one that leaves it"),
        ("https://example.org/a.png", "a relative file path"),
        ("file:///etc/hostname", "a relative file path"),
        ("C:\\a.png", "a relative file path"),
        ("a\0.png", "a relative file path"),
        ("", "a relative file path"),
        ("absent.png", "No such file"),
        ("pipe.png", "not a regular file"),
        ("folder.png", "not a regular file"),
        ("empty.png", "0 bytes"),
    ],
)
def test_unusable_path_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_image(folder, name, "data.json record 3")
    assert "data.json record 3" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "expected an image .*12 bytes of another kind"),
        ("cut.png", "a complete, readable image"),
        ("cut.jpg", "a complete, readable image"),
        ("pipe.png", "not a regular file"),
        ("absent.png", "No such file"),
    ],
)
def test_unreadable_image_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_image(folder / name, "generate")
    assert name in str(caught.value)


def test_size_is_refused_from_the_header(folder: Path) -> None:
    with pytest.raises(InputError, match=r"at most 4,095 pixels, got 4,096 \(64 x 64\)"):
        open_image(folder / "good.png", "generate", max_pixels=4095)


def test_transparency_lies_over_white(folder: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(folder / "clear.png")
    assert open_image(folder / "clear.png", "x").getpixel((0, 0)) == (255, 255, 255)


def test_exif_turns_the_picture(folder: Path) -> None:
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(folder / "turned.jpg", exif=exif)
    assert open_image(folder / "turned.jpg", "x").size == (2, 4)
