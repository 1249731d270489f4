"""What ``python -m flatmin`` prints: versions, kernels, why there are none for CUDA, and the self-test."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import torch

import flatmin

from . import _selftest
from .ops import _library

CUDA_LIBRARY = Path(flatmin.__file__).with_name("_C_cuda.so")

#: Names of the instruction-set tables by their number, as FM_ISA takes them, and what they are compiled for.
_TABLES = {1: ("base", "any processor"), 3: ("v3", "AVX2"), 4: ("v4", "AVX-512")}


def _table(number: int) -> str:
    name, meaning = _TABLES[number]
    return f"{name} ({meaning})"


def _driver_version() -> int | None:
    """CUDA version of the installed driver, 13000 for 13.0; None without one."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else version.value


def _compiled_for(device: str) -> bool:
    try:
        flatmin.ops.norm([torch.ones(3, device=device)])
    except RuntimeError as error:
        return "no kernel image" not in str(error)  # what else goes wrong, the self-test shows
    return True


def cuda_reason() -> str | None:
    """Why CUDA tensors do not run in flatmin's kernels here; None if they do."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not CUDA_LIBRARY.exists():
        return (
            "this build of flatmin has no CUDA library: no nvcc was there, or no GPU to compile for. With nvcc, "
            "FM_CUDA_ARCHITECTURES=all pip install . in the source folder builds it"
        )
    if "cuda" not in _library.DEVICES:
        if not hasattr(torch.ops.flatmin, "cuda_ready"):
            return f"{CUDA_LIBRARY.name} does not load into torch {torch.__version__}; the warning says why"
        driver = _driver_version()
        if driver is None:
            return "there is no NVIDIA driver on this machine"
        found = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"the driver is too old: it is of CUDA {found}, and the library's runtime is newer; update the driver"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    for i in range(torch.cuda.device_count()):
        if not _compiled_for(f"cuda:{i}"):
            major, minor = torch.cuda.get_device_capability(i)
            return (
                f"the library was not compiled for cuda:{i} ({torch.cuda.get_device_name(i)}, sm_{major}{minor}); "
                "pip install . in the source folder on this machine compiles it"
            )
    return None


def main() -> int:
    """Print the report and test every operator. Returns the exit status: 1 if an operator failed."""
    best: int = torch.ops.flatmin.best_isa()
    runnable = ", ".join(_table(number) for number in _TABLES if number <= best)
    print(f"flatmin {flatmin.__version__} in {Path(flatmin.__file__).parent}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}")
    print(f"CPU kernels: {_table(torch.ops.flatmin.isa())}; this processor runs {runnable}")
    reason = cuda_reason()
    print("CUDA kernels: " + ("loaded" if reason is None else f"not loaded: {reason}"))

    devices = [device for device in ("cpu", "cuda") if device in _library.DEVICES]
    print(f"\nSelf-test against flatmin.reference on {' and '.join(devices)}", flush=True)
    start, failed = time.perf_counter(), []
    for result in _selftest.run(devices):
        label = f"  {result.device:5}{result.operator:25}"
        if result.failure is None:
            print(f"{label}ok, {result.calls} calls", flush=True)
        else:
            print(f"{label}FAILED, {result.failure}", flush=True)
            failed.append(f"{result.operator} on {result.device}")
    print(f"{time.perf_counter() - start:.1f} s")
    print(f"failed: {', '.join(failed)}" if failed else "ok")
    return 1 if failed else 0
