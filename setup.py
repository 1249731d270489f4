"""Builds the operator library with CMake, and one wheel for every Python: no CPython API is used, nor torch's C++.

FM_PLATFORM=manylinux_2_28_x86_64 or manylinux_2_28_aarch64 builds with zig cc for every Linux of that platform; without
it the compiler and the C library are the machine's, and so is the wheel.
FM_WERROR=ON makes an error of each warning, as CI does.
"""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PLATFORM = os.environ.get("FM_PLATFORM", "")


def toolchain() -> list[str]:
    """What CMake must be told to build for PLATFORM."""
    if not PLATFORM:
        return []
    file = ROOT / "cmake" / f"{PLATFORM}.cmake"
    if not file.exists():
        known = sorted(path.stem for path in file.parent.glob("manylinux*.cmake"))
        raise SystemExit(f"FM_PLATFORM: {PLATFORM!r} given, but it is none of {', '.join(known)}")
    import ziglang  # only here: a build for this machine does without

    return [f"-DCMAKE_TOOLCHAIN_FILE={file}", f"-DFM_ZIG={Path(ziglang.__file__).parent / 'zig'}"]


class OwnFolder(build):
    """A build folder for each platform, so that no wheel takes up another one's files."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = str(Path("build", PLATFORM))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_INSTALL_PREFIX={out}", *toolchain()]
        # given every time: CMake would keep what the last build in this folder was given
        configure.append(f"-DFM_CUDA_ARCHITECTURES={os.environ.get('FM_CUDA_ARCHITECTURES') or 'native'}")
        configure.append(f"-DFM_WERROR={os.environ.get('FM_WERROR') or 'OFF'}")
        (out / "_C_cuda.so").unlink(missing_ok=True)  # nor may that build's library pass for this one's
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", build, "--target", "install"])

    def get_outputs(self) -> list[str]:
        return []


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", PLATFORM or super().get_tag()[2])


logging.disable(logging.INFO)  # so that pip -v shows what is compiled, and not every file that is copied
setup(
    ext_modules=[Extension("flatmin._C", [])],
    cmdclass={"build": OwnFolder, "build_ext": CMakeBuild, "bdist_wheel": AnyPython},
    setup_requires=["ziglang~=0.17.1"] if PLATFORM else [],
)
