"""Builds the operator library with CMake, and one wheel for every Python: no CPython API is used, nor torch's C++."""

from __future__ import annotations

import logging
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
        # given every time: CMake would keep what the last build in this folder was given
        configure.append(f"-DFM_CUDA_ARCHITECTURES={os.environ.get('FM_CUDA_ARCHITECTURES') or 'native'}")
        (out / "_C_cuda.so").unlink(missing_ok=True)  # nor may that build's library pass for this one's
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", build, "--target", "install"])

    def get_outputs(self) -> list[str]:
        return []


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


logging.disable(logging.INFO)  # so that pip -v shows what is compiled, and not every file that is copied
setup(ext_modules=[Extension("flatmin._C", [])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython})
