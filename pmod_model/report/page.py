"""Self-contained HTML pages: no request leaves them, all text is escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pmod_model.data.errors import InputError

MARK = '<meta name="generator" content="pmod report">'
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PICTURE_MARK = {"Software": "pmod"}  # metadata of a PNG


def render_page(template: str, *, script: str = "", **values: Any) -> str:
    """A page from a template of this package.

    Args:
        template: its file name.
        script: the one script that the page may run, which its policy allows by its hash.
        values: what the template shows; every text in them is escaped.
    """
    policy = POLICY
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        policy += f"; script-src 'sha256-{digest}'"
    environment = Environment(
        loader=PackageLoader("pmod_model.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        mark=MARK, policy=policy, script=script, **values
    )


def check_page_path(output: Path, place: str) -> None:
    """Refuse to replace a file that pmod did not write, which its mark tells.

    Raises:
        InputError: `output` is a folder, another file, or in a folder that does not exist.
    """
    argument = f"--output {str(output)!r}"
    if not output.parent.is_dir():
        raise InputError(
            place, argument, "a file in an existing folder", f"no folder {output.parent}"
        )
    if output.is_dir() or output.is_symlink():
        raise InputError(place, argument, "a file", "a folder or a link")
    if not output.exists():
        return
    if not (_own_picture(output) if is_picture(output) else _own_page(output)):
        raise InputError(
            place, argument, "a new file, or one that pmod wrote", "another file", "choose another"
        )


def is_picture(output: Path) -> bool:
    """Whether a file of this name is to be a PNG picture rather than a page."""
    return output.suffix.lower() == ".png"


def _own_page(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)


def _own_picture(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return PICTURE_MARK.items() <= image.info.items()
    except (OSError, SyntaxError, ValueError):
        return False
