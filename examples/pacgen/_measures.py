"""Measures of flatness at the current weights: PACGen, and the simpler ones it is compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _common.images import Batches, Images
from flatmin import curvature, ops

#: What is compared with the gap: key of the JSON, and name in figures and tables.
MEASURES = {
    "psi": "PACGen",
    "psi_sqrt_m": "PACGen, rho sqrt(m)",
    "psi_squared_gradient_sqrt_m": "PACGen, rho sqrt(m), squared gradients",
    "weight_norm": "weight norm",
    "trace": "Hessian trace",
    "lambda_max": "largest eigenvalue",
    "expected_sharpness": "expected sharpness",
}
#: Of the squared gradients, one square a batch: small enough for several batches in a subset of 100 images.
GRADIENT_BATCH = 16


def measure(model: nn.Module, task: str, images: Images, settings: dict[str, Any]) -> dict[str, float]:
    """All measures of :data:`MEASURES` on ``images``, with what they are made of.

    Every call uses the same images, probes and noise, so that differences between two models are theirs.

    Args:
        model: in evaluation mode.
        task: of the images.
        images: the fixed subset of the training images.
        settings: gamma, eps, lipschitz, probes (of the Hessian's diagonal), power_iterations, noise (size of the
            isotropic noise), noise_samples, measure_seed.
    """
    whole: Any = (model, F.nll_loss, list(Batches(task, images, 256)))
    small: Any = (model, F.nll_loss, list(Batches(task, images, GRADIENT_BATCH)))
    seed = settings["measure_seed"]
    result = {"weight_norm": float(ops.norm(_trained(model)))}
    try:
        diagonal = curvature.hutchinson_diag(*whole, samples=settings["probes"], seed=seed, progress=False).value
        squares = curvature.squared_gradient_diag(*small, progress=False)
        result |= _pacgen(whole, settings, diagonal, "hutchinson")
        squared = _pacgen(small, settings, squares, "squared_gradient")
    except ValueError:  # not finite: the run has diverged, and has no curvature
        return result | dict.fromkeys([key for key in _KEYS if key not in result], math.nan)
    noise: dict[str, Any] = {"distribution": "normal", "eps": 1.0, "scale": settings["noise"], "seed": seed}
    sharpness = curvature.expected_sharpness(*whole, samples=settings["noise_samples"], progress=False, **noise)
    return result | {
        **{_squared(key): value for key, value in squared.items()},
        "trace": math.fsum(float(h.sum(dtype=torch.float64)) for h in diagonal),
        "lambda_max": largest_eigenvalue(*whole, iterations=settings["power_iterations"], seed=seed),
        "expected_sharpness": sharpness.value,
        "expected_sharpness_stderr": sharpness.stderr,
    }


_PACGEN = ("psi", "psi_sqrt_m", "capped", "capped_sqrt_m", "lipschitz")


def _squared(key: str) -> str:
    """psi_sqrt_m becomes psi_squared_gradient_sqrt_m."""
    return key.replace("_sqrt_m", "") + "_squared_gradient" + "_sqrt_m" * key.endswith("_sqrt_m")


_KEYS = [*MEASURES, *_PACGEN, *map(_squared, _PACGEN), "expected_sharpness_stderr"]


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _pacgen(data: Any, settings: dict[str, Any], diagonal: list[Tensor], estimator: str) -> dict[str, float]:
    """The metric with ``rho`` and with ``rho sqrt(m)`` under its root, m the number of parameters.

    Both forms are in use: the authors' summary has the first, their paper, as far as it is known to us, the second.
    :func:`flatmin.pacgen` gives either, and the bound besides, which is not needed here.
    """
    params = _trained(data[0])
    common = {key: settings[key] for key in ("gamma", "eps")}
    rho = curvature.lipschitz(
        *data,
        **common,
        mode=settings["lipschitz"],
        curvature=estimator,
        at_weights=diagonal,
        curvature_samples=settings["probes"],
        seed=settings["measure_seed"],
        progress=False,
    )
    size = sum(p.numel() for p in params)
    plain, rooted = (
        ops.pacgen(params, diagonal, lipschitz=rho * factor, **common).sum(0).tolist()
        for factor in (1.0, math.sqrt(size))
    )
    values = (plain[0], rooted[0], plain[1] / size, rooted[1] / size, rho)
    return dict(zip(_PACGEN, values, strict=True))


def largest_eigenvalue(model: nn.Module, loss_fn: Any, data: Any, *, iterations: int, seed: int) -> float:
    """Eigenvalue of the Hessian of largest size, by power iteration from a random start: the last Rayleigh quotient.

    After k iterations the error is that of ``(lambda_2 / lambda_1)^(2 k)``; it is not removed by going on until the
    quotient settles, so the number of iterations is fixed and the same for every model.
    """
    v = [torch.empty_like(p) for p in _trained(model)]
    ops.probe_(v, ops.random_key(seed, 0, 1, v[0].device), distribution="normal")
    quotient = math.nan
    for _ in range(iterations):
        torch._foreach_div_(v, float(ops.norm(v)))
        product = curvature.hvp(model, loss_fn, data, v, progress=False)
        quotient = math.fsum(float(_dot(a, b)) for a, b in zip(v, product, strict=True))
        v = product
    return quotient


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten().double(), b.flatten().double())
