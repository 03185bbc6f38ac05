from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torchfind

VERSION_PY = """from typing import Optional

__all__ = ['__version__', 'cuda']
__version__ = '{version}'
cuda: Optional[str] = None
"""


def install_torch(folder: Path, version: str) -> Path:
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "version.py").write_text(VERSION_PY.format(version=version))
    return package


def test_the_torch_in_use_is_the_one_found() -> None:
    found = torchfind.find()
    assert found is not None
    assert found.folder == Path(torch.__file__).resolve().parent
    assert found.version == torch.__version__


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("__version__ = '2.13.0+cpu'\n", "2.13.0+cpu"),
        ('__version__ = "2.14.1"\n', "2.14.1"),
        ("__version__: str = '2.15.0a0+git1'\n", "2.15.0a0+git1"),
        ("__all__ = ['__version__', 'cuda']\n", None),
        ("", None),
    ],
)
def test_version_is_read_from_the_text(text: str, version: str | None) -> None:
    assert torchfind.parse_version(text) == version


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0+cpu", (2, 13)), ("2.9.1", (2, 9)), ("10.0", (10, 0)), ("2.14.0a0+gitf", (2, 14))],
)
def test_release_compares_as_numbers(version: str, expected: tuple[int, int]) -> None:
    assert torchfind.release(version) == expected


def test_unreadable_release_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="cannot read the torch version 'nightly'"):
        torchfind.release("nightly")


def test_no_torch_is_none(tmp_path: Path) -> None:
    assert torchfind.find([tmp_path, tmp_path / "missing"]) is None


def test_first_folder_wins(tmp_path: Path) -> None:
    first = install_torch(tmp_path / "a", "2.14.1+cu130")
    install_torch(tmp_path / "b", "2.13.0")
    found = torchfind.find([tmp_path, tmp_path / "a", tmp_path / "b"])
    assert found == torchfind.Torch(first.resolve(), "2.14.1+cu130")


def test_old_torch_is_an_error_that_names_both_versions(tmp_path: Path) -> None:
    install_torch(tmp_path / "a", "2.9.1+cpu")
    install_torch(tmp_path / "b", "2.13.0")
    message = r"needs torch 2\.13 or newer, but torch 2\.9\.1\+cpu is installed in .*pip install"
    with pytest.raises(RuntimeError, match=message):
        torchfind.find([tmp_path / "a", tmp_path / "b"])


def test_torch_without_a_version_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda = None\n")
    with pytest.raises(RuntimeError, match="does not say which torch it is"):
        torchfind.find([tmp_path])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("home = /usr/bin\ninclude-system-site-packages = true\n", True),
        ("include-system-site-packages = false\n", False),
        ("", False),
    ],
)
def test_system_packages_are_seen_only_if_asked_for(
    tmp_path: Path, text: str, expected: bool
) -> None:
    (tmp_path / "pyvenv.cfg").write_text(text)
    assert torchfind.sees_system_packages(tmp_path) is expected


def test_base_packages_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = true\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", "/base")
    monkeypatch.setattr(sys, "base_exec_prefix", "/base")
    folders = torchfind.folders()
    assert folders[-1].is_relative_to("/base")
    assert Path("") not in folders
