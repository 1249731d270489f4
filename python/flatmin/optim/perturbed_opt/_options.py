"""Checks of what PerturbedOPT is constructed from."""

from __future__ import annotations

from typing import Any

import torch

from ..._checks import check_int, check_one_of, check_size

__all__ = ["check_options"]

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


def check_options(
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
