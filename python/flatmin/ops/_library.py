"""Loads the operator library into torch and gives every operator its shape function."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch  # before the library: it resolves against the torch that is loaded
from torch import Tensor

_LIBRARY = Path(__file__).parents[1] / "_C.so"
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
    for name in (
        "norm",
        "ties",
        "sam_ascend_",
        "sam_norm_ascend_",
        "restore_",
        "restore_sgd_",
        "restore_adam_",
        "restore_sgd_curvature_",
        "restore_adam_curvature_",
        "scaled_noise_",
        "probe_",
        "curvature_",
        "pacgen",
        "filter_norm",
        "corrupt_labels",
        "draw_samples",
    )
}

#: Device types with kernels; everything else runs in flatmin.reference.
DEVICES: frozenset[str] = frozenset({"cpu", "cuda"} if _load_cuda() else {"cpu"})


def _check_one_device(*lists: Sequence[Tensor]) -> None:
    """A list with meta tensors in it lands here whatever the rest is: refuse a mixture, as the kernels do."""
    devices = {t.device.type for tensors in lists for t in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"tensors on different devices ({', '.join(sorted(devices))}); call once for each device")


def _fake(result: Callable[..., tuple[int, ...]] | None, name: str) -> Callable[..., Tensor | None]:
    """The shape function of an operator that returns a float64 tensor of the shape ``result``, or nothing."""

    def fake(first: Sequence[Tensor], *others: Any) -> Tensor | None:
        # the sixth argument of Adam, the step counters, lies on the CPU wherever the parameters are
        placed = others[:4] + others[5:] if "adam" in name else others
        _check_one_device(first, *(other for other in placed if isinstance(other, list)))
        return None if result is None else first[0].new_empty(result(first, *others), dtype=torch.float64)

    return fake


def _filters(tensors: Sequence[Tensor], whole: bool) -> tuple[int]:
    return (sum(1 if whole or t.dim() < 2 else t.shape[0] for t in tensors),)


#: Shapes of the results, of those that have one.
_RESULTS: dict[str, Callable[..., tuple[int, ...]]] = {
    "norm": lambda *_: (),
    "ties": lambda *_: (),
    "sam_norm_ascend_": lambda *_: (),
    "restore_sgd_curvature_": lambda *_: (),
    "restore_adam_curvature_": lambda *_: (),
    "curvature_": lambda *_: (),
    "scaled_noise_": lambda *_: (3,),
    "pacgen": lambda params, *_: (len(params), 2),
    "filter_norm": _filters,
}

#: Shape functions of the operators on labels, which take no lists.
_SAMPLES: dict[str, Callable[..., Tensor | None]] = {
    "corrupt_labels": lambda *_: None,
    "draw_samples": lambda index, key, count, inner, law: index.new_empty((count, inner), dtype=torch.float32),
}

for _name in OPERATORS:
    torch.library.register_fake(f"flatmin::{_name}", _SAMPLES.get(_name) or _fake(_RESULTS.get(_name), _name))
