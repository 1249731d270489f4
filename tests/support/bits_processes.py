"""Digests of results from processes of their own, each under a table of kernels or a library of its choice."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import bits_digest

__all__ = ["ISA_NUMBERS", "different", "digests_under", "machine_isas"]

#: What /proc/cpuinfo must list for each table of kernels: the features that set each x86-64 level apart.
ISA_FLAGS = {"base": set(), "v3": {"avx2", "fma", "bmi2"}, "v4": {"avx512f", "avx512vl", "avx512bw", "avx512dq"}}
ISA_NUMBERS = {"base": 1, "v3": 3, "v4": 4}


def machine_isas() -> list[str]:
    """The kernel tables that this processor can run, all of them x86-64 levels."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())
    return [isa for isa, needed in ISA_FLAGS.items() if needed <= flags]


@functools.cache
def digests_under(isa: str, folder: Path | None = None) -> dict[str, str]:
    """The digests of a process that was told to use these kernels, after it has proved that it does; from the flatmin
    that is installed, or the one in a folder."""
    script = Path(bits_digest.__file__)
    env = {**os.environ, "FM_ISA": isa} | ({} if folder is None else {"PYTHONPATH": str(folder)})
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["isa"] == ISA_NUMBERS[isa]
    assert folder is None or Path(answer["library"]).is_relative_to(folder)
    return answer["digests"]  # type: ignore[no-any-return]


def different(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """The results that differ, by name."""
    return [name for name in a if a[name] != b[name]]
