"""The wheels that `make wheels` leaves in dist/: whether their tags are true, and whether clang compiled gcc's bits."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import requirements
from bits_processes import different, digests_under, machine_isas

pytestmark = pytest.mark.requires("the wheels of `make wheels`")

#: In the process already when the library is loaded, from a torch that the wheel must not carry.
TORCH = {"libtorch_cpu.so", "libtorch_cuda.so"}

every_wheel = pytest.mark.parametrize("wheel", requirements.WHEELS, ids=lambda path: path.stem.split("-")[-1])


def test_both_processors_have_a_wheel() -> None:
    names = [wheel.name.split("-", 2)[2] for wheel in requirements.WHEELS]
    assert names == [f"py3-none-manylinux_2_28_{processor}.whl" for processor in ("aarch64", "x86_64")]


@every_wheel
def test_auditwheel_confirms_the_tag(wheel: Path) -> None:
    """The symbols that the libraries ask for are those of a glibc as old as the tag's, or older, on that processor; and
    no library is needed but torch's and those that the tag allows."""
    show = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    audit = json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    promised, found = (
        re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag) for tag in (wheel.stem.split("-")[-1], audit["sym_tag"])
    )
    assert promised is not None and found is not None, audit["sym_tag"]
    assert found[2] == promised[2]
    assert int(found[1]) <= int(promised[1])
    assert "libtorch_cpu.so" in audit["external_libs"]
    assert set(audit["external_libs"]) <= TORCH
    assert not audit["unsupported_isa"]


@every_wheel
def test_the_wheel_holds_what_its_name_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("flatmin/")}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/WHEEL"))).decode()
        machines = {int.from_bytes(archive.read(name)[18:20], "little") for name in names if name.endswith(".so")}
    assert re.findall(r"^Tag: (.*)$", metadata, re.MULTILINE) == ["-".join(wheel.stem.split("-")[2:])]
    x86 = wheel.stem.endswith("x86_64")
    assert machines == {62 if x86 else 183}  # e_machine of ELF: EM_X86_64, EM_AARCH64
    cuda = {"flatmin/_C_cuda.so"} if x86 and requirements.NVCC else set()
    assert {name for name in names if name.endswith(".so")} == {"flatmin/_C.so"} | cuda


def compiler(library: Path) -> str:
    comment = subprocess.run(["readelf", "-p", ".comment", library], capture_output=True, text=True, check=True).stdout
    return "clang" if "clang" in comment else "gcc" if "GCC" in comment else comment


@pytest.fixture(scope="module")
def by_clang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel for this machine, unpacked."""
    folder = tmp_path_factory.mktemp("clang")
    wheel = next(wheel for wheel in requirements.WHEELS if wheel.stem.endswith(platform.machine()))
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.parametrize("isa", machine_isas())
def test_gcc_and_clang_give_the_same_bits(by_clang: Path, isa: str) -> None:
    """Every operator, by the library that is installed and by the wheel's."""
    assert compiler(requirements.CPU_LIBRARY) == "gcc"
    assert compiler(by_clang / "flatmin" / "_C.so") == "clang"
    assert different(digests_under(isa), digests_under(isa, by_clang)) == []
