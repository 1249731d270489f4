"""The trace of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._deprecated import renamed_arguments
from ._measurement import LossFn, Measurement
from ._probes import Probes, ScalarEstimate, check_sampling, scalar_estimate

__all__ = ["hutchinson_trace"]


@renamed_arguments(law="distribution")
def hutchinson_trace(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    samples: int = 100,
    method: str = "autograd",
    distribution: str = "rademacher",
    step: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> ScalarEstimate:
    """Trace of the Hessian as the mean of ``<v, H v>`` over random ``v`` (Hutchinson 1990).

    Arguments as of :func:`hutchinson_diag`, and the same probes. The variance of one sample is ``2 sum_{i != j}
    H_ij^2`` with Rademacher probes.

    Returns:
        ``(value, stderr, samples)``, floats.
    """
    difference = check_sampling(samples, distribution, method, step, seed)
    with Measurement(model, loss_fn, data, params, "Hutchinson", samples * (1 + difference), progress) as m:
        probes, products = Probes(m, distribution, difference, step, seed), m.zeros()
        sums: list[Tensor] = []
        for draw in range(samples):
            probed = probes[draw]
            for part, key in zip(m.parts, probed.keys, strict=True):
                local = part.of(products)
                ops.curvature_(local, part.of(probed.x), decay=0.0, source=probed.source, key=key)
                wide = torch.float32 if part.device.type == "mps" else torch.float64
                sums.append(torch.stack([t.sum(dtype=wide) for t in local]).sum())
            del probed
        numbers = [float(s) for s in sums]  # read at the end only: no probe waits for the host
        width = len(m.parts)
        return scalar_estimate([math.fsum(numbers[i : i + width]) for i in range(0, len(numbers), width)])
