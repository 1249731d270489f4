"""Linear algebra of whole lists: inner products, and combinations of two or three."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._memory import arithmetic_type, as_real, wide_type
from ._perturb import save_

__all__ = ["axpy_", "blend_", "dot"]


def dot(a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor], d: Sequence[Tensor]) -> Tensor:
    """The inner products of two to four lists (``c`` and ``d`` may be empty), each over all tensors: the upper triangle
    of their Gram matrix row by row, wide."""
    lists = [tensors for tensors in (a, b, c, d) if tensors]
    wide = wide_type(a[0])
    total = torch.zeros(len(lists), len(lists), dtype=wide, device=a[0].device)
    for tensors in zip(*lists, strict=True):
        flat = torch.stack([as_real(t).to(wide).flatten() for t in tensors])
        total += flat @ flat.T
    return total[tuple(torch.triu_indices(len(lists), len(lists)))]


def blend_(grads: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor], coefficients: Tensor) -> None:
    """``g <- k0 g + k1 x + k2 y``; without a third term if ``y`` is empty."""
    for i, g in enumerate(grads):
        real = arithmetic_type(g)
        k = coefficients.to(g.device, real)
        new = _multiple(k[0], g, real) + _multiple(k[1], x[i], real)
        as_real(g).copy_(new + _multiple(k[2], y[i], real) if y else new)


def axpy_(params: Sequence[Tensor], x: Sequence[Tensor], backup: Tensor, scale: Tensor) -> None:
    """``backup <- w`` unless ``backup`` is empty, then ``w <- w + scale x``."""
    if backup.numel():
        save_(params, backup)
    for w, add in zip(params, x, strict=True):
        real = arithmetic_type(w)
        as_real(w).copy_(as_real(w).to(real) + _multiple(scale.to(w.device, real), add, real))


def _multiple(factor: Tensor, t: Tensor, real: torch.dtype) -> Tensor:
    """A term of a sum, which is left out where its coefficient is 0: it passes no NaN on."""
    return torch.where(factor != 0, factor * as_real(t).to(real), 0.0)
