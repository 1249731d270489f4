"""Checks of what PerturbedOPT is constructed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..._checks import check_int, check_one_of, check_size, is_number
from .._arguments import check_model, check_patterns

__all__ = ["check_options"]

#: What only the noise of a curvature reads.
_CURVATURE_ONLY = ("curvature", "gamma", "eps", "beta1", "beta2", "lipschitz", "min_step", "curvature_interval")


def check_options(
    defaults: Mapping[str, Any],
    *,
    distribution: Any,
    sizing: Any,
    scale: Any,
    schedule: Any,
    samples: Any,
    sync: Any,
    generator: Any,
    start: Any,
    model: Any,
    exempt_buffers: Any,
    **own: Any,
) -> None:
    """``own``: what only ``sizing="curvature"`` reads. ``defaults``: of the constructor."""
    check_one_of("distribution", distribution, ("uniform", "truncated_normal", "normal"))
    check_one_of("sizing", sizing, ("curvature", "filter", "tensor", "isotropic", "magnitude"))
    for name in _CURVATURE_ONLY if sizing != "curvature" else ():
        value = own[name]
        if value != defaults[name]:
            raise ValueError(f"{name}: {value!r} given, but only sizing='curvature' reads it, not {sizing!r}")
    if not callable(own["curvature"]):
        check_one_of(
            "curvature", own["curvature"], ("squared_gradient", "gnb", "hutchinson", "exact", "fisher"), "a callable"
        )
    if isinstance(own["lipschitz"], str):
        check_one_of("lipschitz", own["lipschitz"], ("max", "element"), "a float >= 0")
    else:
        check_size("lipschitz", own["lipschitz"])
    for name, value in (("gamma", own["gamma"]), ("eps", own["eps"]), ("scale", scale), ("min_step", own["min_step"])):
        check_size(name, value)
    for name in ("beta1", "beta2"):
        if not (is_number(own[name]) and 0.0 <= own[name] < 1.0):
            raise ValueError(f"{name}: {own[name]!r} given; give a float from 0 to below 1")
    if schedule is not None and not callable(schedule):
        check_one_of("schedule", schedule, ("log",), "None or a callable")
    if isinstance(sync, str):
        check_one_of("sync", sync, ("common", "per_rank"), "a torch.distributed process group")
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        raise TypeError(f"generator: {generator!r} given; give a torch.Generator of the CPU, or None")
    check_model(model, same_rng=False)
    check_patterns("exempt_buffers", exempt_buffers)
    check_int("samples", samples, 1)
    check_int("start", start, 0)
    check_int("curvature_interval", own["curvature_interval"], 1)
