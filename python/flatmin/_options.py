"""Checks of what a wrapper is constructed from: every message names the argument and says what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import ops
from ._perturbed import check_radius
from ._wrapper import Wrapper

__all__ = ["build_base", "check_int", "check_keys", "check_model", "check_options"]


def check_options(
    rho: Any, adaptive: Any, eta: Any, eps: Any, p: Any, rounding: Any, sync: Any, interval: Any, start: Any
) -> None:
    check_radius(rho)
    ops.scaling_code(adaptive)
    for name, value in (("eta", eta), ("eps", eps)):
        if not (isinstance(value, int | float) and 0.0 <= value < math.inf):
            raise ValueError(f"{name}: {value!r} given; give a finite float >= 0")
    if not isinstance(p, int | float):
        raise TypeError(f"p: {p!r} given; give a float from 1 to math.inf")
    ops.dual_exponent(p)
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding: {rounding!r} is none of 'nearest', 'stochastic'")
    if isinstance(sync, str) and sync != "local":
        raise ValueError(f"sync: {sync!r} given; give 'local' or a torch.distributed process group")
    check_int("interval", interval, 1)
    check_int("start", start, 0)


def check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r} given; give an integer >= {least}")


def check_model(model: Any, same_rng: bool) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} given; give the torch.nn.Module that is trained")
    if same_rng and model is None:
        raise ValueError("same_rng: True needs model=, the module whose forward draws the random numbers")


def build_base(
    source: Any, base: Callable[..., torch.optim.Optimizer] | None, kwargs: dict[str, Any]
) -> torch.optim.Optimizer:
    if isinstance(source, torch.optim.Optimizer):
        if base is not None or kwargs:
            extra = ["base"] * (base is not None) + list(kwargs)
            raise TypeError(f"{', '.join(extra)}: given with an optimizer instance; they belong to SAM(params, base)")
        optimizer = source
    elif base is None:
        raise TypeError(
            f"base: missing, and {type(source).__name__} is no optimizer; write SAM(torch.optim.SGD(params, lr=0.1)) "
            "or SAM(params, torch.optim.SGD, lr=0.1)"
        )
    elif not callable(base) or isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base: {base!r} given; give an optimizer class, or SAM(optimizer) alone")
    else:
        optimizer = base(source, **kwargs)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"base: made {type(optimizer).__name__}, which is no torch.optim.Optimizer")
    if isinstance(optimizer, Wrapper):
        raise TypeError(f"base: {type(optimizer).__name__} is a wrapper itself; wrap the optimizer within it, .base")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base: {type(optimizer).__name__} evaluates its closure as often as it likes, so there is no pair of "
            "passes to perturb; use an optimizer whose step() needs no closure"
        )
    return optimizer


def check_keys(optimizer: torch.optim.Optimizer, keys: dict[str, Any]) -> None:
    """Our keys must be ours. Groups may have them: given by the user, or loaded from a checkpoint of a SAM run."""
    for key in keys:
        if key in optimizer.defaults:
            raise ValueError(
                f"{key}: already a default of {type(optimizer).__name__}. Was it wrapped before? Wrap an optimizer "
                "once, and change the radius through group['sam_rho']"
            )
    for i, group in enumerate(optimizer.param_groups):
        check_radius(group.get("sam_rho", 0.0), f"param_groups[{i}]['sam_rho']")
        ops.scaling_code(group.get("sam_adaptive", False))
        if "rho" in group and "rho" not in optimizer.defaults:
            raise ValueError(f"param_groups[{i}]['rho']: nobody would read it; the group's radius is 'sam_rho'")
