"""Hands the build of `pmod_ops._C` and `_C_cuda` to CMake; all metadata is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import nvcc
import toolchain
import torchfind

CUDA_LIBRARY = "pmod_ops._C_cuda"

try:
    cuda = nvcc.cmake_options(os.environ)
except RuntimeError as error:
    sys.exit(str(error))
with_cuda = "-DPMOD_CUDA=ON" in cuda


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja against the torch that is installed.

    An editable install keeps its build tree, so `cmake --build build/cmake --target install`
    rebuilds in place. PMOD_CMAKE_ARGS adds options, for example `-DPMOD_WERROR=ON`; PMOD_CUDA and
    PMOD_CUDA_ARCHS: tools/nvcc.py.
    """

    def build_extension(self, ext: Extension) -> None:
        """Builds both extension modules, when the first is asked for."""
        if ext.name == CUDA_LIBRARY:
            return
        try:
            toolchain.compiler()
            include = toolchain.python_include()
            torch = torchfind.find()
            cmake, ninja = toolchain.program("cmake"), toolchain.program("ninja")
        except RuntimeError as error:
            sys.exit(str(error))
        if torch is None:
            sys.exit(f"pmod: no torch found; install one first: pip install {torchfind.FALLBACK}")
        tree = ROOT / "build" / "cmake" if self.editable_mode else Path(self.build_temp).resolve()
        print(f"pmod: building against torch {torch.version} in {torch.folder}")
        configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja"]
        # What CMake cached does not carry over: not the options of an earlier build, and not its
        # Ninja, which may be gone with its environment.
        configure += ["-U", "PMOD_*"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_INSTALL_PREFIX={ROOT}"]
        configure += [f"-DPMOD_TORCH_DIR={torch.folder}", f"-DPMOD_PYTHON_INCLUDE={include}"]
        configure += cuda
        configure += shlex.split(os.environ.get("PMOD_CMAKE_ARGS", ""))
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parents[1]
        install = [cmake, "--install", str(tree), "--prefix", str(output)]
        for command in (configure, [cmake, "--build", str(tree)], install):
            if subprocess.run(command, check=False).returncode:
                hint = "; try a newer CMake (pip install --upgrade cmake), or PMOD_CUDA=0"
                hint = hint if with_cuda else ""
                sys.exit(f"pmod: the build failed in: {shlex.join(command)}{hint}")


setup(
    ext_modules=[
        Extension(name, sources=[], py_limited_api=True)
        for name in ("pmod_ops._C", *([CUDA_LIBRARY] if with_cuda else []))
    ],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
