from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import backend
import pytest
import toolchain
import torchfind
from setuptools import build_meta

Hook = Callable[[], list[str]]
REQUIREMENT_HOOKS = [
    backend.get_requires_for_build_wheel,
    backend.get_requires_for_build_editable,
]


@pytest.fixture(autouse=True)
def _no_setuptools(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real hooks run setup.py; only what this backend adds is under test.
    for name in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(build_meta, name, lambda settings: ["base"])


@pytest.mark.parametrize("hook", REQUIREMENT_HOOKS)
def test_installed_torch_is_used_as_it_is(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = torchfind.Torch(Path("/somewhere/torch"), "2.14.1")
    monkeypatch.setattr(torchfind, "find", lambda: torch)
    assert hook() == ["base"]


@pytest.mark.parametrize("hook", REQUIREMENT_HOOKS)
def test_torch_is_asked_for_if_there_is_none(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfind, "find", lambda: None)
    assert hook() == ["base", torchfind.FALLBACK]


@pytest.mark.parametrize("hook", REQUIREMENT_HOOKS)
def test_old_torch_stops_the_build(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> None:
        raise RuntimeError("torch 2.9 is too old")

    monkeypatch.setattr(torchfind, "find", find)
    with pytest.raises(SystemExit, match=r"torch 2\.9 is too old"):
        hook()


@pytest.mark.parametrize("hook", REQUIREMENT_HOOKS)
def test_missing_compiler_stops_the_build(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"apt install g\+\+\n.*dnf install gcc-c\+\+"):
        hook()


def test_fallback_satisfies_the_minimum() -> None:
    assert torchfind.release(torchfind.FALLBACK.removeprefix("torch==")) >= torchfind.MINIMUM


def test_compiler_named_by_cxx_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(RuntimeError, match="CXX=no-such-compiler"):
        toolchain.compiler()


def test_first_word_of_cxx_is_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert toolchain.compiler() == str(compiler)


def test_missing_python_headers_name_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match="apt install python3-dev"):
        toolchain.python_include()


def test_tools_beside_python_come_before_those_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("scripts", "bin"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cmake").touch(mode=0o755)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert toolchain.program("cmake") == str(tmp_path / "scripts" / "cmake")
    (tmp_path / "scripts" / "cmake").unlink()
    assert toolchain.program("cmake") == str(tmp_path / "bin" / "cmake")
    (tmp_path / "bin" / "cmake").unlink()
    with pytest.raises(RuntimeError, match="pip install cmake"):
        toolchain.program("cmake")
