"""Checks of what a wrapper is constructed from: every message names the argument and says what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import ops
from .._checks import check_int, check_one_of, check_radius, check_size
from ._wrapper import Wrapper

__all__ = [
    "build_base",
    "check_keys",
    "check_model",
    "check_noise_options",
    "check_sam_groups",
    "check_sam_options",
]


def check_sam_options(
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


#: What only the noise of a curvature reads, with the defaults of PerturbedOPT.
_CURVATURE_ONLY: dict[str, Any] = {
    "hessian": "grad2",
    "gamma": 0.1,
    "eps": 1e-5,
    "beta1": 0.999,
    "beta2": 0.1,
    "lipschitz": "global",
    "min_step": 1e-8,
    "hessian_interval": 10,
}


def check_noise_options(
    *, dist: Any, sizing: Any, scale: Any, schedule: Any, draws: Any, sync: Any, generator: Any, start: Any, **own: Any
) -> None:
    """``own``: what only ``sizing="curvature"`` reads."""
    check_one_of("dist", dist, ("uniform", "truncated_normal", "normal"))
    check_one_of("sizing", sizing, ("curvature", "filter", "tensor", "isotropic", "magnitude"))
    for name, value in own.items():
        if sizing != "curvature" and value != _CURVATURE_ONLY[name]:
            raise ValueError(f"{name}: {value!r} given, but only sizing='curvature' reads it, not {sizing!r}")
    if not callable(own["hessian"]):
        check_one_of("hessian", own["hessian"], ("grad2", "gnb", "hutchinson"), "a callable")
    if isinstance(own["lipschitz"], str):
        check_one_of("lipschitz", own["lipschitz"], ("global", "element"), "a float >= 0")
    else:
        check_size("lipschitz", own["lipschitz"])
    for name, value in (("gamma", own["gamma"]), ("eps", own["eps"]), ("scale", scale), ("min_step", own["min_step"])):
        check_size(name, value)
    for name in ("beta1", "beta2"):
        if not (isinstance(own[name], int | float) and 0.0 <= own[name] < 1.0):
            raise ValueError(f"{name}: {own[name]!r} given; give a float from 0 to below 1")
    if schedule is not None and not callable(schedule):
        check_one_of("schedule", schedule, ("log",), "None or a callable")
    if isinstance(sync, str):
        check_one_of("sync", sync, ("common", "per_rank"), "a torch.distributed process group")
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        raise TypeError(f"generator: {generator!r} given; give a torch.Generator of the CPU, or None")
    check_int("draws", draws, 1)
    check_int("start", start, 0)
    check_int("hessian_interval", own["hessian_interval"], 1)


def check_model(model: Any, same_rng: bool) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} given; give the torch.nn.Module that is trained")
    if same_rng and model is None:
        raise ValueError("same_rng: True needs model=, the module whose forward draws the random numbers")


def build_base(
    wrapper: str, source: Any, base: Callable[..., torch.optim.Optimizer] | None, kwargs: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer to wrap, from the arguments of the constructor of ``wrapper``."""
    if isinstance(source, torch.optim.Optimizer):
        if base is not None or kwargs:
            extra = ["base"] * (base is not None) + list(kwargs)
            raise TypeError(
                f"{', '.join(extra)}: given with an optimizer instance; they belong to {wrapper}(params, base)"
            )
        optimizer = source
    elif base is None:
        raise TypeError(
            f"base: missing, and {type(source).__name__} is no optimizer; write {wrapper}(torch.optim.SGD(params, "
            f"lr=0.1)) or {wrapper}(params, torch.optim.SGD, lr=0.1)"
        )
    elif not callable(base) or isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base: {base!r} given; give an optimizer class, or {wrapper}(optimizer) alone")
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
    """Our keys must be ours. Groups may have them: given by the user, or loaded from a checkpoint of such a run."""
    for key in keys:
        if key in optimizer.defaults:
            raise ValueError(
                f"{key}: already a default of {type(optimizer).__name__}. Was it wrapped before? Wrap an optimizer "
                f"once, and change the value through group['{key}']"
            )


def check_sam_groups(optimizer: torch.optim.Optimizer) -> None:
    for i, group in enumerate(optimizer.param_groups):
        check_radius(group.get("sam_rho", 0.0), f"param_groups[{i}]['sam_rho']")
        ops.scaling_code(group.get("sam_adaptive", False))
        if "rho" in group and "rho" not in optimizer.defaults:
            raise ValueError(f"param_groups[{i}]['rho']: nobody would read it; the group's radius is 'sam_rho'")
