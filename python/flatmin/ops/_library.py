"""Loads the operator library into torch, asks torch what is in it, and gives every operator its shape function.

The one list of operators with their schemas is csrc/torch/schemas.h. A new one needs a line here only if it returns
something: its shape, in :data:`_RESULTS`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # before the library: it resolves against the torch that is loaded
from torch import Tensor
from torch._ops import OpOverload

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


def operators(namespace: str) -> dict[str, OpOverload]:
    """What is registered in a namespace of torch's dispatcher and has a kernel for each device, by name."""
    full = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::"))
    names = [name.split("::")[1] for name in full if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in names}


_load()

#: The operators that have a kernel for each device, and what calls them.
OPERATORS = operators("flatmin")

#: Names of an operator's arguments, in the order of its schema.
ARGUMENTS = {name: tuple(a.name for a in op._schema.arguments) for name, op in OPERATORS.items()}

#: Those that an operator writes to.
WRITTEN = {
    name: tuple(a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    for name, op in OPERATORS.items()
}

#: Device types with kernels; everything else runs in flatmin.reference.
DEVICES: frozenset[str] = frozenset({"cpu", "cuda"} if _load_cuda() else {"cpu"})


# ---- shape functions ----

#: Adam's counters lie on the CPU, wherever the parameters are.
_ON_THE_HOST = ("steps",)


def _check_one_device(given: dict[str, Any]) -> None:
    """A call with one meta tensor in it lands here whatever the rest is: refuse a mixture, as the kernels do, rather
    than do nothing."""
    devices, hosts = set[str](), set[str]()
    for name, value in given.items():
        found = hosts if name in _ON_THE_HOST else devices
        found.update(t.device.type for t in ([value] if isinstance(value, Tensor) else value))
    if len(devices) > 1 or not hosts <= devices | {"cpu"}:
        every = ", ".join(sorted(devices | hosts))
        raise RuntimeError(f"tensors on different devices ({every}); call once for each device")


def _scalar(given: dict[str, Any]) -> tuple[int, ...]:
    return ()


def _quotient(given: dict[str, Any]) -> tuple[int, ...]:
    """Of a restore-and-step operator: nothing without curvatures."""
    return () if given["curvatures"] else (0,)


def _filters(given: dict[str, Any]) -> tuple[int, ...]:
    return (sum(1 if given["whole"] or t.dim() < 2 else t.shape[0] for t in given["tensors"]),)


def _products(given: dict[str, Any]) -> tuple[int, ...]:
    lists = sum(bool(given[name]) for name in "abcd")
    return (lists * (lists + 1) // 2,)


#: Shapes of the results, of those that have one: a function of the arguments by name. The restore-and-step operators
#: have :func:`_quotient`.
_RESULTS: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = {
    "curvature_": _scalar,
    "filter_norm": _filters,
    "dot": _products,
    "norm": _scalar,
    "pacgen": lambda given: (len(given["params"]), 2),
    "sam_norm_ascend_": _scalar,
    "scaled_noise_": lambda given: (3,),
    "ties": _scalar,
}


def _fake(name: str) -> Callable[..., Tensor | None]:
    """The shape function of an operator that returns a float64 tensor, or nothing."""
    names = ARGUMENTS[name]
    steps = {"lr", "curvatures"} <= set(names)
    shape = _RESULTS.get(name, _quotient if steps else None)
    if (shape is None) == bool(OPERATORS[name]._schema.returns):
        raise ImportError(f"flatmin: _RESULTS in {__file__} and the schema of {name} disagree on whether it returns")

    def fake(*args: Any, **kwargs: Any) -> Tensor | None:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {key: v for key, v in given.items() if isinstance(v, Tensor | list)}
        _check_one_device(tensors)
        if shape is None:
            return None
        first = next(t for v in tensors.values() for t in ([v] if isinstance(v, Tensor) else v))
        return first.new_empty(shape(given), dtype=torch.float64)

    return fake


def _corrupt_labels(*args: Any) -> None:
    _check_one_device({str(i): t for i, t in enumerate(args) if isinstance(t, Tensor)})


def _draw_samples(index: Tensor, key: Tensor, count: int, inner: int, law: int) -> Tensor:
    _check_one_device({"index": index, "key": key})
    return index.new_empty((count, inner), dtype=torch.float32)


#: Shape functions of the operators on labels, which take no lists.
_SAMPLES: dict[str, Callable[..., Tensor | None]] = {
    "corrupt_labels": _corrupt_labels,
    "draw_samples": _draw_samples,
}

for _name in OPERATORS:
    torch.library.register_fake(f"flatmin::{_name}", _SAMPLES.get(_name) or _fake(_name))
