"""Checks of what SAM is constructed from, and of what its groups hold."""

from __future__ import annotations

from typing import Any

import torch

from ... import ops
from ..._checks import check_int, check_one_of, check_radius, check_size, is_number
from .._arguments import check_model, check_patterns

__all__ = ["check_options", "check_scaling", "refuse_plain_rho"]


def check_options(
    *,
    rho: Any,
    adaptive: Any,
    eta: Any,
    eps: Any,
    p: Any,
    rounding: Any,
    sync: Any,
    model: Any,
    exempt_buffers: Any,
    same_rng: Any,
    interval: Any,
    start: Any,
) -> None:
    check_radius("rho", rho)
    check_scaling("adaptive", adaptive)
    check_size("eta", eta)
    check_size("eps", eps)
    if not is_number(p):
        raise TypeError(f"p: {p!r} given; give a float from 1 to math.inf")
    ops.dual_exponent(p)
    check_one_of("rounding", rounding, ("nearest", "stochastic"))
    if isinstance(sync, str):
        check_one_of("sync", sync, ("local",), "a torch.distributed process group")
    check_model(model, same_rng)
    check_patterns("exempt_buffers", exempt_buffers)
    check_int("interval", interval, 1)
    check_int("start", start, 0)


def check_scaling(name: str, adaptive: Any) -> None:
    """``ValueError`` unless ``adaptive`` is one of the conventions of :func:`flatmin.ops.norm`."""
    try:
        ops.scaling_code(adaptive)
    except ValueError as error:
        raise ValueError(str(error).replace("adaptive", name, 1)) from None


def refuse_plain_rho(optimizer: torch.optim.Optimizer) -> None:
    """``ValueError`` for a group with a ``rho`` that neither SAM nor the base would read."""
    for index, group in enumerate(optimizer.param_groups):
        if "rho" in group and "rho" not in optimizer.defaults:
            raise ValueError(f"param_groups[{index}]['rho']: nobody would read it; the group's radius is 'sam_rho'")
