"""Axes of landscapes: random ones of the size of the weights, and those through other solutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..curvature._measurement import Measurement, check_tensors, names_of
from ._passes import DIRECTIONS

__all__ = ["filter_normalised", "random_direction", "spanned", "towards"]


@torch.no_grad()
def filter_normalised(direction: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """``direction`` with each filter (index of the first dimension) scaled to the norm of the weights' filter, and 0 in
    tensors of fewer than two dimensions (Li et al. 2018, arXiv 1712.09913, section 4).

    Args:
        direction: tensors like ``weights``.
        weights: as :func:`plane` moves them, the parameters that require gradients.

    Returns:
        New tensors, at least float32.
    """
    found = []
    for d, w in zip(check_tensors("direction", direction, weights), weights, strict=True):
        if w.dim() < 2:
            found.append(torch.zeros_like(d))
        else:
            wanted, has = ops.filter_norm([w])[0], ops.filter_norm([d])[0]
            found.append(d * (wanted / (has + 1e-10)).to(d.dtype))
    return found


def random_direction(m: Measurement, seed: int, draw: int) -> list[Tensor]:
    """Normal, then :func:`filter_normalised`."""
    d = m.zeros()
    for part in m.parts:
        ops.probe_(part.of(d), part.key(seed, draw, DIRECTIONS), distribution="normal")
    return filter_normalised(d, m.params)


@torch.no_grad()
def towards(m: Measurement, name: str, to: Any) -> list[Tensor]:
    """From the weights to a state dict or a list of tensors."""
    if isinstance(to, nn.Module):
        raise TypeError(f"{name}: a module given; give its state_dict()")
    if isinstance(to, Mapping):
        names = names_of(m.model, m.params)
        missing = [key for key in names if key not in to]
        if missing:
            raise ValueError(
                f"{name}: no entry {missing[0]!r}; give the state_dict() of a model with the same parameters"
            )
        to = [to[key].to(p.device) for key, p in zip(names, m.params, strict=True)]
    tensors = check_tensors(name, to, m.params)
    return [t - p.to(t.dtype) for t, p in zip(tensors, m.params, strict=True)]


@torch.no_grad()
def spanned(
    m: Measurement, solutions: Sequence[Any]
) -> tuple[list[list[Tensor]], tuple[tuple[float, float], tuple[float, float]]]:
    """Orthonormal axes of the plane through the weights and two solutions, and where in it these are (Garipov et al.
    2018, arXiv 1802.10026)."""
    first, second = (towards(m, f"solutions[{i}]", to) for i, to in enumerate(solutions))
    length, distance = m.norm(first), m.norm(second)
    if not (0.0 < length < math.inf and distance < math.inf):
        raise ValueError("solutions: the first is at the weights, or one is not finite; give two other solutions")
    u = [t.div_(length) for t in first]
    along = math.fsum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(u, second, strict=True))
    v = [b.sub_(a, alpha=along) for a, b in zip(u, second, strict=True)]
    height = m.norm(v)
    if height <= 1e-6 * max(length, distance):
        raise ValueError("solutions: the two lie on one line with the weights; use line(to=...) for those")
    return [u, [t.div_(height) for t in v]], ((length, 0.0), (along, height))
