"""Builds ``d2net._C`` with CMake. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def is_stale(cache: Path) -> bool:
    """Whether an earlier build was configured in an environment of pip's that is gone, and with it ninja."""
    lines = cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []
    programs = [line.partition("=")[2] for line in lines if line.startswith("CMAKE_MAKE_PROGRAM:")]
    return any(not Path(program).exists() for program in programs)


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt so that the module lands where setuptools expects it.

    ``D2NET_CUDA``, ``CMAKE_CUDA_ARCHITECTURES`` and ``CMAKE_ARGS`` are read from the environment.
    """

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit(
                "d2net: cmake not found; install it (pip install cmake ninja) or drop --no-build-isolation"
            )
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DD2NET_OUTPUT_DIR={output}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        if is_stale(build / "CMakeCache.txt"):
            (build / "CMakeCache.txt").unlink()  # and not --fresh, which removes what is compiled, too
        for name in ("D2NET_CUDA", "CMAKE_CUDA_ARCHITECTURES"):
            if os.environ.get(name):
                configure.append(f"-D{name}={os.environ[name]}")
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)


setup(ext_modules=[Extension("d2net._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
