"""Linear algebra of whole lists: inner products, and combinations of two or three."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._memory import arithmetic_type, as_real, wide_type

__all__ = ["axpy_", "blend_", "gram"]


def gram(a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor], d: Sequence[Tensor]) -> Tensor:
    """The inner products of two to four lists (``c`` and ``d`` may be empty), each over all tensors: (k, k), wide."""
    lists = [tensors for tensors in (a, b, c, d) if tensors]
    wide = wide_type(a[0])
    total = torch.zeros(len(lists), len(lists), dtype=wide, device=a[0].device)
    for tensors in zip(*lists, strict=True):
        flat = torch.stack([as_real(t).to(wide).flatten() for t in tensors])
        total += flat @ flat.T
    return total


def blend_(grads: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor], coefficients: Tensor) -> None:
    """``g <- k0 g + k1 x + k2 y``; without a third term if ``y`` is empty."""
    for i, g in enumerate(grads):
        real = arithmetic_type(g)
        k = coefficients.to(g.device, real)
        new = k[0] * as_real(g).to(real) + k[1] * as_real(x[i]).to(real)
        as_real(g).copy_(new + k[2] * as_real(y[i]).to(real) if y else new)


def axpy_(tensors: Sequence[Tensor], x: Sequence[Tensor], scale: Tensor) -> None:
    """``t <- t + scale x``."""
    for t, add in zip(tensors, x, strict=True):
        real = arithmetic_type(t)
        as_real(t).copy_(as_real(t).to(real) + scale.to(t.device, real) * as_real(add).to(real))
