"""Which nvcc is taken, what it is asked to compile for, and what is said if that cannot be."""

from pathlib import Path

import nvcc
import pytest

VERSION_13 = (
    "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\n"
)


def fake(folder: Path, release: str) -> Path:
    """A program that answers --version as nvcc does."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere_else(monkeypatch, tmp_path):
    """Only what a test names explicitly can be found."""
    explicit = nvcc.candidates

    def candidates(environment):
        return [p for p in explicit(environment) if tmp_path in p.parents]

    monkeypatch.setattr(nvcc, "candidates", candidates)


def test_release_of_nvcc():
    assert nvcc.parse_release(VERSION_13) == (13, 0)
    assert nvcc.parse_release("gcc (Debian) 12.2.0") is None


def test_the_most_explicit_place_wins(tmp_path, nowhere_else):
    home, named = fake(tmp_path / "home", "12.4"), fake(tmp_path / "named", "13.0")
    assert nvcc.find({"CUDA_HOME": str(tmp_path / "home")}) == (home, (12, 4))
    both = {"CUDA_HOME": str(tmp_path / "home"), "CUDACXX": str(named)}
    assert nvcc.find(both) == (named, (13, 0))


def test_one_on_the_path_is_found(tmp_path, nowhere_else):
    path = fake(tmp_path, "13.0")
    assert nvcc.find({"PATH": str(path.parent)}) == (path, (13, 0))


def test_one_that_is_too_old_is_not_taken(tmp_path, nowhere_else):
    fake(tmp_path, "11.8")
    assert nvcc.find({"CUDA_HOME": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("asked", "release", "expected"),
    [
        ("", (13, 0), ("80", "90", "100", "120")),
        ("", (12, 4), ("80", "90")),
        ("90", (13, 0), ("90",)),
        ("80;90a", (13, 0), ("80", "90a")),
        ("80, 90", (13, 0), ("80", "90")),
    ],
)
def test_architectures(asked, release, expected):
    assert nvcc.archs({"PMOD_CUDA_ARCHS": asked}, release) == expected


@pytest.mark.parametrize("asked", ["sm_90", "8.0", "all"])
def test_other_architectures_are_refused(asked):
    with pytest.raises(RuntimeError, match=r"PMOD_CUDA_ARCHS: expected .* got"):
        nvcc.archs({"PMOD_CUDA_ARCHS": asked}, (13, 0))


def test_options_for_cmake(tmp_path, nowhere_else):
    path = fake(tmp_path, "13.0")
    options = nvcc.cmake_options({"CUDA_HOME": str(tmp_path)})
    assert "-DPMOD_CUDA=ON" in options
    assert f"-DCMAKE_CUDA_COMPILER={path}" in options
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real;100-real;120" in options  # 120: PTX, too
    assert "-DPMOD_CUDA=OFF" in nvcc.cmake_options({"CUDA_HOME": str(tmp_path), "PMOD_CUDA": "0"})


def test_without_an_nvcc(nowhere_else):
    assert "-DPMOD_CUDA=OFF" in nvcc.cmake_options({})
    with pytest.raises(RuntimeError, match=r"PMOD_CUDA=1.*no nvcc(.|\n)*PMOD_CUDA=0"):
        nvcc.cmake_options({"PMOD_CUDA": "1"})
    with pytest.raises(RuntimeError, match="PMOD_CUDA: expected auto, 0 or 1, got 'yes'"):
        nvcc.cmake_options({"PMOD_CUDA": "yes"})
