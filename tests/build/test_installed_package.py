from __future__ import annotations

import importlib
import json
from importlib.metadata import Distribution, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

import pmod_ops


def installed_at(package: Distribution) -> Path:
    """The folder that pip installed the package into, or the source tree of an editable install."""
    direct_url = json.loads(package.read_text("direct_url.json") or "{}")
    if direct_url.get("dir_info", {}).get("editable"):
        return Path(unquote(urlparse(direct_url["url"]).path))
    return Path(str(package.locate_file("")))


def test_the_installed_package_is_the_one_imported() -> None:
    package = Path(pmod_ops.__file__).resolve().parent
    assert package == (installed_at(distribution("pmod")) / "pmod_ops").resolve()


def test_the_compiled_library_is_abi3_and_lies_in_the_package() -> None:
    library = Path(str(importlib.import_module("pmod_ops._C").__file__)).resolve()
    assert library == Path(pmod_ops.__file__).resolve().parent / "_C.abi3.so"


def test_build_info_says_how_the_library_was_built() -> None:
    info = json.loads(torch.ops.pmod.build_info())
    assert info["torch_target"] == "2.13"
    assert info["isa"][0] == "base"
    assert info["active_isa"] in info["isa"]
    assert info["compiler"].split()[0] in ("GNU", "Clang")


def test_the_package_knows_its_version() -> None:
    assert pmod_ops.__version__ == distribution("pmod").version
