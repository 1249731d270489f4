"""One call of an operator: to its kernel, or to the reference for tensors that have none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import reference
from .._devices import on_device
from . import _library

__all__ = ["empty_key", "run", "scalar", "warned"]

#: What was warned of already.
warned: set[str] = set()


def run(name: str, **arguments: Any) -> Any:
    """``torch.ops.flatmin.<name>`` or, for tensors without a kernel, the reference of the same argument names.

    Arguments are given by name and put into the order of the schema here: torch's own binding of keywords takes longer
    than a whole call. Version counters of what the schema says is written go up before the operator runs, while the
    tensors are in the cache. Complex tensors are found by the kernel's refusal, which costs nothing otherwise.
    """
    names = _library.ARGUMENTS[name]
    if len(arguments) != len(names):
        raise TypeError(f"{name}: arguments {sorted(arguments)} given, but its schema has {sorted(names)}")
    for written in _library.WRITTEN[name]:
        value = arguments[written]
        if isinstance(value, Tensor) or value:
            increment_version(value)
    tensors = arguments[names[0]]
    device = tensors[0].device.type
    if device in _library.DEVICES:
        try:
            return _library.OPERATORS[name](*[arguments[key] for key in names])
        except RuntimeError:
            if not any(map(Tensor.is_complex, tensors)):
                raise
    reason = "complex parameters" if device in _library.DEVICES else f"{device} tensors"
    if reason not in warned:
        warned.add(reason)
        warnings.warn(f"flatmin has no kernel for {reason}; running in plain torch, which is slower", stacklevel=4)
    _check_list(tensors)
    return getattr(reference, name)(**arguments)


def _check_list(tensors: Sequence[Tensor]) -> None:
    for i, t in enumerate(tensors):
        if t.layout != torch.strided:
            raise RuntimeError(f"tensor {i} of the list has layout {t.layout}; give dense tensors (t.to_dense())")
        if not (t.is_floating_point() or t.is_complex()):
            raise RuntimeError(f"tensor {i} of the list has dtype {t.dtype}; give floating-point tensors")


def scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A number, or those of a tensor, as a float64 tensor on ``device``: the kernels read it there, so a changed value
    never recompiles."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(value, Tensor):
        return on_device(value, device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def empty_key(device: torch.device) -> Tensor:
    """What an operator takes where nothing is drawn."""
    return torch.empty(0, dtype=torch.uint64, device=device)
