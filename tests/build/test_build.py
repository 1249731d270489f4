"""What is shipped: libraries that need torch 2.10 or later and nothing else, in a wheel for every Python."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from requirements import CPU_LIBRARY, CUDA_LIBRARY

#: Where the system's C library and compiler keep their own.
SYSTEM = {"libm.so.6", "libc.so.6"}
CXX_SYSTEM = SYSTEM | {
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
}

needs_nvcc = pytest.mark.requires("a build with nvcc")
every_library = pytest.mark.parametrize(
    "library", [CPU_LIBRARY, pytest.param(CUDA_LIBRARY, marks=needs_nvcc)], ids=lambda path: path.name
)


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dynamic_section(library: Path) -> dict[str, list[str]]:
    """Entries of a library's dynamic section by tag: NEEDED, SONAME, RPATH, RUNPATH, FLAGS ..."""
    entries: dict[str, list[str]] = {}
    for tag, value in re.findall(
        r"^ 0x\w+ \((\w+)\)\s+(.*)$", output("readelf", "--wide", "-d", library), re.MULTILINE
    ):
        name = re.search(r"\[(.*)\]", value)
        entries.setdefault(tag, []).append(name.group(1) if name else value)
    return entries


@every_library
def test_torch_2_10_is_enough_and_nothing_unstable_is_used(library: Path) -> None:
    """torch-abi-audit knows which release added each symbol of torch's C interface."""
    audit = Path(sys.executable).parent / "torch-abi-audit"
    run = subprocess.run([audit, "--check", "torch", library], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"min-torch=2\.10\.0\b", run.stdout), run.stdout
    assert re.search(r"\bunstable=0\b", run.stdout), run.stdout


def test_the_library_asks_for_torch_and_libc_alone() -> None:
    """libtorch_cpu must be named, since Python loads torch without lending its symbols to others; a CUDA library must
    not be, since a CPU build of torch has none; and no C++ library, since there is no C++."""
    needed = set(dynamic_section(CPU_LIBRARY)["NEEDED"])
    assert needed - SYSTEM == {"libtorch_cpu.so"}


@needs_nvcc
def test_the_cuda_library_brings_its_own_runtime() -> None:
    """No libcudart: torch's moves from one release to the next, and took others' libraries with it."""
    assert set(dynamic_section(CUDA_LIBRARY)["NEEDED"]) - CXX_SYSTEM == {"libtorch_cpu.so", "libtorch_cuda.so"}


@every_library
@pytest.mark.parametrize("tag", ["RPATH", "RUNPATH"])
def test_the_library_searches_no_folder(library: Path, tag: str) -> None:
    """torch is in the process already; a path from the build machine would find another one, or nothing."""
    section = dynamic_section(library)
    assert "NEEDED" in section
    assert tag not in section


@every_library
def test_the_library_exports_nothing(library: Path) -> None:
    """Operators register themselves when it is loaded; an exported name could only collide with another library's."""
    names = [line.split()[-1] for line in output("nm", "-D", "--defined-only", library).splitlines()]
    assert names == []
    assert "torch_library_impl" in output("nm", "-D", "--undefined-only", library)


@every_library
def test_the_library_needs_no_executable_stack(library: Path) -> None:
    """Hardened kernels refuse to load a library that asks for one."""
    stack = next(line for line in output("readelf", "--wide", "-l", library).splitlines() if "GNU_STACK" in line)
    assert stack.split()[-2] == "RW"


#: Functions whose scalar roots and divisions are not per element: a norm once a row, powers by |x|^q in double.
SCALAR = re.compile(r"(power|update_ascend)_f(32|64)")


def roots_and_divisions(library: Path) -> list[tuple[str, Counter[str]]]:
    """Those of each function on floats or doubles, by instruction: every instruction set has its own function of each
    name. The names of AVX begin with a v; the baseline calls a function for each fused multiply-add and has no vectors.
    """
    found: list[tuple[str, Counter[str]]] = []
    inside = False
    for line in output("objdump", "--disassemble", "--no-show-raw-insn", library).splitlines():
        if start := re.match(r"[0-9a-f]+ <(\w+)(?:\.[\w.]*)?>:", line):
            inside = start[1].endswith(("_f32", "_f64"))
            if inside:
                found.append((start[1], Counter()))
        elif inside and (operation := re.search(r"\tv((?:sqrt|div)[sp][sd])\b", line)):
            found[-1][1][operation[1]] += 1
    return found


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86's instructions")
def test_every_kernel_takes_its_roots_and_divisions_by_vectors() -> None:
    """A choice in a rule can become a branch, and the loop then runs element by element, twice as long, with the right
    result. Scalar instructions stay for the last few elements; they must not be the only ones."""
    functions = roots_and_divisions(CPU_LIBRARY)
    assert [bool(count) for name, count in functions if name == "update_scaled_noise_f32"].count(True) == 2
    for name, count in functions:
        own = "s" if name.endswith("f32") else "d"
        for operation in ("sqrt", "div"):
            if count[f"{operation}s{own}"] and not SCALAR.fullmatch(name):
                assert count[f"{operation}p{own}"], f"{name}: {dict(count)}"


@every_library
def test_no_build_path_is_left_in_the_library(library: Path) -> None:
    """Two machines that build the same sources get the same file, and it tells nothing about either."""
    source = Path(__file__).resolve().parents[2]
    assert str(source).encode() not in library.read_bytes()


# ---- the wheel ----


def installed() -> importlib.metadata.Distribution:
    return importlib.metadata.distribution("flatmin")


def test_one_wheel_serves_every_python() -> None:
    """No call into CPython, hence py3-none; machine code, hence a platform."""
    wheel = installed().read_text("WHEEL")
    assert wheel is not None
    tags = re.findall(r"^Tag: (.*)$", wheel, re.MULTILINE)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert len(tags) == 1
    assert re.fullmatch(rf"py3-none-(manylinux\w*|{re.escape(platform)})", tags[0])
    assert "Root-Is-Purelib: false" in wheel


def test_the_wheel_holds_what_it_should() -> None:
    files = {str(f) for f in installed().files or []}
    assert {"flatmin/__init__.py", "flatmin/_C.so", "flatmin/py.typed", "flatmin/reference/__init__.py"} <= files
    strangers = [f for f in files if not f.startswith(("flatmin/", "flatmin-"))]
    assert strangers == []


@needs_nvcc
def test_a_build_with_nvcc_ships_the_cuda_library() -> None:
    assert "flatmin/_C_cuda.so" in {str(f) for f in installed().files or []}


def test_the_wheel_asks_for_torch_2_10() -> None:
    requirements = [r for r in installed().requires or [] if "extra ==" not in r]
    assert requirements == ["torch>=2.10"]
