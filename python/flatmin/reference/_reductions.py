"""Sums over whole lists: norms, and the scaling that they see."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._memory import as_real, wide_type

__all__ = ["ASAM", "BIG_VISION", "DAVDA54", "NONE", "filter_norm", "norm", "scaling_of", "ties"]

#: Adaptive conventions (``scaling`` of the operators).
NONE, ASAM, DAVDA54, BIG_VISION = 0, 1, 2, 3


def scaling_of(w: Tensor, scaling: int, eta: float) -> Tensor | float:
    """``T(w)``. ASAM leaves biases and norm layers (one dimension or none) unscaled."""
    if scaling == ASAM:
        return w.abs() + eta if w.dim() > 1 else 1.0
    return w.abs() if scaling in (DAVDA54, BIG_VISION) else 1.0


def _scaled_abs(tensors: Sequence[Tensor], weights: Sequence[Tensor], scaling: int, eta: float) -> list[Tensor]:
    """``|T(w) g|`` of each tensor, in the wide type. big_vision takes the norm of ``g`` itself."""
    out = []
    for i, g in enumerate(tensors):
        wide = as_real(g).to(wide_type(g))
        if scaling in (ASAM, DAVDA54):
            w = weights[i]
            t = scaling_of(w.to(torch.promote_types(w.dtype, wide_type(w))), scaling, eta)
            if isinstance(t, Tensor):
                wide = wide * (t.unsqueeze(-1) if g.is_complex() else t)
        out.append(wide.abs())
    return out


def norm(tensors: Sequence[Tensor], weights: Sequence[Tensor], q: float, scaling: int, eta: float) -> Tensor:
    """``||T(w) g||_q`` over all tensors, max-scaled so that no power over- or underflows."""
    values = [v.flatten() for v in _scaled_abs(tensors, weights, scaling, eta) if v.numel()]
    if not values:
        return tensors[0].new_zeros((), dtype=wide_type(tensors[0]))
    largest = torch.stack([v.amax() for v in values]).amax()
    if q == math.inf:
        return largest
    unit = torch.where(largest > 0, largest, 1.0)
    total = torch.stack([((v / unit) ** q).sum() for v in values]).sum() ** (1.0 / q)
    return torch.where(torch.isfinite(largest), largest * total, largest)


def ties(tensors: Sequence[Tensor], weights: Sequence[Tensor], norm: Tensor, scaling: int, eta: float) -> Tensor:
    """How many elements attain the maximum ``norm`` of ``|T(w) g|``: p = 1 shares the radius among them."""
    counts = [(v == norm).sum() for v in _scaled_abs(tensors, weights, scaling, eta)]
    return torch.stack(counts).sum().to(wide_type(tensors[0]))


def filter_norm(tensors: Sequence[Tensor], whole: bool) -> Tensor:
    """The 2-norm of each filter (index of the first dimension) of each tensor, or of each tensor if ``whole`` or of
    fewer than two dimensions: one wide vector."""
    norms = []
    for t in tensors:
        rows = t.reshape(1, -1) if whole or t.dim() < 2 else t.flatten(1)
        norms.append(torch.linalg.vector_norm(rows.to(wide_type(t)), dim=1))
    return torch.cat(norms)
