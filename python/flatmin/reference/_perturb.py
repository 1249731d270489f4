"""Away from the weights and back: the ascent of SAM, restore."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._memory import arithmetic_type, as_real, backup_views, memory_order, wide_type
from ._reductions import BIG_VISION, norm, scaling_of

__all__ = ["restore_", "sam_ascend_", "sam_norm_ascend_", "save_"]


def sam_ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    norm: Tensor,
    rho: Tensor,
    key: Tensor,
    q: float,
    scaling: int,
    eta: float,
    eps: float,
) -> None:
    """``backup <- w;  w <- w + rho T sign(g) (|T g| / (norm + eps))^(q-1)``; nothing moves if the scale is not finite.

    ``key`` (uint64[2]; empty for rounding to nearest) asks for stochastic rounding of 16-bit parameters. This
    reference rounds to nearest: the random choice belongs to the kernels and is tested by its distribution.
    ``rho`` may have a radius for each parameter.
    """
    radii = rho.reshape(-1).expand(len(params)).unbind()
    for p, g, old, rho in zip(params, grads, backup_views(params, backup), radii, strict=True):
        old.copy_(memory_order(p))
        w = p.to(torch.promote_types(arithmetic_type(p), p.dtype))
        d = g.to(w.dtype)
        t = scaling_of(w, scaling, eta)
        inner = 1.0 if scaling == BIG_VISION else t
        step = (rho / (norm + eps)).to(p.device)
        if q == 2.0:
            e = (as_real(inner * t * d) * step.to(arithmetic_type(p))).to(arithmetic_type(p))
        else:
            wide = torch.promote_types(p.dtype, wide_type(p))  # as the norm saw T g: ties are exact comparisons
            t = scaling_of(p.to(wide), scaling, eta)
            x = as_real(g.to(wide) if scaling == BIG_VISION else t * g.to(wide))
            if q == math.inf:
                e = rho * x.sign() * (x.abs() == norm)
            else:
                e = rho * x.sign() * (x.abs() / (norm + eps)) ** (q - 1.0)
            if isinstance(t, Tensor):
                e = e * (t.unsqueeze(-1) if p.is_complex() else t)
        moved = (as_real(w) + e).to(as_real(p).dtype)
        usable = torch.isfinite(norm) & torch.isfinite(step.to(arithmetic_type(p))) & (step != 0)
        as_real(p).copy_(torch.where(usable, moved, as_real(p)))


def sam_norm_ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    rho: Tensor,
    key: Tensor,
    q: float,
    scaling: int,
    eta: float,
    eps: float,
) -> Tensor:
    """:func:`norm`, which is returned, and :func:`sam_ascend_` by it."""
    gradient_norm = norm(grads, params, q, scaling, eta)
    sam_ascend_(params, grads, backup, gradient_norm, rho, key, q, scaling, eta, eps)
    return gradient_norm


def save_(params: Sequence[Tensor], backup: Tensor) -> None:
    """``backup <- w``, byte for byte."""
    for p, old in zip(params, backup_views(params, backup), strict=True):
        old.copy_(memory_order(p))


def restore_(params: Sequence[Tensor], backup: Tensor) -> None:
    """``w <- backup``, byte for byte."""
    for p, old in zip(params, backup_views(params, backup), strict=True):
        memory_order(p).copy_(old)
