"""Builds the operator library with CMake, and one wheel for every Python: no CPython API is used, nor torch's C++."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_INSTALL_PREFIX={out}"]
        if architectures := os.environ.get("FM_CUDA_ARCHITECTURES"):  # a developer's build for one GPU
            configure.append(f"-DFM_CUDA_ARCHITECTURES={architectures}")
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", build, "--target", "install"])

    def get_outputs(self) -> list[str]:
        return []


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(ext_modules=[Extension("flatmin._C", [])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython})
