"""Loads the operator library into torch and gives every operator its shape function."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch  # before the library: it resolves against the torch that is loaded
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_C.so")
_CUDA_LIBRARY = _LIBRARY.with_name("_C_cuda.so")
_ISA = {"base": 1, "v3": 3, "v4": 4}


def _load() -> None:
    if not _LIBRARY.exists():
        raise ImportError(
            f"flatmin: {_LIBRARY} is missing; the package was not built. Run `pip install .` in the source folder and "
            "import it from elsewhere"
        )
    try:
        torch.ops.load_library(_LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"flatmin: {_LIBRARY} does not load into torch {torch.__version__}; torch 2.10 or later is needed"
        ) from error
    if not hasattr(torch.ops.flatmin, "isa"):
        raise ImportError(f"flatmin: torch {torch.__version__} refused the operators; is another copy loaded already?")
    wanted = os.environ.get("FM_ISA")
    if wanted and _ISA.get(wanted) != torch.ops.flatmin.isa():
        raise ImportError(f"FM_ISA: {wanted!r} given, but it is none of {sorted(_ISA)} or not what this processor runs")


def _load_cuda() -> bool:
    """Load the CUDA kernels into a torch that was built with CUDA; False if they cannot run here.

    Without them CUDA tensors take the reference, and flatmin.ops says so at the first one.
    """
    if torch.version.cuda is None or not _CUDA_LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(_CUDA_LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        warnings.warn(f"flatmin: {_CUDA_LIBRARY} does not load into torch {torch.__version__}: {error}", stacklevel=2)
        return False
    ready: bool = torch.ops.flatmin.cuda_ready()
    return ready


_load()

#: The operators that have a kernel for each device, and what calls them.
OPERATORS = {
    name: getattr(torch.ops.flatmin, name).default
    for name in ("norm", "ties", "sam_ascend_", "restore_", "restore_sgd_", "restore_adam_")
}

#: Device types with kernels; everything else runs in flatmin.reference.
DEVICES: frozenset[str] = frozenset({"cpu", "cuda"} if _load_cuda() else {"cpu"})


def _check_one_device(*lists: Sequence[Tensor]) -> None:
    """A list with meta tensors in it lands here whatever the rest is: refuse a mixture, as the kernels do."""
    devices = {t.device.type for tensors in lists for t in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"tensors on different devices ({', '.join(sorted(devices))}); call once for each device")


def _fake_reduction(tensors: Sequence[Tensor], weights: Sequence[Tensor], *_: object) -> Tensor:
    _check_one_device(tensors, weights)
    return tensors[0].new_empty((), dtype=torch.float64)


def _fake_update(params: Sequence[Tensor], *others: object) -> None:
    _check_one_device(params, *(other for other in others if isinstance(other, list)))


def _fake_adam(*args: object) -> None:
    """The sixth argument, the step counters, lies on the CPU wherever the parameters are."""
    _fake_update(*args[:5])  # type: ignore[arg-type]


for _name in OPERATORS:
    _fake = _fake_adam if _name == "restore_adam_" else _fake_update if _name.endswith("_") else _fake_reduction
    torch.library.register_fake(f"flatmin::{_name}", _fake)
