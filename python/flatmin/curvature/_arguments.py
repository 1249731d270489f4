"""Checks of what a measurement is given: each message names the argument and says what to give."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_size, is_number
from .._distributed import is_dtensor

__all__ = [
    "check_neighbourhood",
    "check_params",
    "check_seed",
    "check_share",
    "check_tensors",
    "describe",
    "names_of",
    "refuse_not_finite",
]


def check_params(model: nn.Module, params: Any) -> list[Tensor]:
    """``params`` as a list, those of ``model`` that require gradients for None."""
    if params is None:
        chosen: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not chosen:
            raise ValueError("model: none of its parameters requires a gradient; there is nothing to measure")
    elif isinstance(params, Tensor):
        raise TypeError("params: one tensor given; give a list of tensors, [weight]")
    else:
        chosen = list(params)
        if not chosen:
            raise ValueError("params: empty; give parameters of the model, or None for all")
    for i, p in enumerate(chosen):
        if not isinstance(p, Tensor):
            raise TypeError(f"params: item {i} is a {type(p).__name__}; give tensors")
        if is_dtensor(p):
            raise TypeError(f"params: tensor {i} is a DTensor; measure the unsharded model (full_tensor())")
        if not p.is_floating_point() or p.layout != torch.strided:
            raise TypeError(f"params: tensor {i} is a {describe(p)}; give dense tensors of real numbers")
        if not p.requires_grad:
            raise ValueError(f"params: tensor {i} does not require a gradient; leave it out or set requires_grad")
        if p.is_inference():
            raise ValueError(
                f"params: tensor {i} was made in inference mode, in which autograd takes none; make or load the model "
                "outside of torch.inference_mode()"
            )
    if len(set(map(id, chosen))) != len(chosen):
        raise ValueError("params: a tensor is given twice; give each once")
    return chosen


def check_tensors(name: str, tensors: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` as a list, if it is one like ``params``: else ``TypeError`` or ``ValueError``."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name}: a {describe(tensors)} given; give a list of tensors, one for each parameter")
    if len(tensors) != len(params):
        raise ValueError(f"{name}: {len(tensors)} tensors given for {len(params)} parameters; give one for each")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if not isinstance(t, Tensor) or t.shape != p.shape or t.device != p.device or not t.is_floating_point():
            wanted = f"floating-point tensor of shape {tuple(p.shape)} on {p.device}"
            raise ValueError(f"{name}: item {i} is a {describe(t)}; parameter {i} needs a {wanted}")
    return [t.detach().to(torch.promote_types(p.dtype, torch.float32)) for t, p in zip(tensors, params, strict=True)]


def check_seed(seed: Any) -> None:
    if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**64:
        raise ValueError(f"seed: {seed!r} given; give an integer >= 0 of at most 64 bits")


def check_neighbourhood(gamma: Any, eps: Any) -> tuple[float, float]:
    """``gamma`` and ``eps`` as floats."""
    check_size("gamma", gamma)
    check_size("eps", eps)
    if gamma == 0.0 and eps == 0.0:
        raise ValueError("gamma and eps: both 0, which leaves no neighbourhood to move in")
    return float(gamma), float(eps)


def check_share(name: str, value: Any, give: str, *, or_one: bool = False) -> None:
    """``TypeError`` or ``ValueError`` unless ``value`` lies in (0, 1), or (0, 1]; ``give`` says it in words."""
    if not is_number(value):
        raise TypeError(f"{name}: {value!r} given; give {give}")
    if not (0.0 < value < 1.0 or (or_one and value == 1.0)):
        raise ValueError(f"{name}: {value} given; give {give}")


def names_of(model: nn.Module, params: Sequence[Tensor]) -> list[str]:
    """Names as in ``model.named_parameters()``."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [known.get(id(p), f"params[{i}]") for i, p in enumerate(params)]


def refuse_not_finite(what: str, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """``ValueError`` that names the first parameter of which ``what`` is NaN or infinite."""
    for t, name in zip(tensors, names, strict=True):
        bad = int((~t.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{what}: not finite in {bad} of {t.numel()} elements of {name!r}; check the weights, the loss and the "
                "data for NaN and infinity"
            )


def describe(x: Any) -> str:
    """A value in the words of an error: type, shape, device."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} of length {len(x)}" if isinstance(x, list | tuple) else type(x).__name__
