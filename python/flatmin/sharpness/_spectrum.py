"""The rows of a report that come from the Hessian's spectrum."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from torch import nn

from ..curvature._density import SpectralDensity, spectral_density
from ..curvature._lanczos import Eigenvalues, eigenvalues
from ..curvature._measurement import LossFn
from ._plan import Plan
from ._report_rows import Row

__all__ = ["Spectrum", "spectrum"]

_UNIT = "loss / weight^2"
_CLEARLY = 0.01


class Spectrum(NamedTuple):
    eigenvalues: Eigenvalues
    density: SpectralDensity
    rows: list[Row]


def spectrum(
    model: nn.Module, loss_fn: LossFn, data: Any, plan: Plan, method: str, seed: int, common: dict[str, Any]
) -> Spectrum:
    """Five eigenvalues, the density, and the trace from the density's probes."""
    options: dict[str, Any] = common | {"method": method, "seed": seed}
    with warnings.catch_warnings():  # a report says in its rows what has not converged
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"flatmin\.")
        size = sum(p.numel() for p in common["params"] or model.parameters() if p.requires_grad)
        top = eigenvalues(model, loss_fn, data, k=min(5, size), max_products=plan.products, **options)
    density = spectral_density(model, loss_fn, data, probes=plan.probes, steps=plan.steps, **options)
    done = all(top.converged)
    note = "residual" if done else f"residual; not converged in {top.products} products"
    rows = [Row("lambda_1", "largest eigenvalue lambda_1", top.lambda_1, top.residuals[0], _UNIT, note)]
    if len(top.values) == 5:
        ratio = top.lambda_1_over_lambda_5
        rows.append(Row("lambda_1_over_lambda_5", "lambda_1 / lambda_5", ratio, None, "", "" if done else note[10:]))
    # near 0 the nodes of few steps lie on both sides
    trace, below = density.trace_of(lambda x: x), density.mass_below(-_CLEARLY * abs(top.lambda_1))
    over = f"std. error, {plan.probes} probes"
    rows.append(Row("trace", "trace", trace.value, trace.stderr, _UNIT, over))
    rows.append(
        Row("negative_share", f"share of eigenvalues < -{_CLEARLY:g} lambda_1", below.value, below.stderr, "", over)
    )
    return Spectrum(top, density, rows)
