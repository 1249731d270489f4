"""Averages of a diagonal curvature and their difference quotients, and PACGen (Wang et al. 2018, arXiv 1809.07402)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._memory import arithmetic_type, backup_views, memory_order, wide_type
from ._noise import RADEMACHER, curved, draw_like

__all__ = ["PLAIN", "PROBED", "SQUARE", "curvature_", "pacgen"]

#: What a curvature average is fed with: the square of a source, the source, or probe * source (Hutchinson).
SQUARE, PLAIN, PROBED = 0, 1, 2


def curvature_(
    curvatures: Sequence[Tensor],
    sources: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    params: Sequence[Tensor],
    backup: Tensor,
    key: Tensor,
    corrections: Tensor,
    source: int,
    source_scale: float,
    decay: float,
    lipschitz_decay: float,
    min_step: float,
) -> Tensor:
    """``h <- decay h + (1 - decay) source_scale T(x)``; with ``params`` also the difference quotients of h and w.

    ``q_i = |k' h'_i - k h_i| / |w'_i - w_i|`` where the weight moved by more than ``min_step``, (k, k') =
    ``corrections`` and w is in ``backup``; k = 0 means that h holds nothing yet: no quotient. ``lipschitz`` becomes
    ``lipschitz_decay rho_i + (1 - lipschitz_decay) q_i`` there. Returns the largest q_i, or 0; NaN if an average is not
    finite.
    """
    wide = wide_type(curvatures[0])
    largest = torch.zeros((), dtype=wide, device=curvatures[0].device)
    views = backup_views(params, backup) if params else iter(())
    before, after = corrections.unbind()
    for i, h in enumerate(curvatures):
        real = torch.promote_types(arithmetic_type(params[i] if params else h), arithmetic_type(sources[i]))
        old, x = h.to(real, copy=True), sources[i].to(real)
        if source == SQUARE:
            x = x * x
        elif source == PROBED:
            x = x * draw_like(params[i] if params else h, key, i, RADEMACHER).to(real)
        new = decay * old + (1.0 - decay) * (source_scale * x)
        h.copy_(new)
        if h.numel():
            largest = torch.maximum(largest, (new - new).max().to(wide))  # 0, or NaN
        if not params:
            continue
        w = torch.empty_like(params[i])
        memory_order(w).copy_(next(views))
        step = (params[i].to(real) - w.to(real)).abs()
        moved = (step > min_step) & (before != 0)
        q = torch.where(moved, (after.to(real) * new - before.to(real) * old).abs() / step, 0.0)
        if lipschitz:
            rho = lipschitz[i].to(real)
            mixed = lipschitz_decay * rho + (1.0 - lipschitz_decay) * q
            lipschitz[i].copy_(torch.where(moved, mixed, rho))
        if q.numel():
            largest = torch.maximum(largest, q.max().to(wide))
    return largest


def pacgen(
    params: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    lipschitz_constant: Tensor,
    curvature_scale: Tensor,
    gamma: float,
    eps: float,
) -> Tensor:
    """For each tensor ``sum_i log((|w_i| + N_i) max(sqrt(c_i), 1 / N_i))`` and the number of i with c_i N_i^2 <= 1.

    A weight of 0 without neighbourhood (N_i = 0) adds log 1. Wide type, shape (len(params), 2).
    """
    rows = []
    for i, p in enumerate(params):
        w = p.to(wide_type(p))
        rho = lipschitz[i].to(w.dtype) if lipschitz else 1.0
        n, c = curved(w, curvatures[i].to(w.dtype), rho, lipschitz_constant, curvature_scale, gamma, eps)
        capped = c * n * n <= 1.0
        terms = torch.where(n > 0, (w.abs() + n).log() + 0.5 * torch.where(capped, n**-2.0, c).log(), 0.0)
        rows.append(torch.stack([(terms + 0.0 * c).sum(), capped.sum().to(w.dtype)]))
    return torch.stack(rows)
